"""The engine: many renders in flight, one batch at a time on the device.

Every render is a generator that has yielded an operation. The engine groups what is pending by checkpoint, kind and
shape, runs one group as one batch, and sends each result back to its generator. Images of different prompts,
embeddings, seeds, samplers and step counts share batches; an image joins at the next step and leaves when done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from latentfarm_shared.errors import DeadlineExceeded, OutOfMemory, RenderCanceled, RenderError

from latentfarm_worker.capacity import Capacity
from latentfarm_worker.device import Device
from latentfarm_worker.operations import (
    Decode,
    Denoise,
    Encode,
    EncodePixels,
    Enlarge,
    Model,
    Operation,
    Render,
    Rendered,
    Tune,
    group_key,
)

Policy = Literal["park", "share"]
PHASE = {
    Encode: "encoding",
    Denoise: "denoising",
    Decode: "decoding",
    EncodePixels: "decoding",
    Enlarge: "upscaling",
    Tune: "tuning",
}
PARK_LIMIT_S = 30.0


@dataclass(eq=False)
class Ticket:
    """A render handed in: where its picture goes, who waits for it, and until when (monotonic seconds)."""

    render: Render
    model: Model
    urgent: bool
    deadline: float | None = None
    future: Future[Rendered] = field(default_factory=Future)


@dataclass(eq=False)
class InFlight:
    """A render under way: what it asks for, since when, and how long it was parked."""

    ticket: Ticket
    pending: Operation
    waiting_since: int
    parked_s: float = 0.0
    aged: bool = False

    @property
    def urgent(self) -> bool:
        """Whether it goes first: it was handed in so, or was parked for too long."""
        return self.ticket.urgent or self.aged


@dataclass
class EngineClock:
    """Where the engine's thread spent its time, in seconds, and what it did."""

    device_s: float = 0.0
    render_s: float = 0.0
    busy_s: float = 0.0
    batches: int = 0
    operations: int = 0


class Engine:
    """Runs renders on one device, in one thread of its own."""

    def __init__(
        self,
        on_batch: Callable[[str], None] = lambda _phase: None,
        *,
        slots: int = 8,
        policy: Policy = "park",
        capacity: Capacity | None = None,
        device: Device | None = None,
        park_limit_s: float = PARK_LIMIT_S,
        on_fatal: Callable[[BaseException], None] = lambda _error: None,
    ) -> None:
        """Keep up to `slots` batch images and as many interactive ones in flight; the rest waits in order.

        `policy` says what batch images do while an interactive one is in flight: they are `park`ed, each for
        `park_limit_s` at most, or `share` its batches. `on_batch` hears the phase of every batch before it runs (encoding, denoising …), and "idle". `on_fatal`
        hears of a device that can run nothing any more, and of this thread's own end.
        """
        self.clock = EngineClock()
        self._on_batch, self._on_fatal, self._slots, self._policy = on_batch, on_fatal, slots, policy
        self._device = device or Device()
        self._capacity, self._park_limit_s = capacity or Capacity(device=self._device), park_limit_s
        self._flights: list[InFlight] = []
        self._waiting: list[Ticket] = []
        self._canceled: set[Future[Rendered]] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._ticks = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- for any thread

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

    def submit(
        self, render: Render, model: Model, *, urgent: bool = False, deadline: float | None = None
    ) -> Future[Rendered]:
        """Hand in a render; the future gets what it returns, or its exception.

        Past `deadline` (monotonic seconds) it ends with DeadlineExceeded at its next operation.
        """
        ticket = Ticket(render, model, urgent, deadline)
        ticket.future.set_running_or_notify_cancel()  # `cancel` is the way; a canceled future would take no result
        with self._changed:
            if self._stopping:
                ticket.future.set_exception(RenderCanceled("the engine has stopped"))
                return ticket.future
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket.future

    def cancel(self, future: Future[Rendered]) -> None:
        """Drop a render before its next operation; its future raises RenderCanceled. May be repeated."""
        with self._changed:
            if not future.done():
                self._canceled.add(future)
                self._changed.notify()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            with self._changed:
                self._stopping = True
                lost = [*self._waiting, *(flight.ticket for flight in self._flights)]
            for ticket in lost:
                if not ticket.future.done():
                    ticket.future.set_exception(RenderError(f"the engine ended: {error!r}"))
            self._on_fatal(error)
            raise

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._flights or self._stopping):
                    self._on_batch("idle")
                    self._changed.wait()
                canceled, self._canceled = self._canceled, set()
                stopping = self._stopping
                dropped, admitted = self._sort_waiting(canceled, everything=stopping)
            began = time.perf_counter()
            for ticket in dropped:
                ticket.render.close()
                ticket.future.set_exception(RenderCanceled("canceled"))
            for ticket in admitted:
                self._admit(ticket)
            self._end_unwanted(canceled, everything=stopping)
            if stopping:
                return
            if self._flights:
                self._run_chosen()
            self.clock.busy_s += time.perf_counter() - began

    def _sort_waiting(self, canceled: set[Future[Rendered]], *, everything: bool) -> tuple[list[Ticket], list[Ticket]]:
        """Take off the list what is canceled, and what there is room for, interactive first."""
        dropped = [t for t in self._waiting if everything or t.future in canceled]
        left = [t for t in self._waiting if not (everything or t.future in canceled)]
        late = [t for t in left if t.deadline is not None and time.monotonic() > t.deadline]
        admitted = late  # to be ended at once
        for urgent in (True, False):
            held = sum(flight.ticket.urgent == urgent for flight in self._flights)
            able = (t for t in left if t.urgent == urgent and t not in late)
            admitted = admitted + list(islice(able, max(self._slots - held, 0)))
        gone = set(map(id, admitted))
        self._waiting = [t for t in left if id(t) not in gone]
        return dropped, admitted

    def _admit(self, ticket: Ticket) -> None:
        try:
            pending = next(ticket.render)
        except Exception as error:  # noqa: BLE001 - whatever a render raises belongs to its future
            ticket.future.set_exception(error)
            return
        self._ticks += 1
        self._flights.append(InFlight(ticket, pending, self._ticks))

    def _end_unwanted(self, canceled: set[Future[Rendered]], *, everything: bool) -> None:
        now = time.monotonic()
        for flight in list(self._flights):
            deadline = flight.ticket.deadline
            if everything or flight.ticket.future in canceled:
                self._end(flight, RenderCanceled("canceled"))
            elif deadline is not None and now > deadline:
                self._end(flight, DeadlineExceeded("its deadline passed before it was rendered"))

    def _run_chosen(self) -> None:
        """Run one group; what it parked is remembered, so that nothing is parked for ever."""
        advanced, began = self._runnable(), time.perf_counter()
        self._run_group(self._choose(advanced))
        if len(advanced) < len(self._flights):
            spent = time.perf_counter() - began
            for flight in self._flights:
                if flight not in advanced:
                    flight.parked_s += spent
                    flight.aged = flight.parked_s > self._park_limit_s

    def _runnable(self) -> list[InFlight]:
        """Return the flights that may go on now."""
        urgent = [flight for flight in self._flights if flight.urgent]
        return urgent if urgent and self._policy == "park" else self._flights

    def _choose(self, flights: list[InFlight]) -> list[InFlight]:
        """Pick the group of the render that waited longest, up to one batch that fits into memory."""
        first = min(flights, key=lambda flight: flight.waiting_since)
        model, key = first.ticket.model, group_key(first.pending)
        alike = [f for f in flights if f.ticket.model is model and group_key(f.pending) == key]
        alike.sort(key=lambda flight: (flight is not first, not flight.urgent, flight.waiting_since))
        return alike[: self._capacity.fitting(model.name, [flight.pending for flight in alike])]

    def _run_group(self, group: list[InFlight]) -> None:
        """Run one batch; if it fails, run its halves, until the culprit is alone."""
        results, failure = self._attempt(group)
        if failure is None:
            self._send_back(group, results)
            return
        if self._device.trouble(failure) == "memory":
            self._capacity.overflowed(group[0].ticket.model.name, [flight.pending for flight in group])
            failure = OutOfMemory(f"while {PHASE[type(group[0].pending)]}")
        if len(group) == 1:
            self._end(group[0], failure)
            return
        middle = len(group) // 2
        self._run_group(group[:middle])
        self._run_group(group[middle:])

    def _attempt(self, group: list[InFlight]) -> tuple[Sequence[object], Exception | None]:
        """Run one batch; return its results, or what went wrong.

        The traceback of a batch that did not fit is dropped, for its frames hold the memory that the halves need.
        """
        try:
            return self._execute(group), None
        except Exception as error:  # noqa: BLE001 - a failed batch is bisected, then fails its image
            trouble = self._device.trouble(error)
            if trouble == "device":
                self._on_fatal(error)  # nothing runs on a device in this state
            return (), error.with_traceback(None) if trouble == "memory" else error

    def _execute(self, group: list[InFlight]) -> Sequence[object]:
        model, operations = group[0].ticket.model, [flight.pending for flight in group]
        self._on_batch(PHASE[type(operations[0])])
        began = time.perf_counter()
        with self._capacity.measured(model.name, operations):
            results = _perform(model, operations)
        self.clock.device_s += time.perf_counter() - began
        self.clock.batches += 1
        self.clock.operations += len(group)
        return results

    def _send_back(self, group: list[InFlight], results: Sequence[object]) -> None:
        began = time.perf_counter()
        for flight, result in zip(group, results, strict=True):
            self._advance(flight, result)
        self.clock.render_s += time.perf_counter() - began

    def _advance(self, flight: InFlight, result: object) -> None:
        try:
            with self._device.advancing():
                flight.pending = flight.ticket.render.send(result)
            self._ticks += 1
            flight.waiting_since = self._ticks
        except StopIteration as finished:
            self._flights.remove(flight)
            flight.ticket.future.set_result(finished.value)
        except Exception as error:  # noqa: BLE001 - whatever a render raises belongs to its future
            self._end(flight, error)

    def _end(self, flight: InFlight, error: Exception) -> None:
        flight.ticket.render.close()
        self._flights.remove(flight)
        flight.ticket.future.set_exception(error)


def _tune(batch: Sequence[Tune]) -> list[object]:
    return [item.work() for item in batch]


def _perform(model: Model, operations: list[Any]) -> Sequence[object]:
    """Have a model perform operations of one kind."""
    methods: dict[type[Operation], Callable[[list[Any]], Sequence[object]]] = {
        Encode: model.encode,
        Denoise: model.denoise,
        Decode: model.decode,
        EncodePixels: model.encode_pixels,
        Enlarge: model.enlarge,
        Tune: _tune,
    }
    return methods[type(operations[0])](operations)
