"""Why a job's images wait: causes that a program can read, each with a count and what would help."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

from latentfarm_shared.ledger import JobStatus, Ledger, WorkerStatus
from latentfarm_shared.ledger.queues import lacking, part_name
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import JobSpec
from pydantic import BaseModel, ConfigDict

AHEAD = 200
SOON_S = 600.0
Code = Literal[
    "paused", "needs_approval", "quota", "no_worker", "no_worker_has_checkpoint", "no_worker_has_tags", "workers_drained",
    "worker_set_aside", "waiting_behind", "suspects", "failed", "expires_soon",
]  # fmt: skip


class Cause(BaseModel):
    """One reason: `count` images, jobs or workers, as `message` says."""

    model_config = ConfigDict(frozen=True)

    code: Code
    count: int
    message: str


def causes(ledger: Ledger, job_id: str) -> list[Cause]:
    """Return why images of a job wait, or are missing from it.

    Raises:
        UnknownName: there is no such job.
    """
    status = ledger.status(job_id)
    spec = ledger.spec(job_id)
    found: list[Cause] = []
    if not status.is_final:
        found += _held(status, ledger.deadline(job_id))
        workers = ledger.workers()
        for lock in ledger.locks(job_id):
            found += _unserved(spec, lock, workers, ledger)
        found += _behind(ledger, status)
    if status.counts["failed"]:
        failed = status.counts["failed"]
        found.append(Cause(code="failed", count=failed, message=f"{failed} images failed; 'jobs retry' tries again"))
    return found


def _held(status: JobStatus, deadline: float | None) -> Iterator[Cause]:
    queued = status.counts["queued"]
    if status.state == "paused" and status.reason == "owner":
        yield Cause(code="paused", count=queued, message="the job is paused; 'jobs resume' goes on")
    if status.state == "paused" and status.reason == "approval":
        message = f"{queued} images wait for approval; look at the first and run 'jobs approve'"
        yield Cause(code="needs_approval", count=queued, message=message)
    if deadline is not None:
        left = deadline - time.time()
        if left < SOON_S:
            yield Cause(code="expires_soon", count=queued, message=f"the job expires in {max(0, left):.0f} s")


def _unserved(spec: JobSpec, lock: Lock, workers: list[WorkerStatus], ledger: Ledger) -> Iterator[Cause]:
    """Yield why no live worker takes images of one of the job's checkpoints."""
    queue = f"{spec.lane}:{part_name(lock.checkpoint.hash, spec.requires)}"
    able = [worker for worker in workers if queue in worker.queues]
    name = lock.checkpoint.name
    if any(not worker.draining for worker in able):
        return
    for station, story in ledger.aside().items():
        yield Cause(code="worker_set_aside", count=1, message=f"worker {station} is set aside: {story}")
    if able:
        yield Cause(code="workers_drained", count=len(able), message="every worker that could is drained")
    elif not workers:
        yield Cause(code="no_worker", count=0, message="no worker is alive; start one with 'latentfarm worker'")
    elif not any(lock.checkpoint.hash in worker.checkpoints for worker in workers):
        message = f"none of {len(workers)} workers has checkpoint {name!r}; start one with --checkpoints {name}"
        yield Cause(code="no_worker_has_checkpoint", count=len(workers), message=message)
    else:
        missing = [lacking(w.tags, spec.requires) for w in workers if lock.checkpoint.hash in w.checkpoints]
        least = min(missing, key=len) or list(spec.requires)
        message = f"no worker with checkpoint {name!r} in lane {spec.lane} has {', '.join(least) or 'this lane'}"
        yield Cause(code="no_worker_has_tags", count=len(missing), message=message)


def _behind(ledger: Ledger, status: JobStatus) -> Iterator[Cause]:
    """Yield what goes first: the owner's own limit, and images of jobs before this one."""
    if not status.counts["queued"]:
        return
    usage, limits = ledger.usage(status.owner), ledger.limits(status.owner)
    most = limits.running or ledger.limits(None).running
    if most is not None and usage["running"] >= most:
        message = f"{usage['running']} of your images run and {most} may"
        yield Cause(code="quota", count=usage["running"], message=message)
    others = [s for s in ledger.jobs(AHEAD) if s.id != status.id and s.lane == status.lane and s.state == "running"]
    before = [
        s for s in others if s.owner != status.owner or (-s.priority, s.created) < (-status.priority, status.created)
    ]
    ahead = sum(s.counts["queued"] + s.counts["running"] for s in before)
    if ahead and not status.counts["running"]:
        message = f"{ahead} images of {len(before)} jobs share the workers or go first"
        yield Cause(code="waiting_behind", count=ahead, message=message)
