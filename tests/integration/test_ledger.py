"""The ledger on a real Valkey."""

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from latentfarm.farm import DirectFarm
from latentfarm_shared.errors import AlreadyTaken, InvalidField, Unavailable, UnknownName
from latentfarm_shared.ledger import Claim, Ledger
from latentfarm_shared.ledger.queues import queue_name
from latentfarm_shared.records import Lock
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import JobSpec

from tests.conftest import checkpoint

RECORD = checkpoint()
QUEUE = queue_name("interactive", RECORD.hash)
BATCH_QUEUE = queue_name("batch", RECORD.hash)
QUEUES = (QUEUE, BATCH_QUEUE)


@pytest.fixture
def ledger(servers: DirectFarm) -> Iterator[Ledger]:
    servers.ledger.redis.flushdb()
    servers.ledger.sweep(at_once=True)
    yield servers.ledger
    servers.ledger.redis.flushdb()


def submit(ledger: Ledger, count: int = 3, **values: Any) -> str:
    job = secrets.token_hex(8)
    ledger.submit(job, JobSpec(prompt="a", seed=1, count=count, **values), [Lock(checkpoint=RECORD)])
    return job


def claim(ledger: Ledger, worker: str = "w1") -> Claim:
    found = ledger.claim(worker, QUEUES)
    assert found is not None
    return found


def end_leases(ledger: Ledger, of: str = "") -> None:
    """Put the end of every lease, or of those whose member ends so, into the past."""
    members: list[bytes] = ledger.redis.zrange("lf:leases", 0, -1)
    for member in members:
        if member.decode().endswith(of):
            ledger.redis.zadd("lf:leases", {member: 1})


def lapse(ledger: Ledger) -> None:
    """Let every lease end now."""
    end_leases(ledger)
    ledger.sweep(at_once=True)


def waiting(ledger: Ledger) -> int:
    return ledger.usage("")["queued"]


def test_images_are_handed_out_once_and_counted(ledger: Ledger) -> None:
    job = submit(ledger)
    claims = [claim(ledger) for _ in range(3)]

    assert [c.index for c in claims] == [0, 1, 2]
    assert ledger.claim("w2", QUEUES) is None
    assert ledger.status(job).counts["running"] == 3
    assert all(ledger.succeed(c, "w1") for c in claims)
    status = ledger.status(job)
    assert (status.state, status.counts["succeeded"], status.is_final) == ("succeeded", 3, True)
    assert ledger.image_states(job, 0, 3) == ["succeeded"] * 3


def test_stamp_changes_whenever_status_or_images_do(ledger: Ledger) -> None:
    job = submit(ledger, 6)
    held: list[Claim] = []

    def take() -> None:
        held.append(claim(ledger))

    def scan() -> None:
        ledger.retry(job, missing=True)
        for _ in range(5):
            ledger.sweep(at_once=True)

    steps: list[Callable[[], object]] = [
        take, take, take,
        lambda: ledger.release(held.pop(), "w1"),
        lambda: ledger.succeed(held.pop(), "w1"),
        lambda: ledger.fail(held.pop(), "w1", "RENDER_FAILED", "why"),
        take, lambda: ledger.pause(job), lambda: ledger.resume(job), lambda: ledger.prioritise(job, 4),
        lambda: lapse(ledger), lambda: ledger.cancel(job), scan, take, lambda: ledger.succeed(held.pop(), "w1"),
    ]  # fmt: skip
    for number, step in enumerate(steps):
        before = ledger.status(job), ledger.image_states(job, 0, 6), ledger.stamps([job])
        step()
        after = ledger.status(job), ledger.image_states(job, 0, 6), ledger.stamps([job])
        assert before[:2] != after[:2], number
        assert before[2] != after[2], number


def test_submitting_again_changes_nothing(ledger: Ledger) -> None:
    job = submit(ledger)
    again = ledger.submit(job, JobSpec(prompt="other", seed=9, count=50), [Lock(checkpoint=RECORD)])

    assert not again.is_new
    assert ledger.status(job).total == 3
    assert waiting(ledger) == 3


def test_job_with_a_failed_image_is_failed_and_tells_why(ledger: Ledger) -> None:
    job = submit(ledger, 2)
    ledger.succeed(claim(ledger), "w1")
    ledger.fail(claim(ledger), "w1", "RENDER_FAILED", "why")

    assert ledger.status(job).state == "failed"
    assert ledger.image_error(job, 1) == {"code": "RENDER_FAILED", "message": "why", "worker": "w1"}
    assert ledger.image_error(job, 0) is None


def test_interactive_goes_before_batch(ledger: Ledger) -> None:
    submit(ledger, lane="batch")
    urgent = submit(ledger, 1)

    assert claim(ledger).job == urgent


def test_older_job_goes_first(ledger: Ledger) -> None:
    first, second = submit(ledger, 1), submit(ledger, 1)

    assert [claim(ledger).job, claim(ledger).job] == [first, second]


def test_released_image_runs_again_without_a_mark(ledger: Ledger) -> None:
    job = submit(ledger, 2)
    first, second = claim(ledger), claim(ledger)

    assert ledger.release(first, "w1")
    assert waiting(ledger) == 1
    again = claim(ledger, "w2")
    assert (again.index, again.token != first.token) == (0, True)
    assert ledger.succeed(again, "w2")
    assert ledger.succeed(second, "w1")
    assert ledger.status(job).state == "succeeded"


def test_worker_that_lost_its_lease_cannot_publish(ledger: Ledger) -> None:
    job = submit(ledger, 1)
    lost = claim(ledger, "dead")
    lapse(ledger)
    held = claim(ledger, "alive")

    assert not ledger.succeed(lost, "dead")
    assert not ledger.fail(lost, "dead", "X", "x")
    assert not ledger.release(lost, "dead")
    assert ledger.succeed(held, "alive")
    assert ledger.status(job).counts["succeeded"] == 1


def test_beat_keeps_leases_and_silence_ends_them(ledger: Ledger) -> None:
    ledger = Ledger(ledger.redis, lease_ms=300)
    job = submit(ledger, 1)
    claim(ledger)
    for _ in range(3):
        time.sleep(0.15)
        ledger.beat("w1", {"slots": 1})
        ledger.sweep(at_once=True)
    assert ledger.status(job).counts["running"] == 1

    for _ in range(8):
        time.sleep(0.1)
        ledger.sweep(at_once=True)

    assert ledger.status(job).counts["queued"] == 1


def test_suspect_runs_alone(ledger: Ledger) -> None:
    submit(ledger, 4)
    claim(ledger, "dead")
    lapse(ledger)
    kept = claim(ledger, "fresh")
    assert kept.index == 0
    assert ledger.claim("fresh", QUEUES) is None
    assert ledger.succeed(kept, "fresh")

    others = [claim(ledger, "fresh").index for _ in range(3)]

    assert others == [1, 2, 3]


def test_busy_worker_frees_itself_for_a_suspect(ledger: Ledger) -> None:
    submit(ledger, 3)
    claim(ledger, "dead")
    mine = claim(ledger, "busy")
    end_leases(ledger, of="/0")
    ledger.sweep(at_once=True)

    assert ledger.claim("busy", QUEUES) is None
    ledger.succeed(mine, "busy")
    assert claim(ledger, "busy").index == 0


def test_only_the_poison_among_innocents_is_quarantined(ledger: Ledger) -> None:
    job = submit(ledger, 8)
    for number in range(8):
        assert claim(ledger, "together").index == number
    lapse(ledger)
    for _ in range(30):
        found = ledger.claim("w", QUEUES)
        if found is None:
            break
        if found.index == 5:
            lapse(ledger)
        else:
            ledger.succeed(found, "w")

    status = ledger.status(job)
    assert (status.counts["succeeded"], status.counts["failed"], status.state) == (7, 1, "failed")
    error = ledger.image_error(job, 5)
    assert error is not None
    assert error["code"] == "QUARANTINED"


def test_cancel_stops_what_waits_and_tells_who_renders(ledger: Ledger) -> None:
    job = submit(ledger, 5)
    held, other = claim(ledger), claim(ledger)
    ledger.cancel(job)

    assert sorted(ledger.beat("w1", {"slots": 2}).closed) == sorted([held.member, other.member])
    assert ledger.claim("w1", QUEUES) is None
    assert ledger.release(held, "w1")
    assert ledger.succeed(other, "w1")
    status = ledger.status(job)
    assert status.counts == {
        "queued": 0, "running": 0, "succeeded": 1, "failed": 0, "canceled": 4, "expired": 0
    }  # fmt: skip
    assert (status.state, status.is_final, waiting(ledger)) == ("canceled", True, 0)
    assert ledger.image_states(job, 0, 5) == ["canceled", "succeeded", "canceled", "canceled", "canceled"]


def test_wake_ups_are_as_many_as_images_or_free_slots(ledger: Ledger) -> None:
    submit(ledger, 10)
    assert ledger.ring(QUEUE) == []
    ledger.beat("w1", {"slots": 2, "reserve": 2, "queues": ",".join(QUEUES), "draining": 0})
    ledger.beat("w2", {"slots": 9, "queues": "other", "draining": 0})
    ledger.beat("w3", {"slots": 9, "queues": ",".join(QUEUES), "draining": 1})

    tickets = ledger.ring(QUEUE)

    assert len(tickets) == 4
    assert ledger.ring(QUEUE) == []
    ledger.answered(QUEUE, tickets[0])
    assert len(ledger.ring(QUEUE)) == 1


def test_reserve_is_for_the_interactive_lane(ledger: Ledger) -> None:
    submit(ledger, 10, lane="batch")
    ledger.beat("w1", {"slots": 2, "reserve": 2, "queues": ",".join(QUEUES), "draining": 0})

    assert len(ledger.ring(BATCH_QUEUE)) == 2


def test_acknowledgement_waits_for_the_log_on_disk(ledger: Ledger) -> None:
    def waits() -> int:
        return int(ledger.redis.info("commandstats").get("cmdstat_waitaof", {}).get("calls", 0))

    before = waits()
    ledger.acknowledge()

    assert waits() == before + 1
    assert ledger.redis.info("commandstats")["cmdstat_waitaof"]["failed_calls"] == 0


def test_lost_wake_up_is_rung_again(ledger: Ledger) -> None:
    ledger = Ledger(ledger.redis, wake_up_stale_ms=50)
    submit(ledger, 1)
    ledger.beat("w1", {"slots": 4, "queues": ",".join(QUEUES), "draining": 0})
    assert len(ledger.sweep(at_once=True)) == 1

    time.sleep(0.1)

    assert len(ledger.sweep(at_once=True)) == 1


def test_leases_get_a_fresh_period_after_the_server_was_away(ledger: Ledger) -> None:
    job = submit(ledger, 1)
    claim(ledger)
    ledger.sweep(at_once=True)
    ledger.redis.hset("lf:epoch", "run_id", "another server")
    ledger.redis.script_flush()  # as in a server that has just started
    end_leases(ledger)

    ledger.sweep(at_once=True)

    assert ledger.status(job).counts["running"] == 1


def test_leases_get_a_fresh_period_after_nobody_could_sweep(ledger: Ledger) -> None:
    job = submit(ledger, 1)
    claim(ledger)
    ledger.sweep(at_once=True)
    ledger.redis.hset("lf:epoch", "swept", 1)
    end_leases(ledger)

    ledger.sweep(at_once=True)

    assert ledger.status(job).counts["running"] == 1


def test_claim_a_worker_knows_nothing_of_is_handed_back(ledger: Ledger) -> None:
    job = submit(ledger, 1)
    held = claim(ledger, "w1")

    assert ledger.claims("w1") == {held.member}
    assert not ledger.disown("w2", held.member)
    assert ledger.disown("w1", held.member)
    assert ledger.claims("w1") == set()
    assert ledger.status(job).counts["queued"] == 1
    assert claim(ledger, "w2").index == 0


def test_job_nobody_can_read_fails_and_holds_up_nothing(ledger: Ledger) -> None:
    broken, fine = submit(ledger, 2), submit(ledger, 1)
    ledger.redis.hset(f"lf:job:{broken}", f"lock:{RECORD.hash}", "{}")

    assert claim(ledger).job == fine
    error = ledger.image_error(broken, 0)
    assert error is not None
    assert error["code"] == "UNREADABLE_JOB"


def test_transitions_do_not_grow_with_the_job(ledger: Ledger) -> None:
    job = submit(ledger, 1_000_000)
    before = ledger.redis.info("memory")["used_memory"]
    found = claim(ledger)
    ledger.succeed(found, "w1")

    assert ledger.status(job).counts["queued"] == 999_999
    assert ledger.redis.info("memory")["used_memory"] - before < 2_000_000


def look_through(ledger: Ledger, job: str) -> None:
    while ledger._call("scan", job, 200, 10_000):
        pass


def finish_all(ledger: Ledger) -> int:
    done = 0
    while found := ledger.claim("last", QUEUES):
        ledger.succeed(found, "last")
        done += 1
    return done


@pytest.mark.parametrize("dies", [False, True])
def test_image_handed_back_while_a_retry_begins_is_handed_out_once(ledger: Ledger, *, dies: bool) -> None:
    job = submit(ledger, 2)
    held = claim(ledger)
    ledger.cancel(job)
    ledger._call("retry", job, 1)
    ledger.bury("w1") if dies else ledger.release(held, "w1")
    look_through(ledger, job)

    assert finish_all(ledger) == 2
    status = ledger.status(job)
    assert (status.state, status.counts["succeeded"]) == ("succeeded", 2)
    assert ledger.usage("") == {"queued": 0, "running": 0}


def test_cancel_while_an_expired_job_is_retried_keeps_the_counters(ledger: Ledger) -> None:
    job = submit(ledger, 3, expires_in=100)
    ledger.release(claim(ledger), "w1")
    ledger.redis.zadd("lf:deadlines", {job: 1})
    ledger.sweep(at_once=True)
    ledger._call("retry", job, 1)
    ledger.cancel(job)
    ledger.retry(job, missing=True)

    assert finish_all(ledger) == 3
    assert ledger.status(job).state == "succeeded"


def test_gate_holds_back_only_what_nobody_has_had(ledger: Ledger) -> None:
    job = submit(ledger, 5, approve_after=2)
    first, second = claim(ledger), claim(ledger)
    assert ledger.claim("w1", QUEUES) is None
    assert ledger.status(job).reason == "approval"
    ledger.release(first, "w1")

    again = claim(ledger)
    assert again.index == 0
    assert ledger.claim("w1", QUEUES) is None
    assert all(ledger.succeed(c, "w1") for c in (again, second))
    ledger.approve(job)
    assert finish_all(ledger) == 3


def test_gate_at_the_end_holds_back_nothing(ledger: Ledger) -> None:
    job = submit(ledger, 2, approve_after=2)
    claims = [claim(ledger), claim(ledger)]

    assert ledger.claim("w1", QUEUES) is None
    assert ledger.status(job).state == "running"
    assert all(ledger.succeed(c, "w1") for c in claims)


def test_resume_of_an_expired_job_is_remembered(ledger: Ledger) -> None:
    job = submit(ledger, 2, expires_in=100)
    ledger.pause(job)
    ledger.redis.zadd("lf:deadlines", {job: 1})
    ledger.sweep(at_once=True)
    ledger.resume(job)
    ledger.retry(job, missing=True)

    assert finish_all(ledger) == 2


def test_plain_retry_of_a_canceled_job_says_what_to_do(ledger: Ledger) -> None:
    job, failed = submit(ledger, 2), submit(ledger, 1)
    ledger.cancel(job)
    with pytest.raises(InvalidField, match="--missing"):
        ledger.retry(job)
    held = claim(ledger)
    ledger.cancel(failed)
    ledger.fail(held, "w1", "X", "x")
    ledger.retry(failed)

    assert finish_all(ledger) == 1
    assert ledger.status(failed).state == "succeeded"


def test_those_that_wait_for_one_picture_all_have_their_turn(ledger: Ledger) -> None:
    submit(ledger, 1)
    first, content = claim(ledger), "c" * 64
    assert ledger.reserve(first, content).render
    jobs = [submit(ledger, 1) for _ in range(230)]
    for _ in jobs:
        assert not ledger.reserve(claim(ledger, "w2"), content).render
    for job in jobs[:225]:
        ledger.cancel(job)
    ledger.fail(first, "w1", "X", "x")
    for _ in range(3):
        ledger.sweep(at_once=True)

    assert finish_all(ledger) == 5


def test_retry_of_a_job_that_goes_on_keeps_its_deadline(ledger: Ledger) -> None:
    job = submit(ledger, 3, max_runtime=100)
    ledger.retry(job)
    claim(ledger)

    assert ledger.redis.zscore("lf:deadlines", job)


def test_retried_job_holds_on_to_its_names_again(ledger: Ledger) -> None:
    ledger.put_name("/n", 1, '{"state":"active"}')
    ledger.submit("j1", JobSpec(prompt="a", seed=1), [Lock(checkpoint=RECORD)], [("/n", "content")])
    ledger.fail(claim(ledger), "w1", "X", "x")
    assert ledger.redis.hget("lf:pins", "/n") is None
    ledger.retry("j1")

    assert ledger.take_name("/n", force=False) == 1


def test_plain_retry_of_a_canceled_job_in_flight_does_not_reopen_it(ledger: Ledger) -> None:
    job = submit(ledger, 1)
    held = claim(ledger)
    ledger.cancel(job)
    with pytest.raises(InvalidField, match="--missing"):
        ledger.retry(job)
    ledger.release(held, "w1")

    assert ledger.status(job).state == "canceled"


def test_retry_of_a_job_that_was_paused_and_canceled_goes_on(ledger: Ledger) -> None:
    job = submit(ledger, 1)
    ledger.pause(job)
    ledger.cancel(job)
    ledger.retry(job, missing=True)

    assert finish_all(ledger) == 1


def test_batch_has_its_turn_on_a_worker_whatever_others_do(ledger: Ledger) -> None:
    submit(ledger, 5, lane="batch")
    submit(ledger, 9)
    ledger.redis.set(f"lf:served:{BATCH_QUEUE}", 1)
    ledger.claim("idle", ["interactive:other", "batch:other"])

    assert claim(ledger).queue == BATCH_QUEUE
    assert claim(ledger).queue == QUEUE


def test_owner_whose_job_nobody_can_serve_earns_nothing_by_it(ledger: Ledger) -> None:
    def submit_as(owner: str, count: int, **values: Any) -> None:
        spec = JobSpec(prompt="a", seed=1, count=count, **values)
        ledger.submit(secrets.token_hex(8), spec, [Lock(checkpoint=RECORD, owner=owner)])

    submit_as("parked", 1, requires=("nobody",))
    submit_as("ada", 30)
    for _ in range(30):
        ledger.succeed(claim(ledger), "w1")
    submit_as("parked", 10)
    submit_as("bob", 10)
    owners = [claim(ledger).lock.owner for _ in range(8)]

    assert owners.count("parked") == 4


def test_owners_that_are_served_leave_nothing_to_look_through(ledger: Ledger) -> None:
    for number in range(300):
        ledger.submit(f"j{number}", JobSpec(prompt="a", seed=1), [Lock(checkpoint=RECORD, owner=f"o{number}")])
    for _ in range(300):
        ledger.succeed(claim(ledger), "w1")

    assert ledger.redis.exists(f"lf:owners:{QUEUE}") == 0
    assert ledger.redis.keys("lf:ready:*") == []


def test_unfinished_jobs_do_not_hide_finished_ones_from_the_manifest(ledger: Ledger) -> None:
    for _ in range(25):
        submit(ledger, 2)
        job = claim(ledger)
        ledger.succeed(job, "w1")
        ledger.pause(job.job)
        ledger.written(job.job, ledger.touched(job.job))
    finished = submit(ledger, 1)
    ledger.succeed(claim(ledger), "w1")

    assert ledger.dirty() == [finished]


def test_picture_that_was_there_is_no_render(ledger: Ledger) -> None:
    job = submit(ledger, 2)
    ledger.succeed(claim(ledger), "w1", 0)
    ledger.succeed(claim(ledger), "w1", 100)

    assert ledger.status(job).starts == 1


def test_unknown_job_is_an_error_not_a_state(ledger: Ledger) -> None:
    with pytest.raises(UnknownName):
        ledger.status("nope")
    with pytest.raises(UnknownName):
        ledger.cancel("nope")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"redis_password": "wrong"}, "denied"), ({"redis_url": "redis://127.0.0.1:1/0"}, "no answer")],
)
def test_redis_trouble_is_one_sentence(servers: DirectFarm, change: dict[str, str], says: str) -> None:
    settings: Settings = servers.settings.model_copy(update=change)

    with pytest.raises(Unavailable, match=says):
        Ledger.connect(settings).check()


def test_key_that_comes_with_another_request_is_refused(ledger: Ledger) -> None:
    spec = JobSpec(prompt="a", seed=1, key="mine")
    first = ledger.submit("j1", spec, [Lock(checkpoint=RECORD)], request="digest")

    assert ledger.submit("j2", spec, [Lock(checkpoint=RECORD)], request="digest").job == first.job
    assert ledger.submitted("", "mine", request="digest") == first.job
    assert ledger.submitted("", job="j1", request="digest") == first.job
    assert ledger.submitted("", "other") is None
    assert ledger.submitted("somebody", job="j1") is None
    with pytest.raises(AlreadyTaken, match="j1"):
        ledger.submit("j2", spec, [Lock(checkpoint=RECORD)], request="another")
    with pytest.raises(AlreadyTaken, match="j1"):
        ledger.submitted("", "mine", request="another")


def test_jobs_come_page_by_page(ledger: Ledger) -> None:
    for number in range(5):
        ledger.submit(f"j{number}", JobSpec(prompt="a", seed=1), [Lock(checkpoint=RECORD, owner="me")])

    page, cursor = ledger.jobs_before(2, owner="me")
    ledger.submit("late", JobSpec(prompt="a", seed=1), [Lock(checkpoint=RECORD, owner="me")])
    rest, end = ledger.jobs_before(3, cursor, "me")

    assert [s.id for s in page + rest] == ["j4", "j3", "j2", "j1", "j0"]
    assert ledger.jobs_before(3, end, "me") == ([], None)
