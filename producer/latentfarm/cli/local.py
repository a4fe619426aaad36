"""Commands that run parts of a farm on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from latentfarm.cli.output import Json, show
from latentfarm.cli.reach import Data

Engine = Annotated[
    str | None, typer.Option(help="torch, or simulated: takes time instead of rendering.", show_default=False)
]
ImageSeconds = Annotated[
    float | None, typer.Option("--image-seconds", min=0, help="What a simulated device takes.", show_default=False)
]
Jitter = Annotated[float | None, typer.Option(min=0, max=1, help="… give or take this share.", show_default=False)]
Slots = Annotated[str | None, typer.Option(help="Images in flight, or auto.", show_default=False)]
Insecure = Annotated[bool, typer.Option("--insecure", help="Let passwords and pictures go unencrypted.")]


def up(  # noqa: PLR0917 - typer turns each into an option
    data: Data = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=0, max=256, help="Workers to start.")] = 1,
    engine: Engine = None,
    image_seconds: ImageSeconds = None,
    jitter: Jitter = None,
    slots: Slots = None,
    listen: Annotated[
        str | None, typer.Option(help="Address where workers on other machines join.", show_default=False)
    ] = None,
    insecure: Insecure = False,
    api: Annotated[bool, typer.Option("--api/--no-api", help="Serve the HTTP API.")] = True,
    as_json: Json = False,
) -> None:
    """Run a farm on this machine: Redis-protocol server, S3 server, HTTP API and workers. Ctrl-C stops it; data is kept.

    Examples:

        latentfarm up --workers 2

        latentfarm up --json --data /srv/latentfarm

        latentfarm up --workers 0 --listen 10.0.0.5 --insecure

        latentfarm up --workers 4 --engine simulated --image-seconds 0.3
    """
    from latentfarm_shared.logs import configure_logs  # noqa: PLC0415
    from latentfarm_shared.settings import data_folder, environment_data  # noqa: PLC0415

    from latentfarm.embedded.local import LocalFarm  # noqa: PLC0415

    if listen is not None:
        _refuse_plain(listen, insecure=insecure)
    configure_logs("INFO", "console")
    folder = data_folder(data, environment_data())
    stop = _StopRequest()
    environ = _worker_environment(engine, image_seconds, jitter, slots)
    farm = LocalFarm(folder, workers, environ=environ, listen=listen, api_port=_api_port() if api else None)
    typer.echo(f"starting a farm in {folder} …", err=True)
    with farm as local:
        local.await_workers(lambda: stop.requested)
        settings = local.farm.settings
        ready = {"redis_url": settings.redis_url, "s3_endpoint": settings.s3_endpoint, "data": str(folder)}
        ready |= {"join": local.token} if local.token else {}
        ready |= {"api_url": local.api_url} if local.api_url else {}
        key = local.api_key() if local.api_url else None
        ready |= {"api_key": key} if key else {}
        if as_json:
            typer.echo(json.dumps(ready))
        else:
            served = f", {local.api_url}" if local.api_url else ""
            typer.echo(f"farm ready: {settings.redis_url}, {settings.s3_endpoint}{served}, data in {folder}")
            typer.echo(f"in another terminal: latentfarm generate 'masterpiece, corneo_dva' --data {folder}", err=True)
            if local.token:
                typer.echo(
                    f"on another machine: latentfarm worker --join TOKEN, which is in {folder / 'join-token'}", err=True
                )
        while not stop.requested:
            local.watch()
            time.sleep(0.5)


def _api_port() -> int | None:
    """Return where the API should be served; None where it is not installed."""
    from latentfarm_shared.settings import environment_api_port  # noqa: PLC0415

    return environment_api_port() if find_spec("fastapi") and find_spec("uvicorn") else None


def _refuse_plain(address: str, *, insecure: bool) -> None:
    """Refuse to send passwords and pictures in the clear to other machines, unless that is asked for.

    Raises:
        InvalidField: it was not.
    """
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    if address not in ("127.0.0.1", "localhost", "::1") and not insecure:
        reason = (
            f"{address} is another machine's business and the servers here speak no TLS; use a VPN or tunnel, and say "
            "--insecure if the network is yours"
        )
        raise InvalidField("listen", reason)


def _worker_environment(
    engine: str | None, image_seconds: float | None, jitter: float | None, slots: str | None
) -> dict[str, str]:
    """Return options of a worker as the settings it reads."""
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    if engine not in (None, "torch", "simulated"):
        raise InvalidField("engine", f"should be torch or simulated, got {engine!r}")
    if slots not in (None, "auto") and not (slots.isdecimal() and 1 <= int(slots) <= 256):
        raise InvalidField("slots", f"should be auto or 1 to 256, got {slots!r}")
    chosen = {
        "LATENTFARM_ENGINE": engine,
        "LATENTFARM_IMAGE_SECONDS": None if image_seconds is None else str(image_seconds),
        "LATENTFARM_JITTER": None if jitter is None else str(jitter),
        "LATENTFARM_SLOTS": None if slots == "auto" else slots,
    }
    return {name: value for name, value in chosen.items() if value is not None}


class _StopRequest:
    """Becomes true at the first SIGTERM or Ctrl-C, so that the farm stops in order."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self.requested = True


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the pictures go.")] = Path("latentfarm-demo"),
) -> None:
    """From nothing to pictures: a farm of one worker, a job with and without embeddings, a contact sheet."""
    from latentfarm.embedded.local import require_extras  # noqa: PLC0415

    require_extras()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a polite kill leaves nothing behind
    from latentfarm.demo import run_demo  # noqa: PLC0415 - needs the extra

    run_demo(output)


def worker(  # noqa: PLR0917 - typer turns each into an option
    checkpoints: Annotated[
        str, typer.Option("--checkpoints", "--models", help="Checkpoints to serve, separated by commas; all if empty.")
    ] = "",
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:N or mps; several with commas, a worker on each.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Workers on each device.")] = 1,
    slots: Slots = None,
    lanes: Annotated[str | None, typer.Option(help="interactive, batch, or both.", show_default=False)] = None,
    tags: Annotated[
        str | None, typer.Option(help="What jobs may require, such as nvlink,memory:24.", show_default=False)
    ] = None,
    embeddings_dir: Annotated[
        Path | None,
        typer.Option("--embeddings-dir", help="Folder like A1111's to watch for embeddings.", show_default=False),
    ] = None,
    engine: Engine = None,
    image_seconds: ImageSeconds = None,
    jitter: Jitter = None,
    s3: Annotated[bool, typer.Option("--s3/--no-s3", help="Whether simulated workers store pictures.")] = True,
    join: Annotated[
        str | None, typer.Option(help="Token of 'latentfarm up --listen', or @FILE that holds it.", show_default=False)
    ] = None,
    insecure: Insecure = False,
    data: Data = None,
) -> None:
    """Run workers until SIGTERM or Ctrl-C; a second signal hurries. A worker restarts when its device dies.

    Examples:

        latentfarm worker --device cuda:0,cuda:1 --checkpoints demo

        latentfarm worker --embeddings-dir ~/stable-diffusion-webui/embeddings

        latentfarm worker --join @join-token --insecure

        latentfarm worker --engine simulated --image-seconds 1.0 --jitter 0.2 --workers 32
    """
    from latentfarm_shared.errors import MissingExtra  # noqa: PLC0415
    from latentfarm_shared.settings import without_secrets_of_producers  # noqa: PLC0415 - keeps --help fast

    if engine != "simulated" and (find_spec("torch") is None or find_spec("diffusers") is None):
        raise MissingExtra("worker", "a worker")
    command = [sys.executable, "-m", "latentfarm_worker", "--models", checkpoints, "--workers", str(workers)]
    command += ["--devices", device] if device else []
    command += ["--data", str(data)] if data else []
    chosen = {
        "LATENTFARM_EMBEDDINGS_DIR": str(embeddings_dir.absolute()) if embeddings_dir else None,
        "LATENTFARM_LANES": lanes,
        "LATENTFARM_TAGS": tags,
        "LATENTFARM_SIMULATE_S3": None if s3 else "false",
        "LATENTFARM_JOIN": _token(join, insecure=insecure) if join else None,
    }
    environ = {name: value for name, value in chosen.items() if value}
    environ |= _worker_environment(engine, image_seconds, jitter, slots)
    os.execve(sys.executable, command, without_secrets_of_producers() | environ)


def _token(join: str, *, insecure: bool) -> str:
    """Return a token that may be used.

    Raises:
        BadSettings: it is none.
        InvalidField: it leads to another machine without TLS, and that was not allowed.
    """
    from latentfarm_shared.settings import FarmFile  # noqa: PLC0415

    token = Path(join[1:]).read_text().strip() if join.startswith("@") else join
    farm = FarmFile.from_token(token)
    if not farm.is_local and not farm.redis_url.startswith("rediss://"):
        _refuse_plain("the farm's address", insecure=insecure)
    return token


def doctor(data: Data = None, as_json: Json = False) -> None:
    """Look at every part of the farm and say what to do about each trouble. Exit code 1 if something does not work.

    Examples:

        latentfarm doctor

        latentfarm doctor --json --data /srv/latentfarm
    """
    from latentfarm_shared.settings import Settings  # noqa: PLC0415

    from latentfarm.doctor import examine  # noqa: PLC0415 - keeps --help fast
    from latentfarm.farm import DirectFarm  # noqa: PLC0415

    found = list(examine(DirectFarm(Settings.load(data))))
    if as_json:
        show([finding.model_dump() for finding in found], as_json=True)
    else:
        signs = {"ok": "ok  ", "warning": "warn", "bad": "BAD "}
        for finding in found:
            advice = f"\n      → {finding.advice}" if finding.advice else ""
            typer.echo(f"{signs[finding.verdict]}  {finding.part}: {finding.message}{advice}")
    if any(finding.verdict == "bad" for finding in found):
        raise typer.Exit(1)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default=False)] = None,
    data: Data = None,
) -> None:
    """Serve the HTTP API; its description is at /docs. Without API keys it listens on this machine alone.

    Examples:

        latentfarm serve --port 8188

        latentfarm keys create alice && latentfarm serve --host 0.0.0.0
    """
    from latentfarm_shared.errors import MissingExtra  # noqa: PLC0415

    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise MissingExtra("api", "the HTTP API")
    from latentfarm.api.serving import serve as run  # noqa: PLC0415 - only in the extra
    from latentfarm.farm import DirectFarm  # noqa: PLC0415

    farm = DirectFarm.from_env(data)
    settings = farm.settings
    run(farm, host or settings.api_host, settings.api_port if port is None else port)
