"""The ledger against a model in plain Python, in interleavings that nobody thought of.

`--hypothesis-profile=soak` looks longer, where a profile of that name is registered; give it `--timeout=0` too.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from latentfarm.farm import DirectFarm
from latentfarm_shared.errors import AlreadyTaken, Busy, InvalidField, UnknownName
from latentfarm_shared.ledger import Claim, ImageState, JobState, Ledger, Limits
from latentfarm_shared.ledger.queues import queue_name
from latentfarm_shared.ledger.states import FINAL
from latentfarm_shared.records import BlobFile, Lock
from latentfarm_shared.specs import JobSpec, Lane

from tests.conftest import checkpoint

LANES: tuple[Lane, ...] = ("interactive", "batch")
OWNERS = ("", "ann", "bob")
WORKERS = ("a.1", "a.2", "b.1")
NAME = "ann/fine"
DAY_MS = 86_400_000
STRIKES, OWN_DEATH, KILLED = 6, 2, 1
RECORDS = tuple(
    checkpoint(name).model_copy(
        update={"files": (BlobFile(path="unet/diffusion_pytorch_model.safetensors", sha256=digit * 64, size=1),)}
    )
    for name, digit in (("demo", "d"), ("other", "e"))
)
QUEUES = tuple(queue_name(lane, record.hash) for lane in LANES for record in RECORDS)
ASKED = (QUEUES, QUEUES[:2], QUEUES[2:], QUEUES[::2], QUEUES[1:2])

MOST_JOBS = 5
DECISIONS = ("cancel", "pause", "resume", "approve", "prioritise", "submit_again", "delete")
ENDS = ("succeed", "fail", "release", "lease_ends", "disown")
NUMBERS = st.integers(0, 7)
NO_LIMITS = Limits(weight=None, running=None, queued=None)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "lane": st.just("batch"),
        "priority": st.integers(-5, 5),
        "approve_after": st.integers(1, 4),
        "key": st.sampled_from(["k1", "k2"]),
        "order": st.sampled_from(["random", "spread"]),
        "expires_in": st.just(86_400.0),
        "max_runtime": st.just(86_400.0),
    },
)

Place = Literal["fresh", "back", "suspect", "awaiting", "unscanned"]


@dataclass
class Image:
    """One image; `place` is where it waits while it is queued, `before` what a retry under way found it to be."""

    state: ImageState = "queued"
    place: Place = "fresh"
    deaths: int = 0
    before: ImageState | None = None

    def wait(self, place: Place) -> None:
        self.state, self.place, self.before = "queued", place, None

    def end(self, state: ImageState) -> None:
        self.state, self.before = state, None


@dataclass
class ModelJob:
    """What people asked of a job and what became of its images, by position."""

    id: str
    spec: JobSpec
    owner: str
    recipe: str
    pinned: bool
    names: bool
    images: list[Image]
    queues: list[str]
    closed: Literal["canceled", "expired"] | None = None
    paused: bool = False
    gated: bool = False
    approved: bool = False
    scanning: bool = False
    unscanned_is: Literal["canceled", "expired"] | None = None
    failed_since: set[int] = field(default_factory=set)
    deleted: bool = False
    version: int = 0

    @property
    def counts(self) -> Counter[ImageState]:
        return Counter(image.state for image in self.images)

    @property
    def is_final(self) -> bool:
        return not self.scanning and all(image.state in FINAL for image in self.images)

    @property
    def is_open(self) -> bool:
        """Whether its images are handed out at all."""
        return not (self.closed or self.paused or self.deleted)

    @property
    def handed(self) -> int:
        return sum(image.place != "fresh" for image in self.images)

    @property
    def has_fresh(self) -> bool:
        return any(image.place == "fresh" for image in self.images)

    @property
    def is_behind_gate(self) -> bool:
        most = self.spec.approve_after
        return most is not None and not self.approved and self.handed >= most

    @property
    def has_ended_badly(self) -> bool:
        """Whether some of it is there to be retried."""
        return not self.counts.keys().isdisjoint({"failed", "canceled", "expired"})

    @property
    def state(self) -> JobState:
        counts = self.counts
        order: tuple[JobState, ...] = ("canceled", "expired", "failed", "succeeded")
        if self.is_final:
            return next(state for state in order if state in counts)
        if self.closed:
            return self.closed
        if self.paused or self.gated:
            return "paused"
        return "running" if counts.keys() & {"running", "succeeded", "failed"} else "queued"

    def content(self, position: int) -> str:
        """Return what an image would look like; jobs of one recipe make some of the same pictures."""
        index = self.spec.layout.index_at(position)
        what = f"{self.recipe} {index % 3}" if self.recipe else f"{self.id} {index}"
        return hashlib.sha256(what.encode()).hexdigest()

    def queue_of(self, position: int) -> str:
        parts = self.spec.layout.parts
        return next(q for q, (start, stop) in zip(self.queues, parts, strict=True) if start <= position < stop)


@dataclass(eq=False)
class Held:
    """A claim somebody was granted once; `is_live` while its token is good."""

    claim: Claim
    job: ModelJob
    worker: str
    alone: bool
    is_live: bool = True
    content: str | None = None
    renders: bool = False

    @property
    def image(self) -> Image:
        return self.job.images[self.claim.position]


has_jobs = precondition(lambda self: self.known)
has_claims = precondition(lambda self: self.live)


class LedgerMachine(RuleBasedStateMachine):
    redis: Any

    def __init__(self) -> None:
        super().__init__()
        self.redis.flushdb()
        self.ledger = Ledger(self.redis, lease_ms=DAY_MS)
        self.ledger.sweep(at_once=True)
        self.ledger.put_name(NAME, 1, '{"state":"active"}')
        self.all: list[ModelJob] = []
        self.live: dict[str, Held] = {}
        self.over: list[Held] = []
        self.have: dict[tuple[str, str], tuple[str, int]] = {}
        self.tokens: set[str] = set()
        self.limits = dict.fromkeys(OWNERS, NO_LIMITS)

    # ---- the model

    @property
    def known(self) -> list[ModelJob]:
        return [job for job in self.all if not job.deleted]

    def held_by(self, worker: str) -> list[Held]:
        return [held for held in self.live.values() if held.worker == worker]

    def running(self, owner: str) -> int:
        return sum(held.job.owner == owner for held in self.live.values())

    def queued(self, owner: str) -> int:
        return sum(job.counts["queued"] for job in self.known if job.owner == owner)

    def may_run(self, owner: str) -> bool:
        most = self.limits[owner].running
        return most is None or self.running(owner) < most

    def let_go(self, held: Held) -> None:
        """End a claim: those that wait for what it renders have their turn."""
        held.is_live = False
        self.over.append(self.live.pop(held.claim.member))
        if held.content is None:
            return
        for job in self.known:
            if job.owner == held.job.owner:
                for position, image in enumerate(job.images):
                    if image.place == "awaiting" and image.state == "queued" and job.content(position) == held.content:
                        image.wait("back")

    def give_back(self, held: Held, place: Place) -> None:
        self.let_go(held)
        if held.job.closed:
            held.image.end(held.job.closed)
        else:
            held.image.wait(place)

    def fail_image(self, held: Held) -> None:
        self.let_go(held)
        held.image.end("failed")
        if held.job.scanning:
            held.job.failed_since.add(held.claim.position)

    def die(self, held: Held, weight: int) -> None:
        if held.alone:
            held.image.deaths += weight
        if held.alone and held.image.deaths >= STRIKES:
            self.fail_image(held)
        else:
            self.give_back(held, "suspect")

    def close(self, job: ModelJob, state: Literal["canceled", "expired"]) -> None:
        if job.closed or job.is_final:
            return
        if job.scanning and job.unscanned_is:
            state = job.unscanned_is
        actual = self.ledger.states_at(job.id, range(len(job.images)))
        for image, now in zip(job.images, actual, strict=True):
            if image.before is not None:
                assert now in {image.before, state}
                image.end(now)
            elif image.state == "queued":
                image.end(state)
        job.closed, job.scanning = state, False

    def end_scan(self, job: ModelJob) -> None:
        job.scanning = False
        for image in job.images:
            if image.before is not None:
                image.wait("back")
        self.note_scanned(job)
        job.failed_since.clear()

    def note_scanned(self, job: ModelJob) -> None:
        """What failed while a retry goes on may be handed out again, if the retry has yet to come to it, or may not."""
        actual = self.ledger.states_at(job.id, range(len(job.images)))
        for position in job.failed_since:
            if job.images[position].state == "failed" and actual[position] == "queued":
                job.images[position].wait("back")
                job.images[position].deaths = 0

    def begin_retry(self, job: ModelJob, *, missing: bool) -> None:
        if job.closed or job.is_final:
            job.pinned, job.paused = job.names, False
        job.unscanned_is = job.unscanned_is if job.scanning else job.closed
        job.failed_since.clear()
        for image in job.images:
            if image.state == "failed" or (missing and image.state in {"canceled", "expired"}):
                if image.place == "fresh":
                    image.wait("fresh")
                else:
                    image.before, image.state, image.place, image.deaths = image.state, "queued", "unscanned", 0
        job.closed, job.scanning = None, True

    def must_hand_out(self, worker: str, asked: Sequence[str]) -> bool:
        """Tell whether this worker, asking now, is to get an image."""
        mine = self.held_by(worker)
        if any(held.alone for held in mine):
            return False
        suspects = list(self.waiting_in(asked, "suspect"))
        if mine and suspects:
            return False
        if any(not self.redis.exists(f"lf:lone:{job.id}/{position}") for job, position in suspects):
            return True
        back, fresh = self.waiting_in(asked, "back"), self.waiting_in(asked, "fresh")
        return any(self.may_run(job.owner) for job, _ in back) or any(
            self.may_run(job.owner) and not job.is_behind_gate for job, _ in fresh
        )

    def waiting_in(self, asked: Sequence[str], place: Place) -> Iterator[tuple[ModelJob, int]]:
        for job in self.known:
            for position, image in enumerate(job.images if job.is_open else []):
                if image.state == "queued" and image.place == place and job.queue_of(position) in asked:
                    yield job, position

    # ---- jobs

    def job(self, number: int) -> ModelJob:
        return self.known[number % len(self.known)]

    @initialize(count=st.integers(2, 4), two=st.booleans(), fields=FIELDS)
    def begin(self, count: int, *, two: bool, fields: Mapping[str, Any]) -> None:
        self.submit("", count, two=two, recipe="x", pinned=True, fields=fields)

    @precondition(lambda self: len(self.known) < MOST_JOBS)
    @rule(
        owner=st.sampled_from(OWNERS),
        count=st.integers(1, 5),
        two=st.booleans(),
        recipe=st.sampled_from(["x", "y", ""]),
        pinned=st.booleans(),
        fields=FIELDS,
    )
    def submit(
        self, owner: str, count: int, *, two: bool, recipe: str, pinned: bool, fields: Mapping[str, Any]
    ) -> None:
        axes = {"axes": [{"field": "model", "values": [record.name for record in RECORDS]}]} if two else {}
        spec = JobSpec.model_validate({"prompt": "a", "seed": 1, "count": count} | axes | dict(fields))
        locks = [Lock(checkpoint=record, owner=owner) for record in RECORDS[: 1 + two]]
        job, pins = f"job{len(self.all)}", [(NAME, "content")] if pinned else []
        old = next((j for j in self.known if spec.key and (j.owner, j.spec.key) == (owner, spec.key)), None)
        most = self.limits[owner].queued
        if old is None and most is not None and self.queued(owner) + spec.total > most:
            with pytest.raises(Busy):
                self.ledger.submit(job, spec, locks, pins)
            return
        done = self.ledger.submit(job, spec, locks, pins)
        assert (done.job, done.is_new) == ((old.id, False) if old else (job, True))
        if old is None:
            queues = [queue_name(spec.lane, lock.checkpoint.hash) for lock in locks]
            images = [Image() for _ in range(spec.total)]
            self.all.append(ModelJob(job, spec, owner, recipe, pinned, pinned, images, queues))

    @has_jobs
    @rule(what=st.sampled_from(DECISIONS), number=NUMBERS)
    def people_decide(self, what: str, number: int) -> None:
        getattr(self, what)(number)

    def submit_again(self, number: int) -> None:
        job, other = self.job(number), JobSpec(prompt="b", seed=9, count=9)
        done = self.ledger.submit(job.id, other, [Lock(checkpoint=RECORDS[0], owner=job.owner)])
        assert (done.job, done.is_new) == (job.id, False)
        with pytest.raises(AlreadyTaken):
            self.ledger.submit(job.id, other, [Lock(checkpoint=RECORDS[0], owner="somebody")])

    def cancel(self, number: int) -> None:
        job = self.job(number)
        self.ledger.cancel(job.id)
        self.close(job, "canceled")

    def pause(self, number: int) -> None:
        job = self.job(number)
        self.ledger.pause(job.id)
        if not job.closed and not job.is_final:
            job.paused = True

    def resume(self, number: int) -> None:
        job = self.job(number)
        self.ledger.resume(job.id)
        job.paused = False

    def approve(self, number: int) -> None:
        job = self.job(number)
        self.ledger.approve(job.id)
        job.approved = True
        job.gated = False

    def prioritise(self, number: int) -> None:
        job = self.job(number).id
        self.ledger.prioritise(job, number)
        assert self.ledger.status(job).priority == number

    @precondition(lambda self: any(job.has_ended_badly for job in self.known))
    @rule(number=NUMBERS, missing=st.booleans(), vanishes=st.booleans())
    def retry(self, number: int, *, missing: bool, vanishes: bool) -> None:
        worse = [job for job in self.known if job.has_ended_badly]
        job = worse[number % len(worse)]
        if job.closed and not missing and job.counts.keys() & {"canceled", "expired", "running"}:
            with pytest.raises(InvalidField):
                self.ledger.retry(job.id)
            return
        self.begin_retry(job, missing=missing)
        if vanishes:
            self.ledger._call("retry", job.id, int(missing))
            return
        self.ledger.retry(job.id, missing=missing)
        if job.scanning:
            self.end_scan(job)

    @precondition(lambda self: any(job.scanning for job in self.known))
    @rule(images=st.integers(1, 2), states=st.integers(1, 3))
    def scan_a_little(self, images: int, states: int) -> None:
        for job in self.known:
            if job.scanning:
                (self.note_scanned if self.ledger._call("scan", job.id, images, states) else self.end_scan)(job)

    @precondition(lambda self: self.redis.exists("lf:deadlines"))
    @rule(number=NUMBERS)
    def expire(self, number: int) -> None:
        jobs = [name.decode() for name in self.redis.zrange("lf:deadlines", 0, -1)]
        name = jobs[number % len(jobs)]
        self.redis.zadd("lf:deadlines", {name: 1})
        self.ledger._call("due", 50)
        self.close(next(job for job in self.known if job.id == name), "expired")

    def delete(self, number: int) -> None:
        job = self.job(number)
        job.deleted = job.is_final
        assert self.ledger.delete(job.id) == job.deleted
        if job.deleted:
            with pytest.raises(UnknownName):
                self.ledger.resume(job.id)

    @rule(owner=st.sampled_from(OWNERS), running=st.none() | st.integers(1, 3), queued=st.none() | st.integers(0, 9))
    def limit(self, owner: str, running: int | None, queued: int | None) -> None:
        self.limits[owner] = Limits(weight=None, running=running, queued=queued)
        self.ledger.set_limits(owner, self.limits[owner])

    # ---- claims

    def held(self, number: int) -> Held:
        return list(self.live.values())[number % len(self.live)]

    @rule(worker=st.sampled_from(WORKERS), times=st.integers(1, 4))
    def claim(self, worker: str, times: int) -> None:
        for _ in range(times):
            self.claimed(worker, QUEUES)

    @rule(worker=st.sampled_from(WORKERS), asked=st.sampled_from(ASKED), cold=st.sets(st.sampled_from(QUEUES)))
    def claim_from_some(self, worker: str, asked: Sequence[str], cold: set[str]) -> None:
        self.claimed(worker, asked, cold)

    def claimed(self, worker: str, asked: Sequence[str], cold: set[str] | None = None) -> Held | None:
        found = self.ledger.claim(worker, asked, cold or ())
        for job in self.known:
            gated = self.redis.hget(f"lf:job:{job.id}", "gated") == b"1"
            assert not gated or job.gated or (job.is_behind_gate and job.has_fresh)
            job.gated = gated
        if found is None:
            assert not self.must_hand_out(worker, asked)
            return None
        job = next(job for job in self.known if job.id == found.job)
        image, mine = job.images[found.position], self.held_by(worker)
        assert found.queue == job.queue_of(found.position)
        assert found.queue in asked
        assert found.token not in self.tokens
        assert job.is_open
        assert (image.state, image.place == "awaiting") == ("queued", False)
        assert found.doubtful == (image.place != "fresh")
        assert not any(held.alone for held in mine)
        alone = image.place == "suspect"
        assert not mine if alone else self.may_run(job.owner)
        assert image.place != "fresh" or not job.is_behind_gate
        image.wait("back")
        image.state = "running"
        held = Held(found, job, worker, alone)
        self.tokens.add(found.token)
        self.live[found.member] = held
        return held

    @has_claims
    @rule(number=NUMBERS)
    def reserve(self, number: int) -> None:
        held = self.held(number)
        content = held.job.content(held.claim.position)
        name = held.job.owner, content
        rendered = [(h.job.owner, h.content) for h in self.live.values() if h.renders and h is not held]
        found = self.ledger.reserve(held.claim, content)
        assert (found.have, found.render) == (self.have.get(name), name not in self.have and name not in rendered)
        if name in rendered and name not in self.have:
            self.give_back(held, "awaiting")
        else:
            held.content, held.renders = content, held.renders or found.render

    @has_claims
    @rule(how=st.sampled_from(ENDS), number=NUMBERS)
    def claim_ends(self, how: str, number: int) -> None:
        held = self.held(number)
        assert self.ledger.progress(held.claim, {"stage": "x"}) == (not held.job.closed)
        getattr(self, how)(number)

    def succeed(self, number: int) -> None:
        held = self.held(number)
        assert self.ledger.succeed(held.claim, held.worker, 5)
        if held.content is not None:
            self.have[held.job.owner, held.content] = held.job.id, held.claim.position
        self.let_go(held)
        held.image.end("succeeded")

    def fail(self, number: int) -> None:
        held = self.held(number)
        assert self.ledger.fail(held.claim, held.worker, "X", "x")
        self.fail_image(held)

    def release(self, number: int) -> None:
        held = self.held(number)
        assert self.ledger.release(held.claim, held.worker)
        self.give_back(held, "back")

    def disown(self, number: int) -> None:
        held = self.held(number)
        assert not self.ledger.disown("stranger.1", held.claim.member)
        assert self.ledger.disown(held.worker, held.claim.member)
        self.give_back(held, "back")

    @precondition(lambda self: self.over)
    @rule(number=NUMBERS)
    def come_too_late(self, number: int) -> None:
        held = self.over[-1 - number % len(self.over)]
        found = self.ledger.reserve(held.claim, held.job.content(held.claim.position))
        assert (found.render, found.have) == (False, None)
        assert not self.ledger.succeed(held.claim, held.worker, 7)
        assert not self.ledger.fail(held.claim, held.worker, "LATE", "late")
        assert not self.ledger.release(held.claim, held.worker)
        assert not self.ledger.progress(held.claim, {"stage": "late"})

    # ---- workers

    @rule(worker=st.sampled_from(WORKERS))
    def time_passes(self, worker: str) -> None:
        self.beat(worker)
        self.lone_workers_take_too_long()
        self.sweep()

    def beat(self, worker: str) -> None:
        orders = self.ledger.beat(worker, {"slots": 4, "queues": ",".join(QUEUES)})
        assert sorted(orders.closed) == sorted(held.claim.member for held in self.held_by(worker) if held.job.closed)
        assert self.ledger.claims(worker) == {held.claim.member for held in self.held_by(worker)}

    def lease_ends(self, number: int) -> None:
        self.redis.zadd("lf:leases", {self.held(number).claim.member: 1})
        self.sweep()

    def sweep(self) -> None:
        ended = [member.decode() for member in self.redis.zrangebyscore("lf:leases", 0, 1)]
        self.ledger.sweep(at_once=True)
        for member in ended:
            self.die(self.live[member], KILLED)
        for job in self.known:
            if job.scanning:
                self.end_scan(job)

    @rule(worker=st.sampled_from(WORKERS), killed=st.booleans())
    def bury(self, worker: str, *, killed: bool = False) -> None:
        mine = self.held_by(worker)
        assert self.ledger.bury(worker, killed=killed) == len(mine)
        for held in mine:
            self.die(held, KILLED if killed else OWN_DEATH)

    @rule(times=st.integers(1, STRIKES), killed=st.booleans())
    def workers_die_one_by_one(self, times: int, *, killed: bool) -> None:
        for _ in range(times):
            if self.claimed("haunted.1", QUEUES) is not None:
                self.bury("haunted.1", killed=killed)

    def lone_workers_take_too_long(self) -> None:
        for key in self.redis.keys("lf:lone:*"):
            self.redis.delete(key)

    # ---- what always holds

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        self.jobs_are_as_the_model_says()
        self.usage_load_and_pins_are_what_the_jobs_come_to()
        self.who_waits_for_an_identical_image_waits_for_a_live_claim()

    def jobs_are_as_the_model_says(self) -> None:
        for job in self.known:
            status = self.ledger.status(job.id)
            layout, total = job.spec.layout, len(job.images)
            states = self.ledger.image_states(job.id, 0, total)
            assert status.version >= job.version
            job.version = status.version
            assert status.is_final == job.is_final
            if not job.scanning:
                assert states == [job.images[layout.position_of(index)].state for index in range(total)]
                assert status.counts == {state: states.count(state) for state in status.counts}
                assert status.state == job.state
            if status.is_final:
                assert self.redis.hget(f"lf:job:{job.id}", "pinned") != b"1"
                assert self.redis.zscore("lf:deadlines", job.id) is None
                job.pinned = False

    def who_waits_for_an_identical_image_waits_for_a_live_claim(self) -> None:
        rendered = {(held.job.owner, held.content) for held in self.live.values() if held.renders}
        for job in self.known:
            for position, image in enumerate(job.images):
                if image.state == "queued" and image.place == "awaiting":
                    assert (job.owner, job.content(position)) in rendered

    def usage_load_and_pins_are_what_the_jobs_come_to(self) -> None:
        assert int(self.redis.hget("lf:pins", NAME) or 0) == sum(job.pinned for job in self.known)
        for owner in OWNERS:
            assert self.ledger.usage(owner)["running"] == self.running(owner)
        if any(job.scanning for job in self.known):
            return
        for owner in OWNERS:
            assert self.ledger.usage(owner)["queued"] == self.queued(owner)
        for lane in LANES:
            waits = sum(job.counts["queued"] * job.spec.mean_cost for job in self.known if job.spec.lane == lane)
            assert float(self.redis.hget("lf:load", lane) or 0) == pytest.approx(waits, abs=1)

    def teardown(self) -> None:
        """Let everything go on: then it ends, and leaves nothing behind."""
        for owner in OWNERS:
            self.limit(owner, None, None)
        for number in range(len(self.known)):
            self.resume(number)
            self.approve(number)
        for worker in WORKERS:
            self.bury(worker)
        self.sweep()
        self.lone_workers_take_too_long()
        while self.claimed("fresh.1", QUEUES) is not None:
            self.succeed(0)
        self.all_is_as_the_model_says()
        assert [job.id for job in self.known if not job.is_final] == []
        for job in self.known:
            assert [event.version for event in self.ledger.events(job.id)] == list(range(1, job.version + 1))
        kinds = (
            "leases",
            "claim:*",
            "owners:*",
            "ready:*",
            "where:*",
            "suspects:*",
            "rendering:*",
            "scans",
            "deadlines",
        )
        parts = ("returned:*", "suspects:*", "awaiting:*")
        patterns = [*(f"lf:{kind}" for kind in kinds), *(f"lf:job:*:{part}" for part in parts)]
        assert [key for pattern in patterns for key in self.redis.keys(pattern)] == []


def test_ledger_does_what_the_model_says(servers: DirectFarm) -> None:
    is_soak = settings.get_current_profile_name() == "soak"
    amount = settings() if is_soak else settings(max_examples=40, stateful_step_count=40, derandomize=True)

    class OnThisServer(LedgerMachine):
        redis = servers.ledger.redis

    checks = settings(amount, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(OnThisServer, settings=checks)
    servers.ledger.redis.flushdb()
