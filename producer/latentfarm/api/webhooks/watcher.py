"""Events of jobs turned into deliveries. What was seen and what is to be sent are written in one transaction."""

from __future__ import annotations

import time
from typing import Any

from latentfarm_shared.errors import UnknownName
from latentfarm_shared.ledger import JobEvent, JobStatus
from latentfarm_shared.ledger.ledger import translated
from redis import WatchError

from latentfarm.api.webhooks.hooks import CURSORS, Hook, Hooks
from latentfarm.api.webhooks.outbox import KEPT_S, Outbox, delivery_of
from latentfarm.farm import DirectFarm
from latentfarm.views import BASE

TURN_S, PAGE, PAGES = 10.0, 200, 5
WATCHED = "lf:hook:watched"
STARTS_WITHIN_S = 120.0
KINDS = {
    "running": "job.started", "paused": "job.paused", "succeeded": "job.completed", "failed": "job.completed",
    "canceled": "job.completed", "expired": "job.completed", "image succeeded": "job.image", "image failed": "job.image",
}  # fmt: skip


class HookWatcher:
    """Looks for events that somebody wants to hear of; call `step` about once a second, in as many processes as you like."""

    def __init__(self, farm: DirectFarm) -> None:
        """Watch this farm's jobs."""
        self._farm, self._redis = farm, farm.ledger.redis
        self._hooks, self._outbox = Hooks(farm), Outbox(farm)

    def step(self) -> None:
        """Write down what is to be sent.

        Raises:
            Unavailable: Redis does not answer; the next call goes on where this one ended.
        """
        if not self._farm.ledger.take_turn("webhooks", TURN_S):
            return
        try:
            for owner in self._hooks.owners():
                if self._hooks.ls(owner):
                    self._find_jobs(owner)
            with translated():
                watched = {job.decode(): int(seen) for job, seen in self._redis.hgetall(WATCHED).items()}
            versions = self._farm.ledger.versions(list(watched))
            for (job, seen), version in zip(watched.items(), versions, strict=True):
                if version is None:
                    self._forget_unknown(job)
                elif version > seen:
                    self._follow(job, seen)
        finally:
            self._farm.ledger.end_turn("webhooks", 0.1)

    def _find_jobs(self, owner: str) -> None:
        """Begin to watch the jobs an owner submitted since the last look, however they did."""
        with translated():
            seen = int(self._redis.hget(CURSORS, owner) or 0)
            found = self._redis.zrangebyscore(f"lf:jobs:{owner}", f"({seen}", "+inf", 0, PAGE, withscores=True)
            if found:
                with self._redis.pipeline() as pipe:
                    for job, _ in found:
                        pipe.hsetnx(WATCHED, job, 0)
                    pipe.hset(CURSORS, owner, int(found[-1][1]))
                    pipe.execute()

    def _forget_unknown(self, job: str) -> None:
        """Watch a job no more that was deleted, or never came."""
        hooks = self._hooks.ls("", job)
        if not hooks or time.time() - hooks[-1].created > STARTS_WITHIN_S:
            with translated():
                self._redis.hdel(WATCHED, job)
                self._redis.delete(f"lf:hooks:job:{job}")

    def _follow(self, job: str, seen: int) -> None:
        """Write down what is to be sent of what happened to a job since a version."""
        ledger = self._farm.ledger
        for _ in range(PAGES):
            try:
                status = ledger.status(job)
                events = [event for event in ledger.events(job, seen, PAGE) if event.version <= status.version]
            except UnknownName:
                return
            if not events:
                return
            seen = events[-1].version
            found = [*self._hooks.ls(status.owner), *self._hooks.ls(status.owner, job)]
            hooks = [hook for hook in found if hook.owner == status.owner]  # an id may have been somebody else's guess
            with translated(), self._redis.pipeline() as pipe:
                pipe.watch(f"lf:job:{job}")
                is_over = status.is_final and ledger.versions([job]) == [seen]
                pipe.multi()
                for event in events:
                    for hook in hooks:
                        self._deliver(pipe, hook, event, status)
                if is_over:
                    pipe.hdel(WATCHED, job)
                    pipe.expire(f"lf:hooks:job:{job}", KEPT_S)
                else:
                    pipe.hset(WATCHED, job, seen)
                try:
                    pipe.execute()
                except WatchError:
                    return  # it goes on; the next step sees how

    def _deliver(self, pipe: Any, hook: Hook, event: JobEvent, status: JobStatus) -> None:
        kind = KINDS.get(event.what)
        if kind is None or not hook.wants(kind, status.id):
            return
        if kind == "job.image" and not self._is_time(hook, status.id):
            return
        data = _data(event, status, kind)
        self._outbox.add(pipe, delivery_of(hook, kind, f"{status.id}/{event.version}", data, event.at))

    def _is_time(self, hook: Hook, job: str) -> bool:
        """Tell whether an address may hear of another image of a job; what it misses, the job's end tells."""
        if not hook.throttle_s:
            return True
        with translated():
            key, span = f"lf:hook:throttle:{hook.id}:{job}", int(hook.throttle_s * 1000)
            return bool(self._redis.set(key, 1, nx=True, px=max(1, span)))


def _data(event: JobEvent, status: JobStatus, kind: str) -> dict[str, Any]:
    """Return what an event tells: the job, how it stands, and the image if it is about one."""
    own = f"{BASE}/jobs/{status.id}"
    told: dict[str, Any] = {"id": status.id, "name": status.name, "total": status.total, "url": own}
    told |= {"version": event.version, "counts": dict(status.counts)}
    told |= {"state": event.what} if kind == "job.completed" else {"state": status.state}
    if event.index is not None:
        image = f"{own}/images/{event.index}"
        told["image"] = {"index": event.index, "state": event.what.removeprefix("image "), "url": f"{image}.png"}
    return told


def enqueue(farm: DirectFarm, pipe: Any, owner: str, kind: str, object_id: str) -> None:
    """Write down, in a transaction, that something other than a job came to an end."""
    hooks, outbox = Hooks(farm), Outbox(farm)
    for hook in hooks.ls(owner):
        if hook.wants(kind, None):
            outbox.add(pipe, delivery_of(hook, kind, f"{object_id}/{kind}", {"id": object_id}, time.time()))
