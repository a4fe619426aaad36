"""Watching jobs for many requests at once: one look at Redis a tick for all that anybody waits for in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from latentfarm_shared.errors import FarmError, Unavailable, UnknownName
from latentfarm_shared.ledger import JobEvent, JobStatus, Ledger
from latentfarm_shared.logs import log
from starlette.concurrency import run_in_threadpool

TICK_S = 0.1
PAGE = 1000


@dataclass(eq=False)
class News:
    """What happened to a job since the version `after`, and where it stands behind it; shared by all who saw as much.

    `encoded` is how a stream tells it, once one has.
    """

    after: int
    events: tuple[JobEvent, ...]
    status: JobStatus
    encoded: bytes = b""


class Tail:
    """A job that somebody watches: what happened since, and when something does."""

    def __init__(self, job: str, status: JobStatus) -> None:
        """Begin at a status."""
        self.job, self.status = job, status
        self.watchers, self.is_gone = 0, False
        self.events: list[JobEvent] = []
        self.begun = status.version
        self._turn = asyncio.Event()
        self._news: dict[int, News] = {}

    def move(self, status: JobStatus | None, events: list[JobEvent]) -> None:
        """Note what happened and wake who waits."""
        self.status = status or self.status
        self.events += events
        self._news = {}
        if len(self.events) > 2 * PAGE:
            del self.events[:PAGE]
            self.begun = self.events[0].version - 1
        self._turn.set()
        self._turn = asyncio.Event()

    def news(self, after: int) -> News | None:
        """Return what happened since a version, None if that is not remembered."""
        last = self.status.version
        if after not in self._news:
            if self.begun > after < last:
                return None
            found = tuple(event for event in self.events if after < event.version <= last)
            self._news[after] = News(after, found, self.status)
        return self._news[after]

    async def moved(self, timeout_s: float) -> None:
        """Wait until something happens, or for so long."""
        turn = self._turn
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await turn.wait()


class Watch:
    """Follows jobs. Belongs to one event loop."""

    def __init__(self, ledger: Ledger) -> None:
        """Watch nothing yet."""
        self._ledger = ledger
        self._tails: dict[str, Tail] = {}

    async def run(self) -> None:
        """Look after all watched jobs, without end."""
        while True:
            await asyncio.sleep(TICK_S)
            if self._tails:
                try:
                    await self._look()
                except Exception as error:  # noqa: BLE001 - whatever it is, others wait for their jobs
                    log.warning("jobs are not watched for a moment", error=type(error).__name__)
                    await asyncio.sleep(1)

    async def _look(self) -> None:
        jobs = list(self._tails)
        versions = await run_in_threadpool(self._ledger.versions, jobs)
        for job, version in zip(jobs, versions, strict=True):
            tail = self._tails.get(job)
            if tail is not None and not tail.is_gone and version != tail.status.version:
                await self._catch_up(tail)

    async def _catch_up(self, tail: Tail) -> None:
        try:
            status = await run_in_threadpool(self._ledger.status, tail.job)
            events = await run_in_threadpool(self._ledger.events, tail.job, tail.status.version, 2 * PAGE)
        except Unavailable:
            raise
        except FarmError:  # it was deleted
            tail.is_gone = True
            tail.move(None, [])
            return
        tail.move(status, [event for event in events if event.version <= status.version])

    async def tail(self, job: str) -> Tail:
        """Return a job's tail, which moves while it is `followed`.

        Raises:
            UnknownName: there is no such job.
        """
        known = self._tails.get(job)
        if known is not None:
            return known
        status = await run_in_threadpool(self._ledger.status, job)
        return self._tails.get(job) or Tail(job, status)

    @contextmanager
    def followed(self, tail: Tail) -> Iterator[None]:
        """Follow a job for as long as the context lasts."""
        tail = self._tails.setdefault(tail.job, tail)
        tail.watchers += 1
        try:
            yield
        finally:
            tail.watchers -= 1
            if not tail.watchers:
                self._tails.pop(tail.job, None)

    async def final(self, job: str, timeout_s: float) -> JobStatus:
        """Wait until a job is final, or for so long; return where it stands.

        Raises:
            UnknownName: there is no such job.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        tail = await self.tail(job)
        with self.followed(tail):
            tail = self._tails[job]
            while not tail.status.is_final and not tail.is_gone and (left := until - loop.time()) > 0:
                await tail.moved(left)
        if tail.is_gone:
            raise UnknownName("job", job)
        return tail.status

    async def news(self, job: str, after: int, idle_s: float) -> AsyncIterator[News | None]:
        """Yield what happened to a job since a version, as it happens; None after `idle_s` of nothing.

        The first may be without events. It ends behind the status of a final job.

        Raises:
            UnknownName: there is no such job.
        """
        tail = await self.tail(job)
        with self.followed(tail):
            tail = self._tails[job]
            is_told = False
            while True:
                new = tail.news(after) or await self._older(tail, after)
                status = new.status
                if new.events or not is_told:
                    is_told = True
                    yield new
                if new.events:
                    after = new.events[-1].version
                if tail.is_gone or (status.is_final and after >= status.version):
                    return
                if tail.status is status:
                    await tail.moved(idle_s)
                    if tail.status is status:
                        yield None

    async def _older(self, tail: Tail, after: int) -> News:
        """Return what is not remembered here any more from Redis."""
        status = tail.status
        found = await run_in_threadpool(self._ledger.events, tail.job, after, 2 * PAGE)
        return News(after, tuple(event for event in found if event.version <= status.version), status)
