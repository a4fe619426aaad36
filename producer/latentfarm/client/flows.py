"""What the clients do, apart from how they do it: flows that ask for calls and pauses, run by a thread or an event loop.

A flow is a generator. It yields a `Call`, and is sent the `Reply`; or it yields a `Pause`. Whatever takes several calls, and
trying again, is written down once; `run` and `run_async` differ in waiting alone.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from latentfarm_shared.errors import FarmError, UnreadableFile

T = TypeVar("T")

TRIES = 5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
LONGEST_RETRY_AFTER_S = 30.0
UNREACHABLE = 0
AGAIN = frozenset({UNREACHABLE, 429, 502, 503, 504})


@dataclass(frozen=True)
class Call:
    """A request; `path` begins behind the farm's address.

    `source` is a file whose bytes are sent, under `file_name` in a form if that is given. `is_safe` says that it may be
    sent twice, `is_long` that the farm has much to do before it answers; `at_most_s` is how long the caller would wait.
    """

    method: str
    path: str
    query: Mapping[str, str | int | bool | None] = field(default_factory=dict)
    json: Any = None
    source: Path | None = None
    file_name: str | None = None
    form: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    is_safe: bool = False
    is_long: bool = False
    at_most_s: float | None = None

    @property
    def may_repeat(self) -> bool:
        """Tell whether sending it twice is the same as once."""
        return self.is_safe or self.method in ("GET", "PUT")

    def data(self) -> bytes:
        """Return what is sent: of `-` standard input.

        Raises:
            UnreadableFile: it cannot be read.
        """
        if self.source is None:
            return b""
        try:
            return sys.stdin.buffer.read() if str(self.source) == "-" else self.source.read_bytes()
        except OSError as error:
            raise UnreadableFile(str(self.source), f"cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class Reply:
    """An answer; status 0 if there was none, and `content` says why. A farm in memory gives the `error` itself."""

    status: int
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    error: FarmError | None = None


@dataclass(frozen=True)
class Pause:
    """Wait for so many seconds."""

    seconds: float


Step = Call | Pause
Flow = Generator[Step, Reply | None, T]


class Sends(Protocol):
    """Sends calls and waits in this thread."""

    def send(self, call: Call, data: bytes) -> Reply:
        """Send a call with a file's bytes and return its answer."""
        ...


class SendsAsync(Protocol):
    """Sends calls from an event loop."""

    async def send(self, call: Call, data: bytes) -> Reply:
        """Send a call with a file's bytes and return its answer."""
        ...


class _Course(Generic[T]):
    """A flow on its way: what it asks for next, and what it is told."""

    def __init__(self, flow: Flow[T]) -> None:
        self._advance: Callable[[], Step] = partial(flow.send, None)
        self._flow = flow
        self._call: Call | None = None
        self._data = b""
        self.result: T | None = None

    def next(self) -> Step | None:
        """Return what the flow asks for; None at its end, with its result."""
        try:
            return self._advance()
        except StopIteration as done:
            self.result = done.value
            return None

    def data_of(self, call: Call) -> bytes:
        """Return the bytes of a call's file, read once however often it is sent."""
        if call is not self._call:
            self._call, self._data = call, call.data()
        return self._data

    def told(self, reply: Reply | None) -> None:
        """Go on with an answer."""
        self._advance = partial(self._flow.send, reply)

    def failed(self, error: FarmError) -> None:
        """Go on where a file could not be read."""
        self._advance = partial(self._flow.throw, error)


def run(flow: Flow[T], sends: Sends) -> T:
    """Run a flow in this thread."""
    course = _Course(flow)
    while (step := course.next()) is not None:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            course.told(None)
            continue
        try:
            data = course.data_of(step)
        except FarmError as error:
            course.failed(error)
        else:
            course.told(sends.send(step, data))
    return course.result  # type: ignore[return-value]


async def run_async(flow: Flow[T], sends: SendsAsync) -> T:
    """Run a flow in this event loop."""
    course = _Course(flow)
    while (step := course.next()) is not None:
        if isinstance(step, Pause):
            await asyncio.sleep(step.seconds)
            course.told(None)
            continue
        try:
            data = b"" if step.source is None else await asyncio.to_thread(course.data_of, step)
        except FarmError as error:
            course.failed(error)
        else:
            course.told(await sends.send(step, data))
    return course.result  # type: ignore[return-value]


def asked(call: Call) -> Flow[Reply]:
    """Send a call, again if that is safe and may help; return the last answer.

    A full farm (429) took nothing, so that may always be repeated. `Retry-After` is kept to, up to half a minute.
    """
    for attempt in range(1, TRIES + 1):
        reply = yield call
        assert reply is not None  # noqa: S101 - a call is always answered
        wait = pause_after(reply, attempt)
        if wait is None or attempt == TRIES or not (call.may_repeat or reply.status == 429):
            return reply
        yield Pause(wait)
    raise AssertionError("unreachable")  # pragma: no cover


def pause_after(reply: Reply, attempt: int) -> float | None:
    """Return after how many seconds to try again; None if that would not help, or not soon."""
    if reply.status not in AGAIN:
        return None
    told = reply.headers.get("retry-after", "")
    if told.isdecimal() and float(told) > 0:
        return float(told) if float(told) <= LONGEST_RETRY_AFTER_S else None
    pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (attempt - 1))
    return pause * random.uniform(0.5, 1.0)  # so that many clients do not come back at once
