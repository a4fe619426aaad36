"""How many operations fit into one batch: a memory budget, and what one operation costs, measured and remembered."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from latentfarm_worker.device import Device
from latentfarm_worker.operations import Decode, Denoise, Encode, EncodePixels, Enlarge, Operation, Tune, group_key

MAX_BATCH = {Encode: 16, Denoise: 16, Decode: 4, EncodePixels: 2, Enlarge: 4, Tune: 1}
"""No larger batch is run even if memory allows: what takes long must not hold up other images' steps."""


@dataclass
class Capacity:
    """Decides batch sizes. An operation of a kind and shape never seen runs alone once, and is measured.

    `costs` is a file where measurements outlive the process. Used by the engine's thread alone, but for `describe`.
    """

    budget_bytes: int = 2**62
    device: Device = field(default_factory=Device)
    costs: Path | None = None
    _bytes: dict[str, int] = field(default_factory=dict)
    _limits: dict[str, int] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.costs is not None and self.costs.exists():
            try:
                held = json.loads(self.costs.read_text())
                self._bytes = {str(key): int(value) for key, value in held.items()}
            except (ValueError, AttributeError, TypeError):
                self._bytes = {}  # measured again

    @property
    def measures(self) -> bool:
        """Whether a budget is set at all."""
        return self.budget_bytes < 2**62

    def fitting(self, model: str, operations: Sequence[Operation]) -> int:
        """Return how many of these, from the first on, may share a batch; one at least."""
        taken, spent = 0, 0
        for operation in operations:
            key = _key(model, operation)
            if taken >= min(MAX_BATCH[type(operation)], self._limits.get(key, 2**31)):
                break
            cost = self._bytes.get(key) if self.measures else 0
            if taken and (cost is None or spent + cost > self.budget_bytes):
                break
            taken += 1
            if cost is None:
                break
            spent += cost
        return taken

    @contextmanager
    def measured(self, model: str, operations: Sequence[Operation]) -> Iterator[None]:
        """Run a batch inside; if its kind was never measured and it is alone, measure it."""
        key = _key(model, operations[0])
        if isinstance(operations[0], Tune) or not self.measures or key in self._bytes or len(operations) > 1:
            yield
            return
        with self.device.peak() as peak:
            yield
        with self._guard:
            self._bytes[key] = peak.bytes
            self._write()

    def overflowed(self, model: str, operations: Sequence[Operation]) -> None:
        """Take into account that a batch did not fit: from now on at most half as many of any of its kinds."""
        for operation in operations:
            self._limits[_key(model, operation)] = max(1, len(operations) // 2)
        self.device.relieve()

    def describe(self) -> dict[str, int]:
        """Return the measured costs in bytes, by checkpoint, kind and shape."""
        with self._guard:
            return dict(self._bytes)

    def _write(self) -> None:
        if self.costs is None:
            return
        partial = self.costs.with_name(f".{self.costs.name}.{os.getpid()}")
        with suppress(OSError):  # a full disk costs a measurement at the next start, not an image
            self.costs.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._bytes, indent=1))
            partial.replace(self.costs)


def _key(model: str, operation: Operation) -> str:
    """Name what decides an operation's cost."""
    detail = ""
    if isinstance(operation, Denoise):
        detail = f" x{sum(len(side.conditioning.tokens) for side in operation.sides)}"
    elif isinstance(operation, Encode):
        detail = f" x{sum(len(text) for text in operation.texts)}"
    return f"{model} {' '.join(map(str, group_key(operation)))}{detail}"
