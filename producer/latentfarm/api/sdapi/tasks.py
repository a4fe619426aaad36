"""What a caller has under way through A1111's API: progress, interrupt and the model in use are each key's own."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from latentfarm_shared.errors import UnknownName
from latentfarm_shared.ledger import JobStatus
from latentfarm_shared.ledger.ledger import translated

from latentfarm.api.callers import Caller
from latentfarm.jobs import Job

MOST, KEPT_S = 1000, 86400
PREFIX = "sdapi:"


class Tasks:
    """A caller's tasks: jobs they submitted through A1111's API, the oldest first."""

    def __init__(self, caller: Caller) -> None:
        """Look at this caller's."""
        self._caller, self._redis = caller, caller.farm.ledger.redis
        self._key, self._options = f"lf:sdapi:{caller.id}:jobs", f"lf:sdapi:{caller.id}:options"

    def note(self, job: Job) -> None:
        """Remember a job until it is over."""
        with translated(), self._redis.pipeline() as pipe:
            pipe.zadd(self._key, {job.id: time.time()}, nx=True)
            pipe.zremrangebyrank(self._key, 0, -MOST - 1)
            pipe.expire(self._key, KEPT_S)
            pipe.execute()

    def unfinished(self) -> list[JobStatus]:
        """Return where the jobs stand that are not over, the oldest first."""
        with translated():
            names = [name.decode() for name in self._redis.zrange(self._key, 0, -1)]
        known: dict[str, JobStatus] = {}
        for name in names:
            with suppress(UnknownName):
                known[name] = self._caller.farm.ledger.status(name)
        found = [status for status in known.values() if not status.is_final]
        over = set(names) - {status.id for status in found}
        if over:
            with translated():
                self._redis.zrem(self._key, *over)
        return found

    def find(self, task: str) -> Job | None:
        """Return the job of a task's id, None if there is none."""
        farm = self._caller.farm
        known = farm.ledger.submitted(farm.owner, f"{PREFIX}{task}")
        return None if known is None else farm.own_job(known)

    def options(self) -> dict[str, Any]:
        """Return the settings that this caller changed."""
        with translated():
            found = self._redis.get(self._options)
        return dict(json.loads(found)) if found else {}

    def set_options(self, changed: dict[str, Any]) -> None:
        """Keep settings for this caller."""
        with translated():
            self._redis.set(self._options, json.dumps(self.options() | changed))


def task_of(status: JobStatus, job: Job) -> str:
    """Return the task's id that a job goes by."""
    return (job.spec.key or status.id).removeprefix(PREFIX)


def fraction(status: JobStatus, flights: dict[int, dict[str, Any]]) -> float:
    """Return how much of a job is done, 0 to 1; of images in flight, as much as their steps say."""
    inner = sum(float(f.get("step", 0)) / max(1.0, float(f.get("steps", 0) or 1)) for f in flights.values())
    return min(1.0, (status.finished + 0.95 * min(inner, len(flights))) / max(1, status.total))
