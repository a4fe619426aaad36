"""The engine: many renders in flight, one batch at a time on the device.

Every render is a generator that has yielded an operation. The engine groups what is pending by checkpoint, kind and
shape, runs one group as one batch, and sends each result back to its generator. Images of different prompts,
embeddings, seeds, samplers and step counts share batches; an image joins at the next step and leaves when done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count

from latentfarm_shared.errors import RenderCanceled
from torch import Tensor

from latentfarm_worker.checkpoint import Model
from latentfarm_worker.operations import Decode, Denoise, Encode, Operation, group_key
from latentfarm_worker.renders import Render

MAX_BATCH = {Encode: 16, Denoise: 16, Decode: 4}


@dataclass(eq=False)
class InFlight:
    """One render: its generator, what it waits for, and where its pixels go."""

    render: Render
    model: Model
    urgent: bool
    future: Future[Tensor]
    pending: Operation
    waiting_since: int


class Engine:
    """Runs renders on one device, in one thread of its own."""

    def __init__(self, on_batch: Callable[[str], None] = lambda _kind: None) -> None:
        """`on_batch` hears the kind of every batch before it runs (encoding, denoising, decoding), and "idle"."""
        self._on_batch = on_batch
        self._flights: list[InFlight] = []
        self._arrivals: list[tuple[Render, Model, bool, Future[Tensor]]] = []
        self._canceled: set[Future[Tensor]] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._clock = count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel every render and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, render: Render, model: Model, *, urgent: bool = False) -> Future[Tensor]:
        """Put a render in flight; the future gets `pixels: [H, W, 3]` or the render's exception."""
        future: Future[Tensor] = Future()
        with self._changed:
            self._arrivals.append((render, model, urgent, future))
            self._changed.notify()
        return future

    def cancel(self, future: Future[Tensor]) -> None:
        """Drop a render before its next operation; its future raises RenderCanceled. May be repeated."""
        with self._changed:
            if not future.done():
                self._canceled.add(future)
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._arrivals or self._flights or self._stopping):
                    self._on_batch("idle")
                    self._changed.wait()
                arrivals, self._arrivals = self._arrivals, []
                canceled, self._canceled = self._canceled, set()
                stopping = self._stopping
            for arrival in arrivals:
                self._admit(*arrival)
            for flight in [f for f in self._flights if stopping or f.future in canceled]:
                self._end(flight, RenderCanceled("canceled"))
            if stopping:
                return
            if self._flights:
                self._run_group(self._choose())

    def _admit(self, render: Render, model: Model, urgent: bool, future: Future[Tensor]) -> None:
        try:
            pending = next(render)
        except Exception as error:  # noqa: BLE001 - whatever a render raises belongs to its future
            future.set_exception(error)
            return
        self._flights.append(InFlight(render, model, urgent, future, pending, next(self._clock)))

    def _choose(self) -> list[InFlight]:
        """Pick the group of the most urgent render that waited longest, up to one batch."""
        first = min(self._flights, key=lambda f: (not f.urgent, f.waiting_since))
        key = group_key(first.pending)
        alike = [f for f in self._flights if f.model is first.model and group_key(f.pending) == key]
        alike.sort(key=lambda f: (not f.urgent, f.waiting_since))
        return alike[: MAX_BATCH[type(first.pending)]]

    def _run_group(self, group: list[InFlight]) -> None:
        try:
            results = self._execute(group[0].model, [flight.pending for flight in group])
        except Exception as error:  # noqa: BLE001 - a failed batch is run again one by one, then fails its image
            if len(group) == 1:
                self._end(group[0], error)
                return
            for flight in group:
                self._run_group([flight])
            return
        for flight, result in zip(group, results, strict=True):
            self._advance(flight, result)

    def _execute(self, model: Model, operations: Sequence[Operation]) -> Sequence[object]:
        encodes = [item for item in operations if isinstance(item, Encode)]
        if encodes:
            self._on_batch("encoding")
            return model.encode(encodes)
        denoises = [item for item in operations if isinstance(item, Denoise)]
        if denoises:
            self._on_batch("denoising")
            return model.denoise(denoises)
        self._on_batch("decoding")
        return model.decode([item for item in operations if isinstance(item, Decode)])

    def _advance(self, flight: InFlight, result: object) -> None:
        try:
            flight.pending = flight.render.send(result)
            flight.waiting_since = next(self._clock)
        except StopIteration as finished:
            self._flights.remove(flight)
            flight.future.set_result(finished.value)
        except Exception as error:  # noqa: BLE001 - whatever a render raises belongs to its future
            self._end(flight, error)

    def _end(self, flight: InFlight, error: Exception) -> None:
        flight.render.close()
        self._flights.remove(flight)
        flight.future.set_exception(error)
