"""An interactive image sent into a full batch load, under both policies, and what it costs the batch."""

from __future__ import annotations

import threading
import time
from typing import Any, Self

from latentfarm_worker.engine import Policy
from latentfarm_worker.renderer import Renderer

from bench.pairs import percentile
from bench.rivals import job

SAMPLES = 20
SLOTS = 8
POLICIES: tuple[Policy, ...] = ("park", "share")


class BatchLoad:
    """Keeps an engine's slots full until it is stopped; counts what it rendered and how long each took."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.latencies: list[float] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(SLOTS)]

    def __enter__(self) -> Self:
        """Start."""
        for thread in self._threads:
            thread.start()
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and wait."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        spec, lock = self._renderer.freeze(job(seed=number))
        while not self._stopping.is_set():
            began = time.perf_counter()
            self._renderer.submit(spec, lock).result()
            self.latencies.append(time.perf_counter() - began)


def interactive(renderer: Renderer, pause_s: float) -> list[float]:
    """Send interactive images one after the other; return their latencies."""
    spec, lock = renderer.freeze(job(seed=1000))
    found = []
    for _ in range(SAMPLES):
        began = time.perf_counter()
        renderer.submit(spec, lock, urgent=True).result()
        found.append(time.perf_counter() - began)
        time.sleep(pause_s)
    return found


def steady(load: BatchLoad, seconds: float) -> tuple[float, list[float]]:
    """Watch a load for a while; return its images per second and their latencies."""
    time.sleep(5)
    before, began = len(load.latencies), time.perf_counter()
    time.sleep(seconds)
    found = load.latencies[before:]
    return len(found) / (time.perf_counter() - began), found


def measure() -> dict[str, Any]:
    """Return 95th percentiles as ratios, and the batch load's throughput with and without interactive images."""
    result: dict[str, Any] = {}
    for policy in POLICIES:
        with Renderer("demo", slots=SLOTS, policy=policy) as renderer:
            alone = interactive(renderer, 0.0)
            with BatchLoad(renderer) as load:
                rate, batch = steady(load, 20)
                before, began = len(load.latencies), time.perf_counter()
                sent = interactive(renderer, 1.0)
                during = (len(load.latencies) - before) / (time.perf_counter() - began)
        result[policy] = {
            "alone, p95 s": round(percentile(alone, 0.95), 3),
            "one image of a steady full batch, p95 s": round(percentile(batch, 0.95), 3),
            "sent into the load, p95 s": round(percentile(sent, 0.95), 3),
            "p95 over alone, park at most 1.5": round(percentile(sent, 0.95) / percentile(alone, 0.95), 3),
            "p95 over a steady full batch, share at most 1.2": round(
                percentile(sent, 0.95) / percentile(batch, 0.95), 3
            ),
            "batch images per second before and during": [round(rate, 3), round(during, 3)],
            "all latencies, s": {
                "alone": [round(v, 3) for v in alone],
                "sent": [round(v, 3) for v in sent],
                "batch": [round(v, 3) for v in batch],
            },
        }
    return result
