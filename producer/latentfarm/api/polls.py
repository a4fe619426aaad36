"""Polls of jobs that did not change since are answered from memory, as they were answered before.

Clients ask where a job stands far more often than it moves. One look at Redis serves everybody who asked before it, so what
is told is never older than the question; only who asks first after a change has the answer made anew.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from latentfarm_shared.errors import Unavailable
from latentfarm_shared.ledger import Ledger, Stamp
from starlette.types import ASGIApp, Message, Receive, Scope, Send

GATHER_S = 0.005
MOST, MOST_BYTES = 2000, 32 * 1024
VARYING = (b"if-none-match", b"origin")
_POLLED = re.compile(r"/api/v1/jobs/([\w-]{1,64})(?:/images/\d{1,6}|/history)?")

Key = tuple[str, str, bytes, tuple[bytes, ...]]


class Looks:
    """Looks at Redis for all who ask how jobs stand: at once for the first, then for those who gathered meanwhile."""

    def __init__(self, ledger: Ledger) -> None:
        """Look at nothing yet; a thread of its own is not held up by slow requests."""
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, "polls")
        self._asked: dict[str, asyncio.Future[Stamp | None]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def stamp(self, job: str) -> Stamp | None:
        """Return what changes whenever a job's status does, as of now or later; None of a job that is not there.

        Raises:
            Unavailable: Redis does not answer.
        """
        if job not in self._asked:
            self._asked[job] = asyncio.get_running_loop().create_future()
        answer = self._asked[job]
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(answer)  # whoever hangs up leaves the others theirs

    async def _look(self) -> None:
        try:
            while self._asked:
                asked, self._asked = self._asked, {}
                await self._answer(asked)
                await asyncio.sleep(GATHER_S)
        finally:
            self._looking = None

    async def _answer(self, asked: dict[str, asyncio.Future[Stamp | None]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            stamps = await loop.run_in_executor(self._thread, self._ledger.stamps, list(asked))
        except Exception as error:  # noqa: BLE001 - it is told to those who asked
            for answer in asked.values():
                answer.set_exception(error)
                answer.exception()  # they may have hung up
        else:
            for answer, stamp in zip(asked.values(), stamps, strict=True):
                answer.set_result(stamp)


@dataclass(frozen=True)
class _Held:
    """An answer, and what the job was like before it was made."""

    stamp: Stamp
    start: Message
    body: bytes


class _Recorder:
    """Passes an answer on and remembers it, if it is small."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._is_whole = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = dict(message)
        else:
            self._parts.append(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
        await self._send(message)

    def held(self, stamp: Stamp) -> _Held | None:
        body = b"".join(self._parts)
        if (
            self._start is None
            or not self._is_whole
            or self._start["status"] not in (200, 304)
            or len(body) > MOST_BYTES
        ):
            return None
        return _Held(stamp, self._start, body)


class Polls:
    """Stands before the routes of a job's status, images and history, behind what lets callers in."""

    def __init__(self, app: ASGIApp, ledger: Ledger) -> None:
        """Stand before an app."""
        self._app, self._looks = app, Looks(ledger)
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._making: dict[tuple[Key, Stamp], asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a poll, or pass the request on."""
        job = _job_of(scope)
        stamp = None
        if job is not None:
            with suppress(Unavailable):  # which the route says in its own words
                stamp = await self._looks.stamp(job)
        if stamp is None:
            await self._app(scope, receive, send)
            return
        key = _key_of(scope)
        if (made := self._making.get((key, stamp))) is not None:
            await made.wait()  # somebody asked the same a moment ago
        held = self._held.get(key)
        if held is None or held.stamp != stamp:
            await self._make(scope, receive, send, key, stamp)
            return
        self._held.move_to_end(key)
        await send({**held.start, "headers": list(held.start["headers"])})
        await send({"type": "http.response.body", "body": held.body})

    async def _make(self, scope: Scope, receive: Receive, send: Send, key: Key, stamp: Stamp) -> None:
        """Have an answer made, and keep it."""
        made = self._making.setdefault((key, stamp), asyncio.Event())
        recorder = _Recorder(send)
        try:
            await self._app(scope, receive, recorder)
            self._keep(key, recorder.held(stamp))
        finally:
            self._making.pop((key, stamp), None)
            made.set()

    def _keep(self, key: Key, held: _Held | None) -> None:
        self._held.pop(key, None)
        if held is not None:
            self._held[key] = held
            if len(self._held) > MOST:
                self._held.popitem(last=False)


def _job_of(scope: Scope) -> str | None:
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    found = _POLLED.fullmatch(scope["path"])
    return None if found is None else found[1]


def _key_of(scope: Scope) -> Key:
    """Return what an answer depends on beside the job: who asks, and for what."""
    caller: Any = scope["state"]["caller"]
    headers = dict(scope["headers"])
    return caller.id, scope["path"], scope["query_string"], tuple(headers.get(name, b"") for name in VARYING)
