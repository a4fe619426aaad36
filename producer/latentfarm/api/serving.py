"""Run the app: on this machine alone unless callers need keys."""

from __future__ import annotations

import socket

import uvicorn
from latentfarm_shared.errors import InvalidField, Unavailable
from latentfarm_shared.logs import configure_logs, log

from latentfarm.api.app import create_app
from latentfarm.farm import DirectFarm
from latentfarm.keys import ApiKeys

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEEP_ALIVE_S, DRAIN_S = 75, 10


def serve(farm: DirectFarm, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        InvalidField: other machines would reach a farm that needs no key.
        Unavailable: the port is taken.
    """
    needs_keys = ApiKeys(farm.ledger).are_needed()
    if host not in LOOPBACK and not needs_keys:
        reason = (
            f"{host} can be reached from other machines, and this farm has no API keys yet; make one with "
            "'latentfarm keys create OWNER', or listen on 127.0.0.1"
        )
        raise InvalidField("host", reason)
    configure_logs(farm.settings.log_level, farm.settings.log_format)
    with _listening(host, port) as listener:
        url = f"http://{_shown(host)}:{listener.getsockname()[1]}"
        app = create_app(farm)
        app.openapi()  # makes at once what the first requests would wait for
        if needs_keys:
            log.info("serving", url=url, docs=f"{url}/docs")
        else:
            log.info("serving this machine alone, for the farm has no API keys", url=url, docs=f"{url}/docs")
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_S,
            server_header=False,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise Unavailable(
            "API", f"{host}:{port} cannot be listened on ({error.strerror})", "choose another --port"
        ) from error
    return listener
