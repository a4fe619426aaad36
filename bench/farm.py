"""The farm end to end, Celery, Redis, S3 and PNG, against the bare device; then against the engine alone.

The device that takes its time is measured in plain wall time; the slow S3 is a server in front of the real one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from latentfarm.embedded.local import LocalFarm
from latentfarm_worker.renderer import Renderer

from bench.pairs import PAIRS, interleaved, ratio
from bench.rivals import engine_s, job
from tests.faulty_s3 import FaultyS3

SLEEPING_IMAGES = 100
DEVICE_S = 0.25
DEMO_IMAGES = 40


def job_s(local: LocalFarm, images: int, edge: int, steps: int) -> float:
    """Submit a job and wait; return the seconds an image took, from submission to the last picture in S3."""
    spec = job(count=images, width=edge, height=edge, steps=steps, lane="batch", reuse=False)
    began = time.perf_counter()
    status = local.farm.submit(spec).wait(600)
    if status.state != "succeeded":
        raise RuntimeError(f"the job {status.state}")
    return (time.perf_counter() - began) / images


def bare_device_s() -> float:
    """Sleep as long as the device does for every image; return the seconds an image took."""
    began = time.perf_counter()
    for _ in range(SLEEPING_IMAGES):
        time.sleep(DEVICE_S)
    return (time.perf_counter() - began) / SLEEPING_IMAGES


def sleeping() -> dict[str, Any]:
    """Compare the farm with the bare device, with S3 as it is and delayed by half a second a request."""
    with (
        tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as folder,
        LocalFarm(Path(folder), workers=0) as local,
        FaultyS3(local.farm.settings.s3_endpoint or "", delay_s=0.5) as s3,
    ):
        environ = os.environ | {
            "LATENTFARM_ENGINE": "simulated",
            "LATENTFARM_IMAGE_SECONDS": str(DEVICE_S),
            "LATENTFARM_S3_ENDPOINT": s3.url,
            "AWS_ACCESS_KEY_ID": local.farm.settings.s3_access_key or "",
            "AWS_SECRET_ACCESS_KEY": local.farm.settings.s3_secret_key or "",
        }
        worker = subprocess.Popen([sys.executable, "-m", "latentfarm_worker", "--data", folder], env=environ)
        try:
            while not any(status.checkpoints for status in local.farm.workers()):
                time.sleep(0.2)

            def farm_s(*, slow: bool) -> float:
                s3.mode = "slow" if slow else "ok"
                return job_s(local, SLEEPING_IMAGES, 512, 1)

            found = interleaved(
                {
                    "bare": bare_device_s,
                    "farm": lambda: farm_s(slow=False),
                    "farm, slow S3": lambda: farm_s(slow=True),
                },
                PAIRS,
            )
        finally:
            worker.terminate()
            worker.wait(60)
    return {
        "ms per image": {name: [round(value * 1000, 2) for value in values] for name, values in found.items()},
        "images per second over bare, at least 0.97": ratio(found["bare"], found["farm"]).row(),
        "slow S3 over the farm, at least 0.97": ratio(found["farm"], found["farm, slow S3"]).row(),
    }


def demo() -> dict[str, Any]:
    """Compare the farm with the engine alone on the demo checkpoint."""
    with (
        tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as folder,
        LocalFarm(Path(folder)) as local,
        Renderer("demo", slots=8) as renderer,
    ):
        local.await_workers()
        found = interleaved(
            {"farm": lambda: job_s(local, DEMO_IMAGES, 128, 20), "engine": lambda: engine_s(renderer, DEMO_IMAGES)}
        )
    return {
        "ms per image": {name: [round(value * 1000, 2) for value in values] for name, values in found.items()},
        "images per second over the engine alone, at least 0.9": ratio(found["engine"], found["farm"]).row(),
    }


def measure() -> dict[str, Any]:
    """Return both comparisons."""
    return {"a device that sleeps 250 ms a picture": sleeping(), "the demo checkpoint": demo()}
