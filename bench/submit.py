"""How fast images are enqueued, against a loop of Celery's apply_async; what a million costs, and how long polling takes."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentfarm.embedded.local import LocalFarm
from latentfarm.farm import DirectFarm
from latentfarm_shared.specs import JobSpec
from latentfarm_shared.wakeups import make_celery

from bench.pairs import PAIRS, interleaved, percentile, ratio

MILLION = 1_000_000
CELERY_MESSAGES, ROWS = 2000, 20_000
POLLS = 5000


def celery_s(farm: DirectFarm) -> float:
    """Send a message an image with apply_async, as a farm without a ledger would; return the seconds an image took."""
    app = make_celery(farm.settings)

    @app.task(name="bench.render", shared=False)
    def render(**_: object) -> None:
        """Stand for a render."""

    parameters = {
        "prompt": "a cat, masterpiece, high quality",
        "steps": 20,
        "cfg_scale": 7.0,
        "width": 512,
        "height": 512,
    }
    began = time.perf_counter()
    for seed in range(CELERY_MESSAGES):
        render.apply_async(kwargs=parameters | {"seed": seed}, queue="bench")
    took = (time.perf_counter() - began) / CELERY_MESSAGES
    farm.ledger.redis.delete("bench")
    return took


def sweep_s(farm: DirectFarm) -> float:
    """Submit a matrix of a million images; return the seconds an image took."""
    began = time.perf_counter()
    job = farm.submit(matrix())
    took = time.perf_counter() - began
    job.cancel()
    return took / MILLION


def matrix() -> JobSpec:
    """Return a sweep of a million images."""
    axes = [{"field": "seed", "values": {"first": 1, "last": 10_000}}, {"field": "cfg_scale", "values": _hundred()}]
    return JobSpec.check({"prompt": "a cat, masterpiece", "axes": axes, "lane": "batch", "order": "spread"})


def _hundred() -> list[float]:
    return [round(1 + 0.1 * number, 1) for number in range(100)]


def table(path: Path, rows: int) -> None:
    """Write a table of distinct prompts."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = f"a cat, masterpiece, high quality, picture {number} of many"
            file.write(json.dumps({"prompt": prompt, "seed": number, "steps": 20}) + "\n")


def rows_s(farm: DirectFarm, path: Path) -> float:
    """Submit a table; return the seconds an image took."""
    began = time.perf_counter()
    (job,) = farm.submit_file(path, anew=True, defaults={"lane": "batch"})
    took = time.perf_counter() - began
    job.cancel()
    return took / job.spec.total


def polling(farm: DirectFarm) -> dict[str, Any]:
    """Poll a job of a million images again and again: its status, one image, a page, events."""
    job = farm.submit(matrix())
    calls: dict[str, Callable[[], object]] = {
        "status": job.status,
        "one image": lambda: farm.ledger.image_states(job.id, 777_777, 777_778),
        "events": lambda: farm.ledger.events(job.id, 0, 10),
    }
    found = {}
    for name, call in calls.items():
        took = []
        for _ in range(POLLS):
            began = time.perf_counter()
            call()
            took.append((time.perf_counter() - began) * 1000)
        found[f"{name}, ms"] = {"median": round(statistics.median(took), 3), "p99": round(percentile(took, 0.99), 3)}
    job.cancel()
    return found


def measure() -> dict[str, Any]:
    """Return rates over apply_async, what a million costs, and polling."""
    with tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as folder, LocalFarm(Path(folder), workers=0) as local:
        farm, path = local.farm, Path(folder) / "prompts.jsonl"
        table(path, ROWS)
        found = interleaved(
            {"apply_async": lambda: celery_s(farm), "sweep": lambda: sweep_s(farm), "rows": lambda: rows_s(farm, path)}
        )
        memory = int(farm.ledger.redis.info("memory")["used_memory"])
        farm.submit(matrix()).cancel()
        memory = int(farm.ledger.redis.info("memory")["used_memory"]) - memory
        table(path, MILLION)
        million_s = rows_s(farm, path) * MILLION
        result = {
            "images a second": {name: round(1 / statistics.median(values)) for name, values in found.items()},
            "a million in a matrix, ms": [round(value * MILLION * 1000, 1) for value in found["sweep"]],
            "its memory in Redis, bytes": memory,
            "a million rows, s": round(million_s, 1),
            "a million rows, a second": round(MILLION / million_s),
            "sweep over apply_async, at least 100": ratio(found["apply_async"], found["sweep"]).row(),
            "rows over apply_async, at least 5": ratio(found["apply_async"], found["rows"]).row(),
            "polling a million": polling(farm),
            "slow log entries": farm.ledger.redis.slowlog_len(),
        }
    return result | {"rounds": PAIRS}
