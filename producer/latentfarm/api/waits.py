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
from latentfarm_shared.errors import UnknownName
from latentfarm_shared.ledger import JobStatus
from latentfarm_shared.ledger.ledger import translated
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from latentfarm.api.callers import Caller
from latentfarm.api.watch import Watch
from latentfarm.farm import Farm
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

    farm: Farm
    _waiting: set[str] = field(default_factory=set)

    @asynccontextmanager
    async def held(
        self, caller: Caller, digest: str, submit: Callable[[], Job], *, is_retry: bool = False
    ) -> AsyncIterator[Job]:
        """Yield the job of a request: the one that was left unanswered before, or a new one.

        Leaving without an error says that it was answered. `is_retry` says that the client knows it asks again.
        """
        key, holder = f"lf:api:asked:{caller.id}:{digest}", secrets.token_hex(8)
        self._waiting.add(holder)
        try:
            yield await run_in_threadpool(self._take, key, holder, submit, is_retry)
            await run_in_threadpool(self._drop, key, holder)
        finally:
            self._waiting.discard(holder)

    def _take(self, key: str, holder: str, submit: Callable[[], Job], is_retry: bool) -> Job:
        redis = self.farm.ledger.redis
        with translated():
            found = redis.get(key)
        if found is not None:
            job_id, _, before = found.decode().partition(":")
            if is_retry or before not in self._waiting:
                with translated():
                    redis.set(key, f"{job_id}:{holder}", ex=KEPT_S)
                with suppress(UnknownName):  # it was deleted since
                    return self.farm.own_job(job_id, anybodys=True)
        job = submit()
        with translated():
            redis.set(key, f"{job.id}:{holder}", ex=KEPT_S)
        return job

    def _drop(self, key: str, holder: str) -> None:
        with translated():
            found = self.farm.ledger.redis.get(key)
            if found is not None and found.decode().endswith(f":{holder}"):
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
