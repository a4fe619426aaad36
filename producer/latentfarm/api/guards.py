"""What stands before every route: request ids, security headers, and whose pages may call."""

from __future__ import annotations

import ipaddress
import json
import re
import secrets
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from latentfarm_shared.logs import log
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentfarm.api.problems import MEDIA, Problem

_ID = re.compile(r"[\w.:-]{1,128}")
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
QUIET = ("/healthz", "/readyz")


class Guard:
    """Gives requests an id, answers with security headers, and refuses pages of other origins.

    A browser that is led here by another site's page, or under another site's name, carries that name: in `Origin`, or in
    `Host` where this server is reached under names it does not have.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str], *, is_open: bool) -> None:
        """Stand before an app; `is_open` says that it needs no key, so names other than this machine's are refused."""
        self._app, self._origins, self._is_open = app, frozenset(origins), is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        began, status, too_large = time.perf_counter(), 0, False

        async def answer(message: Message) -> None:
            nonlocal status, too_large
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                if status == 413 and out.get("content-type", "").startswith("text/plain"):
                    too_large = True  # which the framework says in its own words
                    out["content-type"], out["content-length"] = MEDIA, str(len(_too_large(request_id)))
                out["x-request-id"] = request_id
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
            elif too_large:
                message = {"type": "http.response.body", "body": _too_large(request_id)}
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(answer, refusal, request_id)
        else:
            await self._app(scope, receive, answer)
        if scope["path"] not in QUIET:
            took = round((time.perf_counter() - began) * 1000, 1)
            log.info("request", method=scope["method"], path=_template(scope), status=status, ms=took, id=request_id)

    def _refusal(self, scope: Scope, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if self._is_open and not _is_here(host):
            return f"this farm has no API keys and answers to this machine's own names alone, not to {host[:100]!r}"
        origin = headers.get("origin")
        if origin is None or scope["method"] in SAFE or origin in self._origins:
            return None
        if urlsplit(origin).netloc == host and host:
            return None
        return f"pages of {origin[:100]!r} may not call this farm; LATENTFARM_API_ORIGINS lists those that may"


def _is_here(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _template(scope: Scope) -> str:
    """Return the path with names in place of what they stand for, so that ids and names of embeddings stay out of logs."""
    if scope.get("route") is None:
        return "(none)"
    path: str = scope["path"]
    for name, value in scope.get("path_params", {}).items():
        path = path.replace(f"/{value}", f"/{{{name}}}", 1)
    return path


def _problem(status: int, code: str, title: str, request_id: str) -> bytes:
    problem = Problem(title=title, status=status, code=code, request_id=request_id)
    return json.dumps(problem.model_dump(exclude_none=True)).encode()


def _too_large(request_id: str) -> bytes:
    return _problem(413, "TOO_LARGE", "the body is larger than this address takes", request_id)


async def _refuse(send: Send, reason: str, request_id: str) -> None:
    body = _problem(403, "NOT_ALLOWED", reason, request_id)
    headers = [(b"content-type", MEDIA.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
