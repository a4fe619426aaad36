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
MOST, MOST_BYTES, MOST_KEY = 2000, 32 * 1024, 1024
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

    @property
    def is_kept(self) -> bool:
        """Tell whether others may have it, too."""
        return self.start["status"] in (200, 304) and len(self.body) <= MOST_BYTES

    async def send(self, send: Send) -> None:
        """Send it to somebody."""
        await send({**self.start, "headers": list(self.start["headers"])})
        await send({"type": "http.response.body", "body": self.body})


class _Collector:
    """Takes an answer in whole, so that whoever reads slowly holds nobody else up."""

    def __init__(self) -> None:
        self._start: Message = {}
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = dict(message)
        else:
            self._parts.append(message.get("body", b""))

    def answer(self, stamp: Stamp) -> _Held | None:
        return _Held(stamp, self._start, b"".join(self._parts)) if self._start else None


class Polls:
    """Stands before the routes of a job's status, images and history, behind what lets callers in."""

    def __init__(self, app: ASGIApp, ledger: Ledger) -> None:
        """Stand before an app."""
        self._app, self._looks = app, Looks(ledger)
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        self._making: dict[tuple[Key, Stamp], asyncio.Event] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a poll, or pass the request on."""
        job, key, stamp = _job_of(scope), _key_of(scope), None
        if job is not None and key is not None:
            with suppress(Unavailable):  # which the route says in its own words
                stamp = await self._looks.stamp(job)
        if stamp is None or key is None:
            await self._app(scope, receive, send)
            return
        if (made := self._making.get((key, stamp))) is not None:
            await made.wait()  # somebody asked the same a moment ago
        held = self._held.get(key)
        if held is None or held.stamp != stamp:
            await self._make(scope, receive, send, key, stamp)
        else:
            await held.send(send)

    async def _make(self, scope: Scope, receive: Receive, send: Send, key: Key, stamp: Stamp) -> None:
        """Have an answer made, keep it and send it; what a bug is answered with is sent, too."""
        made = self._making.setdefault((key, stamp), asyncio.Event())
        collector = _Collector()
        try:
            await self._app(scope, receive, collector)
            held = collector.answer(stamp)
            if held is not None:
                self._keep(key, held)
        finally:
            self._making.pop((key, stamp), None)
            made.set()
            held = collector.answer(stamp)
            if held is not None:
                await held.send(send)

    def _keep(self, key: Key, held: _Held) -> None:
        self._held.pop(key, None)
        if held.is_kept:
            self._held[key] = held
            if len(self._held) > MOST:
                self._held.popitem(last=False)


def _job_of(scope: Scope) -> str | None:
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    found = _POLLED.fullmatch(scope["path"])
    return None if found is None else found[1]


def _key_of(scope: Scope) -> Key | None:
    """Return what an answer depends on beside the job: who asks, and for what; None where that is too much to remember."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    caller: Any = scope.get("state", {}).get("caller")
    varying = tuple(value for name, value in scope["headers"] if name in VARYING for value in (name, value))
    if caller is None or len(scope["query_string"]) + sum(map(len, varying)) > MOST_KEY:
        return None
    return caller.id, scope["path"], scope["query_string"], varying
