"""What stands before every route: request ids, security headers, and whose pages may call."""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import lru_cache
from urllib.parse import urlsplit

from latentfarm_shared.logs import log
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
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
SHARED_HEADERS = HEADERS | {"cross-origin-resource-policy": "cross-origin"}
QUIET = ("/healthz", "/readyz")
KEYED = ("/api/", "/sdapi/", "/internal/", "/agent-scheduler/", "/v1/")


class _Answer:
    """Sends an answer with a request's id and security headers, and remembers its status."""

    def __init__(self, send: Send, request_id: str, *, is_shared: bool) -> None:
        self._send, self.request_id, self.status = send, request_id, 0
        self._headers = SHARED_HEADERS if is_shared else HEADERS
        self._too_large = b""

    async def __call__(self, message: Message) -> None:
        """Send a part of it."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            out = MutableHeaders(scope=message)
            if self.status == 413 and out.get("content-type", "").startswith("text/plain"):
                self._too_large = _too_large(self.request_id)  # which the framework says in its own words
                out["content-type"], out["content-length"] = MEDIA, str(len(self._too_large))
            out["x-request-id"] = self.request_id
            for name, value in self._headers.items():
                out.setdefault(name, value)
        elif self._too_large:
            message = {"type": "http.response.body", "body": self._too_large}
        await self._send(message)


class Guard:
    """Gives requests an id, answers with security headers, and refuses pages of other origins.

    A browser that is led here by another site's page, or under another site's name, carries that name: in `Origin`, or in
    `Host` where this server is reached under names it does not have.
    """

    def __init__(
        self,
        app: ASGIApp,
        origins: Collection[str],
        admit: Callable[[Request], Awaitable[ASGIApp | None]],
        *,
        is_open: bool,
    ) -> None:
        """Stand before an app; `is_open` says that it needs no key, so names other than this machine's are refused.

        `admit` answers those whose key is not good, before anything of what they send is read.
        """
        self._app, self._origins, self._is_open, self._let_in = app, frozenset(origins), is_open, admit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        began, answer = time.perf_counter(), _Answer(send, request_id, is_shared=scope["path"].startswith("/images/"))
        try:
            await self._pass_on(scope, receive, answer, self._refusal(scope, headers))
        except Exception as error:
            if not answer.status:  # otherwise it was told, and what it says is not for logs
                raise
            log.error("request broke", error=type(error).__name__, id=request_id)
        finally:
            if scope["path"] not in QUIET:
                _tell(scope, answer, time.perf_counter() - began)

    async def _pass_on(self, scope: Scope, receive: Receive, answer: _Answer, refusal: str | None) -> None:
        if refusal is not None:
            await _refuse(answer, refusal, answer.request_id)
        elif (denied := await self._admit(scope)) is not None:
            await denied(scope, receive, answer)
        else:
            await self._app(scope, receive, answer)

    async def _admit(self, scope: Scope) -> ASGIApp | None:
        if scope["method"] == "OPTIONS" or not scope["path"].startswith(KEYED):
            return None
        return await self._let_in(Request(scope))

    def _refusal(self, scope: Scope, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if self._is_open and not _is_here(host):
            return f"this farm has no API keys and answers to this machine's own names alone, not to {host[:100]!r}"
        origin = headers.get("origin")
        if origin is None or scope["method"] in SAFE or origin in self._origins:
            return None
        with suppress(ValueError):
            if urlsplit(origin).netloc == host and host:
                return None
        return f"pages of {origin[:100]!r} may not call this farm; LATENTFARM_API_ORIGINS lists those that may"


def _tell(scope: Scope, answer: _Answer, seconds: float) -> None:
    """Log a request; what only looked, and was answered, is for those who debug: clients poll all the time."""
    is_look = scope["method"] in SAFE and 0 < answer.status < 400
    if is_look and not logging.getLogger("latentfarm").isEnabledFor(logging.DEBUG):
        return
    tell = log.debug if is_look else log.info
    ms, path = round(seconds * 1000, 1), _template(scope)
    tell("request", method=scope["method"], path=path, status=answer.status, ms=ms, id=answer.request_id)


@lru_cache(256)
def _is_here(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _template(scope: Scope) -> str:
    """Return the path with names in place of what they stand for, so that ids and names of embeddings stay out of logs."""
    if scope.get("route") is None:
        return "(none)"
    names = {str(value): name for name, value in scope.get("path_params", {}).items()}
    parts: list[str] = [f"{{{names[part]}}}" if part in names else part for part in scope["path"].split("/")]
    path = "/".join(parts)
    for value, name in names.items():
        if "/" in value:  # a parameter that takes the rest of the path
            path = path.replace(value, f"{{{name}}}")
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
