"""A mixed load with Poisson arrivals: continuous batching against batches of equal requests, on the same engine."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from latentfarm_shared.records import Lock
from latentfarm_shared.specs import JobSpec
from latentfarm_worker.operations import Rendered
from latentfarm_worker.renderer import Renderer

from bench.pairs import PAIRS, interleaved, percentile, ratio
from bench.rivals import job

STEPS = (10, 20, 30, 50)
SAMPLERS = ("Euler", "DPM++ 2M", "DDIM")
SCALES = (1.0, 5.0, 7.0)
REQUESTS, BATCH, OVERLOAD = 24, 8, 1.2


@dataclass(frozen=True)
class Request:
    """One picture asked for, and when, in seconds from the start."""

    spec: JobSpec
    lock: Lock
    at_s: float

    @property
    def kind(self) -> tuple[object, ...]:
        """What requests must share to be batched as equal."""
        return self.spec.steps, self.spec.sampler, self.spec.cfg_scale, self.spec.width


def load(renderer: Renderer, rate: float, seed: int, edges: tuple[int, ...]) -> list[Request]:
    """Return a load that arrives at `rate` a second."""
    source, at_s, requests = random.Random(seed), 0.0, []
    for number in range(REQUESTS):
        edge = source.choice(edges)
        spec = job(
            steps=source.choice(STEPS), sampler=source.choice(SAMPLERS), cfg_scale=source.choice(SCALES),
            seed=number, width=edge, height=edge,
        )  # fmt: skip
        requests.append(Request(*renderer.freeze(spec), at_s))
        at_s += source.expovariate(rate)
    return requests


@dataclass(frozen=True)
class Outcome:
    """Images a second from first arrival to last picture, and the latency that 95 % stay below."""

    rate: float
    p95_s: float


def outcome(requests: list[Request], done_s: list[float]) -> Outcome:
    """Sum up a run."""
    waits = [done - request.at_s for request, done in zip(requests, done_s, strict=True)]
    return Outcome(len(requests) / max(done_s), percentile(waits, 0.95))


def continuous(renderer: Renderer, requests: list[Request]) -> Outcome:
    """Hand every request to the engine as it arrives."""
    began, done_s = time.perf_counter(), [0.0] * len(requests)
    futures: list[Future[Rendered]] = []
    for number, request in enumerate(requests):
        time.sleep(max(0.0, request.at_s - (time.perf_counter() - began)))
        future = renderer.submit(request.spec, request.lock)

        def finished(_: object, number: int = number) -> None:
            done_s[number] = time.perf_counter() - began

        future.add_done_callback(finished)
        futures.append(future)
    for future in futures:
        future.result()
    return outcome(requests, done_s)


def request_level(renderer: Renderer, requests: list[Request]) -> Outcome:
    """Take the oldest request and up to seven equal ones that wait, render them to the end, take the next."""
    began, done_s = time.perf_counter(), [0.0] * len(requests)
    waiting: list[int] = []
    changed = threading.Condition()

    def arrive() -> None:
        for number, request in enumerate(requests):
            time.sleep(max(0.0, request.at_s - (time.perf_counter() - began)))
            with changed:
                waiting.append(number)
                changed.notify()

    threading.Thread(target=arrive, daemon=True).start()
    left = len(requests)
    while left:
        with changed:
            changed.wait_for(lambda: waiting)
            kind = requests[waiting[0]].kind
            batch = [number for number in waiting if requests[number].kind == kind][:BATCH]
            waiting[:] = [number for number in waiting if number not in batch]
        futures = [renderer.submit(requests[number].spec, requests[number].lock) for number in batch]
        for future in futures:
            future.result()
        for number in batch:
            done_s[number] = time.perf_counter() - began
        left -= len(batch)
    return outcome(requests, done_s)


def compare(renderer: Renderer, edges: tuple[int, ...], rounds: int = PAIRS) -> dict[str, Any]:
    """Run both over the same loads; the rate is what overloads request-level batching a little."""
    rate = OVERLOAD * request_level(renderer, load(renderer, 1e6, 0, edges)).rate
    outcomes: dict[str, list[Outcome]] = {"continuous": [], "request level": []}
    seeds = {"continuous": iter(range(1, 100)), "request level": iter(range(1, 100))}

    def arm(name: str) -> float:
        run = continuous if name == "continuous" else request_level
        outcomes[name].append(run(renderer, load(renderer, rate, next(seeds[name]), edges)))
        return outcomes[name][-1].rate

    interleaved({name: lambda name=name: arm(name) for name in outcomes}, rounds)  # type: ignore[misc]
    kept = {name: found[1:] for name, found in outcomes.items()}
    rates = {name: [o.rate for o in found] for name, found in kept.items()}
    waits = {name: [o.p95_s for o in found] for name, found in kept.items()}
    return {
        "arrivals per second": round(rate, 3),
        "images per second": {name: [round(value, 3) for value in found] for name, found in rates.items()},
        "p95 latency, s": {name: [round(value, 2) for value in found] for name, found in waits.items()},
        "images per second over request level, at least 1.4": ratio(rates["continuous"], rates["request level"]).row(),
        "p95 latency over request level, at most 0.5": ratio(waits["continuous"], waits["request level"]).row(),
    }


def measure() -> dict[str, Any]:
    """Return the comparison at one size, and at two sizes mixed."""
    with Renderer("demo", slots=BATCH) as renderer:
        return {"one size": compare(renderer, (128,)), "two sizes": compare(renderer, (96, 128), 3)}
