"""Faults on real servers and real processes: every picture exactly once, no manual step.

The short form runs with every test; `make soak` runs the long one.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.yard import Yard, beside, yard

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1500)]
STORM_S = float(os.environ.get("STORM_S", "60"))
FAULT_S = float(os.environ.get("FAULT_S", "20"))
WORKERS, IMAGES, KILL_EVERY_S = 4, 2000, 2.0
IMAGE_S = 0.1
FAULTY_IMAGE_S = IMAGE_S * max(1.0, FAULT_S / 20)  # so that the images last as long as what goes wrong


class Clock:
    """Tells a fault when to stop. Faults run in the main thread, for servers die with the thread that starts them."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def wait(self, seconds: float) -> bool:
        time.sleep(max(0.0, min(seconds, self._until - time.monotonic())))
        return time.monotonic() >= self._until


def settle(here: Yard, images: int, fault: Callable[[Clock], None], seconds: float) -> None:
    """Render a job while something goes wrong for so many seconds, then let it finish, and count."""
    job = here.submit(images)
    with beside(here.watch_log):
        clock = Clock(seconds)
        fault(clock)
        clock.wait(seconds)
        here.s3.mode = "ok"
        status = job.wait(600)
    renders = max(status.starts, here.published())  # a log that was cut has forgotten some of its counts
    print(  # noqa: T201 - the figures of a run
        f"{images} images, {here.kills} kills, {here.in_flight_at_kills} in flight at them, {renders} renders"
    )
    assert status.counts["succeeded"] == images
    assert status.state == "succeeded"
    assert len(here.farm.store.keys(f"jobs/{job.id}/")) == images
    assert renders <= images + 1.03 * here.in_flight_at_kills
    assert here.farm.ledger.aside() == {}
    here.check(job)


def killing(here: Yard) -> Callable[[Clock], None]:
    def kill(stop: Clock) -> None:
        while not stop.wait(KILL_EVERY_S):
            here.kill_one()

    return kill


def test_kill_storm_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    with yard(tmp_path) as here:
        here.start(WORKERS, IMAGE_S * max(1.0, STORM_S / 60))
        settle(here, IMAGES, killing(here), STORM_S)


def test_host_that_stands_still_for_twenty_seconds(tmp_path: Path) -> None:
    with yard(tmp_path) as here:
        here.start(WORKERS, IMAGE_S, apart=True)

        def freeze(stop: Clock) -> None:
            stop.wait(2)  # by then it holds images
            here.freeze_one(20.0)

        settle(here, IMAGES // 2, freeze, 23)


@pytest.mark.parametrize("cut", [False, True], ids=["log kept", "log cut by its last second"])
def test_redis_is_killed_and_comes_back(tmp_path: Path, cut: bool) -> None:
    with yard(tmp_path) as here:
        here.start(WORKERS, FAULTY_IMAGE_S)

        def restart(stop: Clock) -> None:
            while not stop.wait(FAULT_S / 3):
                here.restart_redis(cut=cut)

        settle(here, IMAGES // 2, restart, FAULT_S)


def test_s3_is_down_for_half_a_minute(tmp_path: Path) -> None:
    with yard(tmp_path) as here:
        here.start(WORKERS, IMAGE_S)

        def down(stop: Clock) -> None:
            stop.wait(3)
            here.s3.mode = "down"
            stop.wait(30)
            here.s3.mode = "ok"

        settle(here, IMAGES // 2, down, 34)


@pytest.mark.parametrize("mode", ["500", "503", "slow", "no conditions"])
def test_s3_answers_badly(tmp_path: Path, mode: str) -> None:
    with yard(tmp_path) as here:
        here.start(WORKERS, FAULTY_IMAGE_S)

        def worse(stop: Clock) -> None:
            while not stop.wait(1.5):
                here.s3.mode = mode if here.s3.mode == "ok" or mode == "no conditions" else "ok"  # type: ignore[assignment]

        settle(here, IMAGES // 4, worse, FAULT_S / 2)
        assert here.s3.failed or mode == "slow"


def test_disk_is_full_at_the_worker(tmp_path: Path) -> None:
    with yard(tmp_path) as here:
        here.start(WORKERS, FAULTY_IMAGE_S, logs="/dev/full")
        settle(here, IMAGES // 4, killing(here), FAULT_S / 2)


def test_everything_goes_wrong_at_random(tmp_path: Path) -> None:
    with yard(tmp_path) as here:
        here.start(2, IMAGE_S * max(1.0, STORM_S / 60))
        here.start(2, IMAGE_S * max(1.0, STORM_S / 60), apart=True)

        def anything(stop: Clock) -> None:
            here.s3.mode = "random"
            while not stop.wait(random.uniform(1, 3)):
                fault = random.choice(
                    (here.kill_one, here.kill_one, lambda: here.freeze_one(3), lambda: here.restart_redis(cut=True))
                )
                fault()

        settle(here, IMAGES // 2, anything, STORM_S / 2)
