"""A farm of simulated GPUs at one image a second each: how much of the ideal they do, and what an image costs beside.

Everything but the device is real: supervisors, Celery, claims, PNG, PUT. The servers run on the same cores.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from latentfarm.embedded.local import LocalFarm
from latentfarm_shared.specs import JobSpec

GPUS = (1, 8, 32, 64)
IMAGE_S = 1.0
WARM_UP_S, WINDOW_S = 20.0, 40.0
READY_S = 300.0


def _cpu_s(pids: list[int]) -> float:
    """Return the CPU seconds that processes have used, of those that live."""
    total = 0.0
    for pid in pids:
        if psutil.pid_exists(pid):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


class _Reading:
    """What a farm has done and used at one moment."""

    def __init__(self, local: LocalFarm, job: str, supervisor: int) -> None:
        redis = local.farm.ledger.redis
        info, stats = redis.info("cpu"), redis.info("commandstats")
        workers = [process.pid for process in psutil.Process(supervisor).children()]
        self.at = time.monotonic()
        self.images = local.farm.ledger.status(job).counts["succeeded"]
        self.tickets = int(redis.get("lf:tickets") or 0)
        self.transitions = sum(int(stats.get(f"cmdstat_{name}", {}).get("calls", 0)) for name in ("evalsha", "fcall"))
        self.redis_cpu = float(info["used_cpu_user"]) + float(info["used_cpu_sys"])
        self.workers_cpu = _cpu_s(workers)
        self.supervisor_cpu = _cpu_s([supervisor])
        s3 = [child.process.pid for child in local._servers if child.name == "s3"]  # noqa: SLF001 - the bench watches it
        self.s3_cpu = _cpu_s(s3)


def farm_of(gpus: int, *, s3: bool) -> dict[str, Any]:
    """Run so many simulated GPUs for a while; return what they did and used."""
    with tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as folder, LocalFarm(Path(folder), workers=0) as local:
        environ = os.environ | {
            "LATENTFARM_ENGINE": "simulated",
            "LATENTFARM_IMAGE_SECONDS": str(IMAGE_S),
            "LATENTFARM_SIMULATE_S3": str(s3).lower(),
            "LATENTFARM_LOG_LEVEL": "WARNING",
        }
        command = [sys.executable, "-m", "latentfarm_worker", "--data", folder, "--workers", str(gpus)]
        supervisor = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
        try:
            until = time.monotonic() + READY_S
            while len([w for w in local.farm.workers() if w.queues]) < gpus and time.monotonic() < until:
                time.sleep(0.5)
            spec = {"prompt": "a cat", "seed": 1, "count": 1_000_000, "lane": "batch", "reuse": False}
            job = local.farm.submit(JobSpec.check(spec))
            time.sleep(WARM_UP_S)
            local.farm.ledger.redis.slowlog_reset()
            before = _Reading(local, job.id, supervisor.pid)
            time.sleep(WINDOW_S)
            after = _Reading(local, job.id, supervisor.pid)
            slow = local.farm.ledger.redis.slowlog_get(128)
            job.cancel()
        finally:
            supervisor.send_signal(signal.SIGTERM)
            supervisor.send_signal(signal.SIGTERM)
            supervisor.wait(120)
    return _row(gpus, before, after, slow)


def _row(gpus: int, before: _Reading, after: _Reading, slow: list[dict[str, Any]]) -> dict[str, Any]:
    images, seconds = after.images - before.images, after.at - before.at

    def per_image(name: str, scale: float = 1000.0) -> float:
        used: float = getattr(after, name) - getattr(before, name)
        return round(used * scale / max(images, 1), 3)

    return {
        "GPUs": gpus,
        "images per second": round(images / seconds, 2),
        "useful work over ideal": round(images / seconds / gpus * IMAGE_S, 4),
        "wake-ups per image": per_image("tickets", 1.0),
        "Redis transitions per image": per_image("transitions", 1.0),
        "Redis CPU-ms per image": per_image("redis_cpu"),
        "worker CPU-ms per image": per_image("workers_cpu"),
        "supervisor CPU-ms per image": per_image("supervisor_cpu"),
        "S3 CPU-ms per image": per_image("s3_cpu"),
        "calculated limit of one Redis, images per second": round(1000 / max(per_image("redis_cpu"), 1e-6)),
        "slow log entries": len(slow),
        "slowest, ms": max((entry["duration"] / 1000 for entry in slow), default=0.0),
        "slow transitions": sorted(
            {bytes(entry["command"]).split()[3].decode() for entry in slow if b" 0 " in entry["command"]}
        ),
    }


def measure() -> dict[str, Any]:
    """Return a row for every size, S3 on and off."""
    sizes = [int(size) for size in os.environ.get("BENCH_GPUS", ",".join(map(str, GPUS))).split(",")]
    return {f"S3 {name}": [farm_of(gpus, s3=s3) for gpus in sizes] for name, s3 in (("on", True), ("off", False))}
