"""Python's side of the ledger: one method a transition, Redis errors translated here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import redis
from pydantic import BaseModel, ConfigDict, ValidationError

from latentfarm_shared.errors import EmbeddingRefused, Unavailable, UnknownName
from latentfarm_shared.ledger.states import STATE_OF_BYTE, ImageState, JobStatus
from latentfarm_shared.records import Lock
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import JobSpec, Lane

LEASE_MS = 6_000
ACKNOWLEDGE_MS = 2_000
WAKE_UP_STALE_MS = 5_000
WORKER_GONE_S = 10.0
LANES: tuple[Lane, ...] = ("interactive", "batch")


def queue_name(lane: Lane, checkpoint_hash: str) -> str:
    """Return the name of the queue of one checkpoint in one lane."""
    return f"{lane}:{checkpoint_hash}"


@dataclass(frozen=True)
class Claim:
    """An image handed to a worker under a lease; `token` fences off whoever held it before."""

    job: str
    index: int
    token: str
    spec: JobSpec
    lock: Lock

    @property
    def member(self) -> str:
        """The claim's name in the ledger."""
        return f"{self.job}/{self.index}"


class WorkerStatus(BaseModel):
    """What a worker says of itself with every beat."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int
    host: str
    device: str
    checkpoints: tuple[str, ...]
    slots: int
    claims: int
    phase: str
    draining: bool
    loads: int
    embeddings: int = 0
    cache_hits: int = 0
    cache_misses: int = 0


class Ledger:
    """The farm's truth. Safe to share between threads."""

    def __init__(self, client: redis.Redis, lease_ms: int = LEASE_MS, wake_up_stale_ms: int = WAKE_UP_STALE_MS) -> None:
        """Use this client; nothing is sent yet. A wake-up unanswered for `wake_up_stale_ms` counts as lost."""
        self.redis: Any = client  # redis-py annotates answers as bytes, str and more at once; ours are bytes
        self._lease_ms, self._stale_ms = lease_ms, wake_up_stale_ms
        script = files(__package__).joinpath("ledger.lua").read_text(encoding="utf-8")
        self._script = client.register_script(script)

    @classmethod
    def connect(cls, settings: Settings) -> Ledger:
        """Connect as the settings say."""
        client = redis.Redis.from_url(
            settings.broker_url, socket_connect_timeout=3, socket_timeout=15, health_check_interval=10
        )
        return cls(client)

    def check(self) -> None:
        """Make sure Redis answers.

        Raises:
            Unavailable: no answer, or wrong credentials.
        """
        with translated():
            self.redis.ping()

    def submit(self, job: str, spec: JobSpec, lock: Lock, pins: Sequence[tuple[str, str]] = ()) -> bool:
        """Write a job down and pin the names it uses (key, content id); False if a job of this id is already there.

        Raises:
            EmbeddingRefused: a name was removed or disabled since it was looked up.
        """
        fixed = job, spec.encode(), lock.encode(), spec.total, spec.lane, lock.checkpoint.hash
        answer = self._call("submit", *fixed, json.dumps(pins))
        if isinstance(answer, bytes):
            raise EmbeddingRefused(answer.decode().partition("/")[2], "it was removed or disabled a moment ago")
        return bool(answer)

    def put_name(self, key: str, number: int, entry: str, *, anew: bool = False) -> bool:
        """Index a name's record; False if a later one is there. `anew` replaces one of the same number too."""
        return bool(self._call("put_name", key, number, entry, int(anew)))

    def take_name(self, key: str, *, force: bool) -> int:
        """Mark a name removed; return how many unfinished jobs pin it and, without `force`, keep it."""
        return int(self._call("take_name", key, int(force)))

    def progress(self, claim: Claim, story: dict[str, float | str]) -> bool:
        """Say how far a claimed image is; False if the claim was lost or the job canceled."""
        return bool(self._call("progress", claim.job, claim.index, claim.token, json.dumps(story)))

    def acknowledge(self) -> None:
        """Wait until all that was written before is in the server's log on disk, where the server can tell.

        With `appendfsync everysec` this takes up to a second; what was submitted runs meanwhile.
        """
        with translated(), self.redis.client() as connection:  # WAITAOF speaks of one connection's writes
            connection.incr("lf:acknowledged")
            with suppress(redis.ResponseError):  # an older server, or one without a log
                connection.execute_command("WAITAOF", 1, 0, ACKNOWLEDGE_MS)

    def claim(self, worker: str, queues: Sequence[str]) -> Claim | None:
        """Take the most urgent image of `queues`, which stand in order of urgency."""
        while found := self._call("claim", worker, self._lease_ms, *queues):
            job, index, token, spec, lock = found
            try:
                return Claim(job.decode(), int(index), token.decode(), JobSpec.decode(spec), Lock.decode(lock))
            except ValidationError as error:
                story = json.dumps({"code": "UNREADABLE_JOB", "message": str(error), "worker": worker})
                self._call("finish", job, index, token, worker, "f", story)
        return None

    def succeed(self, claim: Claim, worker: str) -> bool:
        """Mark an image as published; False if the claim was lost."""
        return bool(self._call("finish", claim.job, claim.index, claim.token, worker, "s", ""))

    def fail(self, claim: Claim, worker: str, code: str, message: str) -> bool:
        """Mark an image as failed; False if the claim was lost."""
        story = json.dumps({"code": code, "message": message, "worker": worker})
        return bool(self._call("finish", claim.job, claim.index, claim.token, worker, "f", story))

    def cancel_image(self, claim: Claim, worker: str) -> bool:
        """Mark an image of a canceled job as canceled; False if the claim was lost."""
        return bool(self._call("finish", claim.job, claim.index, claim.token, worker, "c", ""))

    def release(self, claim: Claim, worker: str) -> bool:
        """Hand an image back without a mark against it; False if the claim was lost."""
        return bool(self._call("release", claim.job, claim.index, claim.token, worker))

    def claims(self, worker: str) -> set[str]:
        """Return the members of every claim in a worker's name."""
        with translated():
            return {member.decode() for member in self.redis.smembers(f"lf:worker:{worker}:claims")}

    def disown(self, worker: str, member: str) -> bool:
        """Hand back an image that is claimed in the worker's name, but unknown to it."""
        return bool(self._call("disown", worker, member))

    def beat(self, worker: str, fields: dict[str, str | int]) -> list[str]:
        """Extend the worker's leases; return the claims whose jobs were canceled."""
        flat = [item for pair in fields.items() for item in pair]
        return [member.decode() for member in self._call("beat", worker, self._lease_ms, *flat)]

    def leave(self, worker: str) -> None:
        """Take a worker off the list."""
        self._call("leave", worker)

    def sweep(self) -> list[tuple[str, str]]:
        """Take back what dead workers held; return the wake-ups (queue, ticket) that are missing."""
        with translated():
            run_id = self.redis.info("server")["run_id"]
        self._call("epoch", run_id, self._lease_ms)
        while self._call("expire", 100) == 100:
            pass
        with translated():
            queues = sorted(name.decode() for name in self.redis.smembers("lf:queues"))
        return [(queue, ticket) for queue in queues for ticket in self.ring(queue)]

    def ring(self, queue: str) -> list[str]:
        """Return the tickets of the wake-ups to send to a queue now."""
        return [ticket.decode() for ticket in self._call("ring", queue, self._stale_ms)]

    def answered(self, queue: str, ticket: str) -> None:
        """Note that a wake-up arrived."""
        self._call("answered", queue, ticket)

    def cancel(self, job: str) -> None:
        """Cancel a job.

        Raises:
            UnknownName: there is none of this id.
        """
        if not self._call("cancel", job):
            raise UnknownName("job", job)

    # ---- reading; all in constant time but for `jobs` and `image_states`, which are paged

    def status(self, job: str) -> JobStatus:
        """Return where a job stands.

        Raises:
            UnknownName: there is none of this id.
        """
        with translated():
            fields = {k.decode(): v.decode() for k, v in self.redis.hgetall(f"lf:job:{job}").items()}
        if not fields:
            raise UnknownName("job", job)
        return _status(job, fields)

    def jobs(self, limit: int = 50) -> list[JobStatus]:
        """Return the newest jobs first."""
        with translated():
            ids = [name.decode() for name in self.redis.zrevrange("lf:jobs", 0, max(1, limit) - 1)]
        return [self.status(job) for job in ids]

    def spec_and_lock(self, job: str) -> tuple[JobSpec, Lock]:
        """Return what a job was asked for and frozen to.

        Raises:
            UnknownName: there is none of this id.
        """
        with translated():
            spec, lock = self.redis.hmget(f"lf:job:{job}", "spec", "lock")
        if spec is None or lock is None:
            raise UnknownName("job", job)
        return JobSpec.decode(spec), Lock.decode(lock)

    def image_states(self, job: str, start: int, stop: int) -> list[ImageState]:
        """Return the states of images `start` to `stop` (not included)."""
        with translated():
            known = self.redis.getrange(f"lf:job:{job}:states", start, stop - 1)
            canceled = self.redis.hget(f"lf:job:{job}", "state") == b"canceled"
        untouched: ImageState = "canceled" if canceled else "queued"
        states = [STATE_OF_BYTE[byte] if byte else untouched for byte in known]
        return states + [untouched] * (stop - start - len(states))

    def image_error(self, job: str, index: int) -> dict[str, str] | None:
        """Return `code`, `message` and `worker` of a failed image."""
        with translated():
            text = self.redis.hget(f"lf:job:{job}:errors", str(index))
        return json.loads(text) if text else None

    def report_residents(self, worker: str, content_ids: Sequence[str]) -> None:
        """Say which embeddings a worker has in memory; forgotten after a minute without a word."""
        key = f"lf:worker:{worker}:embeddings"
        with translated(), self.redis.pipeline() as pipe:
            pipe.delete(key)
            if content_ids:
                pipe.sadd(key, *content_ids)
                pipe.expire(key, 60)
            pipe.execute()

    def residents(self, worker: str) -> set[str]:
        """Return the content ids of the embeddings a worker has in memory."""
        with translated():
            return {item.decode() for item in self.redis.smembers(f"lf:worker:{worker}:embeddings")}

    def workers(self) -> list[WorkerStatus]:
        """Return the workers that beat lately."""
        with translated():
            now = self.redis.time()[0]
            names = self.redis.zrangebyscore("lf:workers", (now - WORKER_GONE_S) * 1000, "+inf")
            found = []
            for name in names:
                fields = {k.decode(): v.decode() for k, v in self.redis.hgetall(b"lf:worker:" + name).items()}
                if fields:
                    claims = self.redis.scard(b"lf:worker:" + name + b":claims")
                    held = self.redis.scard(b"lf:worker:" + name + b":embeddings")
                    found.append(_worker(name.decode(), fields, claims, held))
        return found

    def _call(self, transition: str, *arguments: str | int) -> Any:
        with translated():
            return self._script(args=[transition, *arguments])


@contextmanager
def translated() -> Iterator[None]:
    """Turn the Redis errors a user can do something about into ours; let the rest through."""
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise Unavailable("Redis", "access denied", "check LATENTFARM_REDIS_URL or LATENTFARM_DATA") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Unavailable("Redis", "no answer", "is the farm running? check LATENTFARM_REDIS_URL") from error
    except redis.ResponseError as error:
        if str(error).startswith("OOM"):
            raise Unavailable("Redis", "out of memory", "delete old jobs or give it more") from error
        if "NOAUTH" not in str(error) and "WRONGPASS" not in str(error):
            raise
        raise Unavailable("Redis", "access denied", "check LATENTFARM_REDIS_URL or LATENTFARM_DATA") from error


def _status(job: str, fields: dict[str, str]) -> JobStatus:
    spec = JobSpec.decode(fields["spec"])
    done: dict[ImageState, int] = {
        "running": int(fields["running"]),
        "succeeded": int(fields["succeeded"]),
        "failed": int(fields["failed"]),
        "canceled": int(fields["canceled"]),
        "expired": int(fields["expired"]),
    }
    total = int(fields["total"])
    return JobStatus.model_validate(
        {
            "id": job,
            "state": fields["state"],
            "total": total,
            "counts": {"queued": total - sum(done.values()), **done},
            "version": int(fields["version"]),
            "created": int(fields["created"]) / 1000,
            "model": spec.model,
            "prompt": spec.prompt,
            "progress": json.loads(fields["progress"]) if "progress" in fields else None,
            "dropped": Lock.decode(fields["lock"]).dropped if '"dropped":[{' in fields["lock"] else (),
        }
    )


def _worker(name: str, fields: dict[str, str], claims: int, embeddings: int) -> WorkerStatus:
    return WorkerStatus(
        name=name,
        pid=int(fields.get("pid", 0)),
        host=fields.get("host", ""),
        device=fields.get("device", ""),
        checkpoints=tuple(filter(None, fields.get("checkpoints", "").split(","))),
        slots=int(fields.get("slots", 0)),
        claims=claims,
        phase=fields.get("phase", "starting"),
        draining=fields.get("draining") == "1",
        loads=int(fields.get("loads", 0)),
        embeddings=embeddings,
        cache_hits=int(fields.get("cache_hits", 0)),
        cache_misses=int(fields.get("cache_misses", 0)),
    )
