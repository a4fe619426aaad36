"""Requests that wait for a job: answered once, and whoever was cut off finds the same job when they ask again."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from latentfarm_shared.errors import FarmError, UnknownName
from latentfarm_shared.ledger import JobStatus
from latentfarm_shared.ledger.ledger import translated
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from latentfarm.api.callers import Caller
from latentfarm.api.watch import Watch
from latentfarm.farm import DirectFarm
from latentfarm.jobs import Job

KEPT_S = 1800
LOOK_S = 0.5


class Later(BaseModel):
    """A job that goes on, and where to ask for it."""

    job_id: str
    url: str


LATER: dict[int | str, dict[str, Any]] = {202: {"model": Later, "description": "The job goes on."}}


def later(job: Job) -> Response:
    """Answer that a job goes on."""
    story = Later(job_id=job.id, url=f"/api/v1/jobs/{job.id}")
    return Response(story.model_dump_json(), 202, {"location": story.url}, "application/json")


class Gone(Exception):
    """Whoever asked has hung up."""


@dataclass
class Repeats:
    """Tells a request that is sent again from one that is sent twice.

    Clients that time out send the same request again, and have no way to say so. A job whose answer nobody received is
    theirs; one whose answer is still awaited belongs to whoever waits.
    """

    farm: DirectFarm
    _waiting: set[str] = field(default_factory=set)

    @asynccontextmanager
    async def held(
        self, caller: Caller, digest: str, submit: Callable[[str], Job], *, is_retry: bool = False
    ) -> AsyncIterator[Job]:
        """Yield the job of a request: the one that was left unanswered before, or a new one of an id chosen here.

        It is remembered before it is submitted, and forgotten once it is over and somebody was told, of an error too.
        `is_retry` says that the client knows it asks again.
        """
        key, holder = f"lf:api:asked:{caller.id}:{digest}", secrets.token_hex(8)
        self._waiting.add(holder)
        job = None
        try:
            job = await run_in_threadpool(self._take, caller, key, holder, submit, is_retry)
            yield job
            await run_in_threadpool(self._drop, key, holder, job)
        except FarmError:
            await run_in_threadpool(self._drop, key, holder, job)
            raise
        finally:
            self._waiting.discard(holder)

    def _take(self, caller: Caller, key: str, holder: str, submit: Callable[[str], Job], is_retry: bool) -> Job:
        redis, job_id = self.farm.ledger.redis, secrets.token_hex(8)
        with translated():
            found = None if redis.set(key, f"{job_id}:{holder}", ex=KEPT_S, nx=True) else redis.get(key)
        if found is None:
            return submit(job_id)
        known, _, before = found.decode().partition(":")
        if not is_retry and before in self._waiting:
            return submit(job_id)  # somebody asks for the same twice, and waits for both
        with translated():
            redis.set(key, f"{known}:{holder}", ex=KEPT_S)
        with suppress(UnknownName):
            return caller.farm.own_job(known)
        return submit(known)  # whoever asked before died on the way

    def _drop(self, key: str, holder: str, job: Job | None) -> None:
        with translated():
            found = self.farm.ledger.redis.get(key)
        if found is None or not found.decode().endswith(f":{holder}"):
            return
        if job is None or job.status().is_final:
            with translated():
                self.farm.ledger.redis.delete(key)


async def waited(request: Request, watch: Watch, job: str, timeout_s: float) -> JobStatus:
    """Wait for a job on behalf of a client that may hang up.

    Raises:
        Gone: it did.
    """
    done = asyncio.ensure_future(watch.final(job, timeout_s))
    try:
        while not done.done():
            await asyncio.wait([done], timeout=LOOK_S)
            if not done.done() and await request.is_disconnected():
                raise Gone
        if await request.is_disconnected():
            raise Gone
        return done.result()
    finally:
        done.cancel()
