"""What the engine has to know about a device beside its models: which errors mean what, and what a call takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

Trouble = Literal["memory", "device", "render"]


@dataclass
class Peak:
    """The highest memory use of a measured call, in bytes."""

    bytes: int = 0


class Device:
    """A device without memory or faults of its own, such as a simulated one; `TorchDevice` is the other kind."""

    def trouble(self, _error: Exception) -> Trouble:
        """Tell an error of too little `memory`, and one after which the `device` runs nothing, from a `render`'s own."""
        return "render"

    def advancing(self) -> AbstractContextManager[object]:
        """Return what renders are advanced in."""
        return nullcontext()

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Measure what a call takes at its highest."""
        yield Peak()

    def relieve(self) -> None:
        """Give back memory that is held in reserve."""
