"""Encoded texts kept for the next image that wants them, by everything that decides them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from latentfarm_worker.operations import Conditioning

CACHE_BYTES = 256 * 2**20


@dataclass
class ConditioningCache:
    """Encoded texts by everything that decides them, the least recently used given up first."""

    limit_bytes: int = CACHE_BYTES
    hits: int = 0
    misses: int = 0
    bytes: int = 0
    _held: OrderedDict[tuple[object, ...], tuple[Conditioning, ...]] = field(default_factory=OrderedDict)

    def get(self, key: tuple[object, ...]) -> tuple[Conditioning, ...] | None:
        """Return what is held for a key, and count."""
        found = self._held.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._held.move_to_end(key)
        return found

    def clear(self) -> None:
        """Give up everything."""
        self._held.clear()
        self.bytes = 0

    def put(self, key: tuple[object, ...], value: tuple[Conditioning, ...]) -> None:
        """Hold a value."""
        if key in self._held:
            return
        self._held[key] = value
        self.bytes += _bytes_of(value)
        while self.bytes > self.limit_bytes and len(self._held) > 1:
            self.bytes -= _bytes_of(self._held.popitem(last=False)[1])


def _bytes_of(conditionings: tuple[Conditioning, ...]) -> int:
    return sum(c.tokens.numel() * c.tokens.element_size() for c in conditionings)
