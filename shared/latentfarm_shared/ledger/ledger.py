"""Python's side of the ledger: one method a transition, Redis errors translated here."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeVar

import redis
from pydantic import ValidationError

from latentfarm_shared.errors import AlreadyTaken, Busy, EmbeddingRefused, InvalidField, Unavailable, UnknownName
from latentfarm_shared.ledger.queues import part_name
from latentfarm_shared.ledger.states import (
    STAMP_FIELDS,
    STATE_OF_BYTE,
    STATUS_FIELDS,
    ImageState,
    JobEvent,
    JobStatus,
    Limits,
    Stamp,
    Submission,
    WorkerStatus,
    job_status,
    worker_status,
)
from latentfarm_shared.records import Lock
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import MAX_SPEC_BYTES, JobSpec, Lane

LEASE_MS = 6_000
ACKNOWLEDGE_MS = 2_000
WAKE_UP_STALE_MS = 5_000
WORKER_GONE_S = 10.0
T = TypeVar("T")
SCRIPTS = ("base", "names", "jobs", "claims", "workers", "transitions")
FULL = 0.7  # the share of Redis' memory above which no more work is taken
SWEEP_STEP = 50
SCAN_STEP = (200, 10_000)  # images handed out again and looked at in one step of a retry
REMEMBERED = 512  # specs and locks that are kept in memory
EVENTS_KEPT = 1100
RETRY_NEEDS_MISSING = 2
SOMEBODY_LOOKS, SEEN_S = 2, 10


@dataclass(frozen=True)
class Claim:
    """An image handed to a worker under a lease; `token` fences off whoever held it before.

    The ledger knows an image by its `position` in the order its job is handed out, people by its index. A `doubtful` one
    may have been published by somebody who could not say so.
    """

    job: str
    position: int
    token: str
    queue: str
    spec: JobSpec
    lock: Lock
    doubtful: bool = False

    @property
    def index(self) -> int:
        """Which image of the job it is."""
        return self.spec.layout.index_at(self.position)

    @property
    def member(self) -> str:
        """The claim's name in the ledger."""
        return f"{self.job}/{self.position}"


@dataclass(frozen=True)
class Reservation:
    """What to do with a claimed image: `render` it, copy the picture the owner has, or nothing, for the claim is over.

    `have` names the job and position of that picture.
    """

    render: bool = False
    have: tuple[str, int] | None = None


@dataclass(frozen=True)
class Orders:
    """What a beat brings back: whether the worker is drained, and its claims of jobs that are closed."""

    drained: bool = False
    closed: tuple[str, ...] = ()


class Ledger:
    """The farm's truth. Safe to share between threads."""

    def __init__(self, client: redis.Redis, lease_ms: int = LEASE_MS, wake_up_stale_ms: int = WAKE_UP_STALE_MS) -> None:
        """Use this client; nothing is sent yet. A wake-up unanswered for `wake_up_stale_ms` counts as lost."""
        self.redis: Any = client  # redis-py annotates answers as bytes, str and more at once; ours are bytes
        self._lease_ms, self._stale_ms = lease_ms, wake_up_stale_ms
        folder = files(__package__).joinpath("scripts")
        self._source = "\n".join(folder.joinpath(f"{name}.lua").read_text(encoding="utf-8") for name in SCRIPTS)
        self._sha = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()
        self._frozen: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._guard = threading.Lock()
        self._memory = (0.0, 0.0)

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

    # ---- jobs

    def submit(
        self,
        job: str,
        spec: JobSpec,
        locks: Sequence[Lock],
        pins: Sequence[tuple[str, str]] = (),
        request: str | None = None,
    ) -> Submission:
        """Write a job down, with a lock for every checkpoint it draws on, and pin the names it uses (key, content id).

        A job of this id, or of the same owner and client key, is left as it is. `request` tells what was asked for, so
        that the same key with another request is noticed.

        Raises:
            EmbeddingRefused: a name was removed or disabled since it was looked up.
            AlreadyTaken: somebody else's job has this id, or the key came with another request before.
            Busy: the owner has too much waiting, or Redis too little memory.
        """
        self._refuse_when_full()
        record = _job_record(spec, locks) | ({} if request is None else {"request": request})
        self._before_submit(record)
        answer = self._call("submit", job, json.dumps(record), json.dumps(pins))
        kind, *rest = (part.decode() if isinstance(part, bytes) else part for part in answer)
        if kind == "gone":
            raise EmbeddingRefused(rest[0].partition("/")[2], "it was removed or disabled a moment ago")
        if kind == "taken":
            raise AlreadyTaken("job", job, "is somebody else's; choose another id")
        if kind == "old":
            _refuse_other_request(rest[0], spec.key or job, rest[1], request)
        if kind == "full":
            queued, most = rest
            raise Busy(f"{queued} of your images wait and {most} may", self.wait_s(spec.lane))
        return Submission(rest[0], kind == "new")

    def submitted(
        self, owner: str, key: str | None = None, job: str | None = None, request: str | None = None
    ) -> str | None:
        """Return the id of the job that an owner submitted with a client key or this id, None if there is none.

        Raises:
            AlreadyTaken: it was another request.
        """
        with translated():
            if key is not None:
                found = self.redis.hget("lf:keys", f"{owner}/{key}")
                job = found.decode() if found else job
            whose, before = self.redis.hmget(f"lf:job:{job}", "owner", "request") if job else (None, None)
        if job is None or whose is None or whose.decode() != owner:
            return None
        _refuse_other_request(job, key or job, (before or b"").decode(), request)
        return job

    @staticmethod
    def _before_submit(record: dict[str, Any]) -> None:
        if len(record["spec"].encode()) > MAX_SPEC_BYTES:
            raise InvalidField("spec", f"is larger than {MAX_SPEC_BYTES} bytes; put long lists into a file of rows")

    def _refuse_when_full(self) -> None:
        """Refuse work while Redis has little memory left; looked up once a second.

        Raises:
            Busy: it has.
        """
        at, share = self._memory
        if time.monotonic() - at > 1 or not at:
            with translated():
                info = self.redis.info("memory")
            most = int(info.get("maxmemory", 0))
            share = int(info["used_memory"]) / most if most else 0.0
            self._memory = time.monotonic(), share
        if share > FULL:
            raise Busy(f"Redis has {share:.0%} of its memory in use", self.wait_s("batch"))

    def wait_s(self, lane: Lane) -> int:
        """Return after how many seconds a tenth of what waits in a lane should be done, 1 to 3600."""
        with translated():
            waiting = float(self.redis.hget("lf:load", lane) or 0)
        rate = sum(worker.rate for worker in self.workers())
        return int(min(max(0.1 * waiting / rate, 1), 3600)) if rate else 30

    def cancel(self, job: str) -> None:
        """Cancel a job.

        Raises:
            UnknownName: there is none of this id.
        """
        self._known(job, self._call("cancel", job))

    def pause(self, job: str) -> None:
        """Hand out no more of a job's images; what is in flight goes on. Raises UnknownName."""
        self._known(job, self._call("hold", job, "paused", "1"))

    def resume(self, job: str) -> None:
        """Go on with a paused job. Raises UnknownName."""
        self._known(job, self._call("hold", job, "paused", ""))

    def approve(self, job: str) -> None:
        """Go on with a job that waits for approval; one that has not got there will not wait. Raises UnknownName."""
        self._known(job, self._call("hold", job, "gated", ""))

    def prioritise(self, job: str, priority: int) -> None:
        """Put a job before (above 0) or behind (below 0) its owner's others. Raises UnknownName."""
        self._known(job, self._call("prioritise", job, priority))

    def retry(self, job: str, *, missing: bool = False) -> None:
        """Hand out again the images that failed; if `missing`, those canceled or expired too.

        Images are looked at in steps; if this process ends on the way, the sweeper goes on.

        Raises:
            UnknownName: there is none of this id.
            InvalidField: the job is over with images that only `missing` brings back.
        """
        answer = self._call("retry", job, int(missing))
        self._known(job, answer)
        if answer == RETRY_NEEDS_MISSING:
            raise InvalidField(
                "job", "was canceled or has expired; retry it with what is missing (jobs retry --missing)"
            )
        while self._call("scan", job, *SCAN_STEP):
            pass

    @staticmethod
    def _known(job: str, answer: object) -> None:
        if not answer:
            raise UnknownName("job", job)

    # ---- names of embeddings

    def put_name(self, key: str, number: int, entry: str, *, anew: bool = False) -> bool:
        """Index a name's record; False if a later one is there. `anew` replaces one of the same number too."""
        return bool(self._call("put_name", key, number, entry, int(anew)))

    def take_name(self, key: str, *, force: bool) -> int:
        """Mark a name removed; return how many unfinished jobs pin it and, without `force`, keep it."""
        return int(self._call("take_name", key, int(force)))

    def embeddings_failed(self, content_ids: Sequence[str]) -> list[str]:
        """Note that an image failed that used these; return those that never worked and failed five times now."""
        return [item.decode() for item in self._call("embeddings_failed", *content_ids)] if content_ids else []

    def embeddings_worked(self, content_ids: Sequence[str]) -> None:
        """Note that a picture was published that used these."""
        self._call("embeddings_worked", *content_ids)

    # ---- claims

    def progress(self, claim: Claim, story: dict[str, float | str]) -> int:
        """Say how far a claimed image is; 0 if the claim was lost or the job closed, SOMEBODY_LOOKS if somebody does."""
        lasting = int(claim.spec.pack is not None)  # a packing's quality stays with its job
        return int(self._call("progress", claim.job, claim.position, claim.token, json.dumps(story), lasting))

    def show(self, claim: Claim, picture: bytes) -> None:
        """Show what a claimed image looks like so far."""
        with translated():
            self.redis.set(f"lf:seen:{claim.member}", picture, ex=SEEN_S)

    def look(self, job: str) -> None:
        """Ask workers to show a job's images in flight for the next seconds."""
        with translated():
            self.redis.set(f"lf:look:{job}", 1, ex=SEEN_S)

    def seen(self, job: str, index: int) -> bytes | None:
        """Return what an image in flight looked like a moment ago, a PNG; None if nobody has seen it."""
        position = self.spec(job).layout.position_of(index)
        with translated():
            found: bytes | None = self.redis.get(f"lf:seen:{job}/{position}")
        return found

    def acknowledge(self) -> None:
        """Wait until all that was written before is in the server's log on disk, where the server can tell.

        With `appendfsync everysec` this takes up to a second; what was submitted runs meanwhile.
        """
        with translated(), self.redis.client() as connection:  # WAITAOF speaks of one connection's writes
            connection.incr("lf:acknowledged")
            with suppress(redis.ResponseError):  # an older server, or one without a log
                connection.execute_command("WAITAOF", 1, 0, ACKNOWLEDGE_MS)

    def claim(self, worker: str, queues: Sequence[str], cold: Collection[str] = ()) -> Claim | None:
        """Take the most urgent image of `queues`, which stand in order of urgency, lanes together.

        A queue in `cold` is of a checkpoint that is not in memory: it may wait a little for the others.
        """
        flat = [item for queue in queues for item in (queue, "0" if queue in cold else "1")]
        while found := self._call("claim", worker, self._lease_ms, *flat):
            job, position, token, queue, doubtful = found
            try:
                spec, lock = self._spec_and_lock(job.decode(), queue.decode().partition(":")[2])
            except (ValidationError, UnknownName) as error:
                story = json.dumps({"code": "UNREADABLE_JOB", "message": str(error), "worker": worker})
                self._call("finish", job, position, token, worker, "f", story, "")
                self._call("cancel", job)  # none of its images can be read
            else:
                return Claim(job.decode(), int(position), token.decode(), queue.decode(), spec, lock, bool(doubtful))
        return None

    def reserve(self, claim: Claim, content_id: str) -> Reservation:
        """Ask whether a claimed image is to be rendered, or the owner has it, or somebody renders it right now."""
        answer = self._call("reserve", claim.job, claim.position, claim.token, content_id)
        kind = answer[0].decode()
        if kind != "have":
            return Reservation(render=kind == "render")
        job, _, position = answer[1].decode().rpartition("/")
        return Reservation(have=(job, int(position)))

    def succeed(self, claim: Claim, worker: str, cost: int | None = None) -> bool:
        """Mark an image as published, which cost so many pixel-steps; False if the claim was lost."""
        return self._finish(claim, worker, "s", "", cost)

    def fail(self, claim: Claim, worker: str, code: str, message: str) -> bool:
        """Mark an image as failed; False if the claim was lost."""
        return self._finish(claim, worker, "f", json.dumps({"code": code, "message": message, "worker": worker}), None)

    def _finish(self, claim: Claim, worker: str, byte: str, story: str, cost: int | None) -> bool:
        spent = "" if cost is None else cost
        return bool(self._call("finish", claim.job, claim.position, claim.token, worker, byte, story, spent))

    def release(self, claim: Claim, worker: str) -> bool:
        """Hand an image back without a mark against it; False if the claim was lost."""
        return bool(self._call("release", claim.job, claim.position, claim.token, worker))

    def claims(self, worker: str) -> set[str]:
        """Return the members of every claim in a worker's name."""
        with translated():
            return {member.decode() for member in self.redis.smembers(f"lf:worker:{worker}:claims")}

    def disown(self, worker: str, member: str) -> bool:
        """Hand back an image that is claimed in the worker's name, but unknown to it."""
        return bool(self._call("disown", worker, member))

    # ---- workers and wake-ups

    def beat(self, worker: str, fields: dict[str, str | int | float]) -> Orders:
        """Extend the worker's leases; return what it is to know."""
        flat = [item for pair in fields.items() for item in pair]
        drained, *closed = self._call("beat", worker, self._lease_ms, *flat)
        return Orders(bool(drained), tuple(member.decode() for member in closed))

    def bury(self, worker: str, *, killed: bool = False) -> int:
        """Take back at once what a worker held whose process is dead; return how many images.

        One that was `killed` by somebody weighs less against the image it held alone than one that died of itself.
        """
        return int(self._call("bury", worker, int(killed)))

    def leave(self, worker: str) -> None:
        """Take a worker off the list."""
        self._call("leave", worker)

    def note_rate(self, checkpoints: Sequence[str], rate: float) -> None:
        """Note how many pixel-steps a second a busy worker did with these checkpoints."""
        for checkpoint in checkpoints:
            self._call("rate", checkpoint, round(rate, 3))

    def rates(self, checkpoint: str) -> list[float]:
        """Return the latest rates that workers measured with a checkpoint, pixel-steps a second."""
        with translated():
            return [float(item) for item in self.redis.lrange(f"lf:rates:{checkpoint}", 0, -1)]

    def drain(self, station: str, *, on: bool = True) -> None:
        """Tell a worker to claim nothing more, or to go on; it keeps to this when its process is started again.

        Raises:
            UnknownName: there is no such worker.
        """
        names = [status.station for status in self.workers()]
        with translated():
            if station not in names and not self.redis.sismember("lf:drained", station):
                raise UnknownName.among("worker", station, names)
            (self.redis.sadd if on else self.redis.srem)("lf:drained", station)

    def set_aside(self, worker: str, story: str) -> None:
        """Let a worker that keeps dying claim nothing until it is released."""
        with translated():
            self.redis.hset("lf:aside", worker, story)

    def is_aside(self, worker: str) -> bool:
        """Tell whether a worker is set aside."""
        with translated():
            return bool(self.redis.hexists("lf:aside", worker))

    def aside(self) -> dict[str, str]:
        """Return the workers that are set aside, each with its story."""
        with translated():
            return {name.decode(): story.decode() for name, story in self.redis.hgetall("lf:aside").items()}

    def let_back(self, worker: str) -> None:
        """Let a worker that was set aside work again.

        Raises:
            UnknownName: it was not.
        """
        with translated():
            known = self.redis.hdel("lf:aside", worker)
        if not known:
            raise UnknownName.among("worker set aside", worker, self.aside())

    def sweep(self, *, at_once: bool = False) -> list[tuple[str, str]]:
        """Take back what dead workers held, end what is over; return the wake-ups (queue, ticket) that are missing.

        Any process may; one does each second, or `at_once`.
        """
        if not self._call("epoch", "", self._lease_ms, int(at_once)):
            return []
        while self._call("expire", SWEEP_STEP) == SWEEP_STEP:
            pass
        while self._call("due", SWEEP_STEP) == SWEEP_STEP:
            pass
        for _ in range(20):
            if not self._call("stir", 20):
                break
        with translated():
            scans, queues = self.redis.smembers("lf:scans"), self.redis.smembers("lf:queues")
        for job in scans:
            self._call("scan", job, *SCAN_STEP)
        names = sorted(name.decode() for name in queues)
        return [(queue, ticket) for queue in names for ticket in self.ring(queue)]

    def tagged_queues(self) -> list[str]:
        """Return the queues that ask for tags."""
        with translated():
            return [name.decode() for name in self.redis.smembers("lf:queues") if b"+" in name]

    def closed_jobs(self, wait_s: float = 5.0) -> Iterator[str]:
        """Yield jobs as they are canceled or expire, without end; what is missed, a beat tells."""
        with translated(), self.redis.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe("lf:closed")
            while True:
                message = channel.get_message(timeout=wait_s)
                if message:
                    yield message["data"].decode()

    def ring(self, queue: str) -> list[str]:
        """Return the tickets of the wake-ups to send to a queue now."""
        return [ticket.decode() for ticket in self._call("ring", queue, self._stale_ms)]

    def answered(self, queue: str, ticket: str) -> None:
        """Note that a wake-up arrived."""
        self._call("answered", queue, ticket)

    # ---- what owners may have

    def set_limits(self, owner: str | None, limits: Limits) -> None:
        """Set what an owner may have, or with None what everybody else may."""
        key = "lf:limit" if owner is None else f"lf:limit:{owner}"
        values = {name: value for name, value in limits.model_dump().items() if value is not None}
        with translated(), self.redis.pipeline() as pipe:
            pipe.delete(key)
            if values:
                pipe.hset(key, mapping=values)
            pipe.execute()

    def limits(self, owner: str | None) -> Limits:
        """Return what an owner may have, or with None what everybody else may."""
        with translated():
            found = self.redis.hgetall("lf:limit" if owner is None else f"lf:limit:{owner}")
        return Limits.model_validate({name.decode(): value.decode() for name, value in found.items()})

    def usage(self, owner: str) -> dict[str, int]:
        """Return how many images of an owner are `queued` and `running`."""
        with translated():
            queued, running = self.redis.hmget(f"lf:owner:{owner}", "queued", "running")
        return {"queued": int(queued or 0), "running": int(running or 0)}

    # ---- manifests and retention

    def dirty(self, limit: int = 20) -> list[str]:
        """Return jobs whose manifest is behind, the longest first."""
        with translated():
            return [job.decode() for job in self.redis.zrange("lf:dirty", 0, limit - 1)]

    def touched(self, job: str) -> list[tuple[int, str]]:
        """Return the segments of a job's manifest that are behind, each with when it was touched last."""
        with translated():
            found = self.redis.zrange(f"lf:job:{job}:touched", 0, -1, withscores=True)
        return [(int(segment), f"{score:.0f}") for segment, score in found]

    def written(self, job: str, segments: Sequence[tuple[int, str]]) -> int:
        """Note that segments were written as they were when touched; return how many are behind now."""
        return int(self._call("written", job, *(item for pair in segments for item in pair)))

    def clean(self, job: str) -> bool:
        """Note that a final job's manifest is whole; False if something changed meanwhile."""
        return bool(self._call("clean", job))

    def outdated(self, limit: int = 20) -> list[str]:
        """Return final jobs that were to be kept until now."""
        with translated():
            jobs = self.redis.zrangebyscore("lf:retention", "-inf", self._now_ms(), start=0, num=limit)
        return [job.decode() for job in jobs]

    def delete(self, job: str) -> bool:
        """Forget a final job; False if it is not final."""
        return bool(self._call("delete", job))

    def take_turn(self, duty: str, seconds: float) -> bool:
        """Tell whether a duty that one process does at a time is this one's for so many seconds."""
        with translated():
            return bool(self.redis.set(f"lf:turn:{duty}", 1, nx=True, px=int(seconds * 1000)))

    def end_turn(self, duty: str, pause_s: float) -> None:
        """End a turn; the next may begin after a pause."""
        with translated():
            self.redis.pexpire(f"lf:turn:{duty}", int(pause_s * 1000))

    # ---- reading; all in constant time but for what is paged

    def status(self, job: str) -> JobStatus:
        """Return where a job stands.

        Raises:
            UnknownName: there is none of this id.
        """
        with translated():
            values = self.redis.hmget(f"lf:job:{job}", STATUS_FIELDS)
        fields = {name: value.decode() for name, value in zip(STATUS_FIELDS, values, strict=True) if value is not None}
        if not fields:
            raise UnknownName("job", job)
        spec, lock = self._spec_and_lock(job, fields["parts"].partition(",")[0])
        return job_status(job, fields, spec, lock)

    def versions(self, jobs: Sequence[str]) -> list[int | None]:
        """Return the versions of jobs, None for those that are not there."""
        with translated(), self.redis.pipeline(transaction=False) as pipe:
            for job in jobs:
                pipe.hget(f"lf:job:{job}", "version")
            return [None if found is None else int(found) for found in pipe.execute()]

    def stamps(self, jobs: Sequence[str]) -> list[Stamp | None]:
        """Return what changes whenever a job's status or an image's state does, None for jobs that are not there."""
        with translated(), self.redis.pipeline(transaction=False) as pipe:
            for job in jobs:
                pipe.hmget(f"lf:job:{job}", STAMP_FIELDS)
            return [tuple(found) if any(value is not None for value in found) else None for found in pipe.execute()]

    def jobs(self, limit: int = 50, owner: str | None = None) -> list[JobStatus]:
        """Return the newest jobs first, of one owner if given."""
        return self.jobs_before(limit, owner=owner)[0]

    def jobs_before(
        self, limit: int, before: int | None = None, owner: str | None = None
    ) -> tuple[list[JobStatus], int | None]:
        """Return a page of jobs, the newest first, and where the next begins; None after the last.

        `before` is where the page before ended. Jobs submitted meanwhile do not move a page.
        """
        key = "lf:jobs" if owner is None else f"lf:jobs:{owner}"
        top = "+inf" if before is None else f"({before}"
        with translated():
            found = self.redis.zrevrangebyscore(key, top, "-inf", 0, max(1, limit), withscores=True)
        statuses = []
        for name, _ in found:
            with suppress(UnknownName):  # deleted a moment ago
                statuses.append(self.status(name.decode()))
        return statuses, int(found[-1][1]) if len(found) == max(1, limit) else None

    def spec_and_lock(self, job: str, part: str | None = None) -> tuple[JobSpec, Lock]:
        """Return what a job was asked for and frozen to, for one of its parts, by default the first.

        Raises:
            UnknownName: there is none of this id.
        """
        if part is None:
            with translated():
                parts = self.redis.hget(f"lf:job:{job}", "parts")
            if parts is None:
                raise UnknownName("job", job)
            part = parts.decode().partition(",")[0]
        return self._spec_and_lock(job, part)

    def locks(self, job: str) -> list[Lock]:
        """Return a job's locks, one for every checkpoint it draws on, in order.

        Raises:
            UnknownName: there is none of this id.
        """
        with translated():
            parts = self.redis.hget(f"lf:job:{job}", "parts")
        if parts is None:
            raise UnknownName("job", job)
        return [self._spec_and_lock(job, part)[1] for part in parts.decode().split(",")]

    def _spec_and_lock(self, job: str, part: str) -> tuple[JobSpec, Lock]:
        spec = self._remembered(job, "spec", JobSpec.decode)
        return spec, self._remembered(job, f"lock:{part}", Lock.decode)

    def spec(self, job: str) -> JobSpec:
        """Return what a job was asked for, with prompts and seed settled.

        Raises:
            UnknownName: there is none of this id.
        """
        return self._remembered(job, "spec", JobSpec.decode)

    def _remembered(self, job: str, field: str, decode: Callable[[bytes], T]) -> T:
        """Return a field of a job that never changes, from memory or Redis."""
        key = job, field
        with self._guard:
            if key in self._frozen:
                self._frozen.move_to_end(key)
                return self._frozen[key]  # type: ignore[no-any-return]
        with translated():
            text = self.redis.hget(f"lf:job:{job}", field)
        if text is None:
            raise UnknownName("job", job)
        found = decode(text)
        with self._guard:
            self._frozen[key] = found
            if len(self._frozen) > REMEMBERED:
                self._frozen.popitem(last=False)
        return found

    def image_states(self, job: str, start: int, stop: int) -> list[ImageState]:
        """Return the states of images `start` to `stop` (not included)."""
        layout = self.spec(job).layout
        return self.states_at(job, [layout.position_of(index) for index in range(start, stop)])

    def states_at(self, job: str, positions: Sequence[int]) -> list[ImageState]:
        """Return the states of the images at these positions."""
        if not positions:
            return []
        first, last = positions[0], positions[-1]
        with translated(), self.redis.pipeline(transaction=False) as pipe:
            pipe.hget(f"lf:job:{job}", "closed")
            if last - first == len(positions) - 1 and list(positions) == list(range(first, last + 1)):
                pipe.getrange(f"lf:job:{job}:states", first, last)
                closed, text = pipe.execute()
                known = [text[i : i + 1] for i in range(len(positions))]
            else:
                for position in positions:
                    pipe.getrange(f"lf:job:{job}:states", position, position)
                closed, *known = pipe.execute()
        untouched: ImageState = STATE_OF_BYTE[closed[0]] if closed else "queued"
        return [STATE_OF_BYTE[byte[0]] if byte and byte[0] else untouched for byte in known]

    def image_error(self, job: str, index: int) -> dict[str, str] | None:
        """Return `code`, `message` and `worker` of a failed image."""
        position = self.spec(job).layout.position_of(index)
        return self.errors_at(job, [position])[0]

    def errors_at(self, job: str, positions: Sequence[int]) -> list[dict[str, str] | None]:
        """Return the stories of the images at these positions, None for those that did not fail."""
        if not positions:
            return []
        with translated():
            texts = self.redis.hmget(f"lf:job:{job}:errors", [str(position) for position in positions])
        return [json.loads(text) if text else None for text in texts]

    def in_flight(self, job: str) -> dict[int, dict[str, float | str]]:
        """Return how far the images of a job are that are being rendered and told so, by index."""
        layout = self.spec(job).layout
        with translated():
            found = self.redis.hgetall(f"lf:job:{job}:progress")
        return {layout.index_at(int(position)): json.loads(text) for position, text in found.items()}

    def deadline(self, job: str) -> float | None:
        """Return when a job expires, in seconds since 1970; None if it does not."""
        with translated():
            found = self.redis.zscore("lf:deadlines", job)
        return None if found is None else float(found) / 1000

    def events(self, job: str, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """Return what happened to a job since a version; the oldest of many are forgotten.

        Raises:
            UnknownName: there is none of this id.
        """
        layout = self.spec(job).layout
        with translated():
            version = int(self.redis.hget(f"lf:job:{job}", "version") or 0)
            new = min(version - after, EVENTS_KEPT)
            found = self._entries(job, new, limit) if new > 0 else []
        events = []
        for entry, fields in found:
            version, position = int(fields[b"version"]), fields[b"position"]
            if version > after:
                index = layout.index_at(int(position)) if position else None
                at = int(entry.partition(b"-")[0]) / 1000
                events.append(JobEvent(version=version, what=fields[b"what"].decode(), index=index, at=at))
        return events[:limit]

    def _entries(self, job: str, new: int, limit: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Return the last `new` entries of a job's events, the oldest first; at least the first `limit` of them."""
        key = f"lf:job:{job}:events"
        if limit < new and self.redis.xlen(key) <= new:  # nothing of what is kept was seen
            return list(self.redis.xrange(key, count=limit))
        return list(reversed(self.redis.xrevrange(key, count=new)))

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
            names = self.redis.zrangebyscore("lf:workers", self._now_ms() - WORKER_GONE_S * 1000, "+inf")
            with self.redis.pipeline(transaction=False) as pipe:
                for name in names:
                    pipe.hgetall(b"lf:worker:" + name)
                    pipe.scard(b"lf:worker:" + name + b":claims")
                    pipe.scard(b"lf:worker:" + name + b":embeddings")
                answers = pipe.execute()
        rows = zip(names, answers[::3], answers[1::3], answers[2::3], strict=True)
        return [worker_status(name.decode(), fields, claims, held) for name, fields, claims, held in rows if fields]

    def _now_ms(self) -> int:
        seconds, micros = self.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def _call(self, transition: str, *arguments: str | float | bytes) -> Any:
        """Run a transition. A server that does not know the script has been restarted: it is told so first."""
        with translated():
            try:
                return self.redis.evalsha(self._sha, 0, transition, *arguments)
            except redis.exceptions.NoScriptError:
                run_id = str(self.redis.info("server")["run_id"])
                self.redis.eval(self._source, 0, "epoch", run_id, self._lease_ms, 0)
                return self.redis.evalsha(self._sha, 0, transition, *arguments)


def _refuse_other_request(job: str, key: str, before: str, request: str | None) -> None:
    """Refuse a key that came with another request before.

    Raises:
        AlreadyTaken: it did.
    """
    if before and request and before != request:
        raise AlreadyTaken("key", key, f"was used for another request, job {job}; choose a new one")


def _job_record(spec: JobSpec, locks: Sequence[Lock]) -> dict[str, Any]:
    """Return what is written down of a job."""
    now_ms = time.time() * 1000
    record: dict[str, Any] = {
        "spec": spec.encode(),
        "owner": locks[0].owner,
        "lane": spec.lane,
        "total": spec.total,
        "cost": spec.mean_cost,
        "priority": spec.priority,
        "parts": [
            [part_name(lock.checkpoint.hash, spec.requires), start, stop]
            for lock, (start, stop) in zip(locks, spec.layout.parts, strict=True)
        ],
    }
    record |= {f"lock:{part_name(lock.checkpoint.hash, spec.requires)}": lock.encode() for lock in locks}
    optional = {
        "key": spec.key,
        "gate": spec.approve_after,
        "expires_at": None if spec.expires_in is None else int(now_ms + spec.expires_in * 1000),
        "max_runtime": None if spec.max_runtime is None else int(spec.max_runtime * 1000),
        "keep_ms": None if spec.keep is None else int(spec.keep * 1000),
    }
    return record | {name: value for name, value in optional.items() if value is not None}


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
        if str(error).startswith(("MISCONF", "READONLY", "LOADING", "BUSY ", "MASTERDOWN")):
            raise Unavailable("Redis", str(error).partition(" ")[2][:200], "it may come back by itself") from error
        if "NOAUTH" not in str(error) and "WRONGPASS" not in str(error):
            raise
        raise Unavailable("Redis", "access denied", "check LATENTFARM_REDIS_URL or LATENTFARM_DATA") from error
