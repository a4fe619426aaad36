"""An S3 server in front of a real one that fails on demand: down, 500, 503, slow, or refusing conditions."""

from __future__ import annotations

import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

Mode = Literal["ok", "down", "500", "503", "slow", "no conditions", "random"]
FAULTS: tuple[Mode, ...] = ("down", "500", "503", "slow", "no conditions")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding"}


class FaultyS3:
    """Use as a context; `mode` may change at any time. `delay_s` is how long a slow answer takes."""

    def __init__(self, target: str, delay_s: float = 1.0) -> None:
        self.mode: Mode = "ok"
        self.delay_s = delay_s
        self.failed = 0
        address = urlsplit(target)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                mode = outer.mode if outer.mode != "random" else random.choice((*FAULTS, "ok", "ok", "ok"))
                if outer.fails(self, mode):
                    return
                upstream = http.client.HTTPConnection(address.hostname or "", address.port or 80, timeout=60)
                try:
                    upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                    for name, value in self.headers.items():
                        upstream.putheader(name, value)
                    upstream.endheaders(body or None)
                    found = upstream.getresponse()
                    data = found.read()
                    self.send_response_only(found.status, found.reason)
                    for name, value in found.getheaders():
                        if name.lower() not in HOP_BY_HOP | {"content-length"}:
                            self.send_header(name, value)
                    length = found.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                    self.send_header("Content-Length", length or "0")
                    self.end_headers()
                    self.wfile.write(data)
                finally:
                    upstream.close()

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 - the names the library calls

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fails(self, request: BaseHTTPRequestHandler, mode: Mode) -> bool:
        """Answer a request as the mode says; false if it is to pass."""
        if mode == "slow":
            time.sleep(self.delay_s * random.random() * 2)
        if mode in ("ok", "slow") or (mode == "no conditions" and "If-None-Match" not in request.headers):
            return False
        self.failed += 1
        request.close_connection = True
        if mode != "down":
            status, code = (501, "NotImplemented") if mode == "no conditions" else (int(mode), "InternalError")
            text = f"<Error><Code>{code}</Code><Message>on demand</Message></Error>".encode()
            request.send_response_only(status)
            request.send_header("Content-Type", "application/xml")
            request.send_header("Content-Length", str(len(text)))
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(text)
        return True

    def __enter__(self) -> Self:
        """Listen."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Close."""
        self._server.shutdown()
        self._server.server_close()
