"""Several checkpoints in one process: loaded when needed, the least recently used given up when memory runs short."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from latentfarm_worker.checkpoint import Checkpoint


class Weighed(Protocol):
    """What takes memory."""

    @property
    def bytes(self) -> int:
        """How much."""
        ...


T = TypeVar("T", bound=Weighed)


class Shelf:
    """Holds checkpoints by hash up to `budget_bytes`; one in use is never given up. Safe to share between threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._held: OrderedDict[str, Weighed] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._loading = threading.Lock()
        self._guard = threading.Lock()
        self.loads = 0

    @contextmanager
    def using(self, key: str, load: Callable[[], T], size: int = 0) -> Iterator[T]:
        """Hold a checkpoint for as long as the block runs, loading it if it is not there.

        One is loaded at a time, after making room for the `size` in bytes it is expected to have.
        """
        checkpoint = self._take(key)
        if checkpoint is None:
            with self._loading:
                self._make_room(size)
                checkpoint = self._take(key) or self._put(key, load())
        try:
            yield checkpoint  # type: ignore[misc]
        finally:
            with self._guard:
                self._users[key] -= 1
            self._make_room()

    def _take(self, key: str) -> Weighed | None:
        with self._guard:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                self._users[key] += 1
            return found

    def _put(self, key: str, checkpoint: Weighed) -> Weighed:
        with self._guard:
            self._held[key] = checkpoint
            self._users[key] += 1
            self.loads += 1
        self._make_room()
        return checkpoint

    def _make_room(self, size: int = 0) -> None:
        """Give up the least recently used that nobody uses, until the rest and `size` more fit."""
        with self._guard:
            for key in list(self._held):
                alone = len(self._held) == 1 and not size
                if alone or size + sum(c.bytes for c in self._held.values()) <= self._budget:
                    return
                if not self._users[key]:
                    del self._held[key]

    def cache_counts(self) -> tuple[int, int]:
        """Return how often encoded prompts were found again and were not, over the checkpoints in memory."""
        with self._guard:
            caches = [checkpoint.cache for checkpoint in self._held.values() if isinstance(checkpoint, Checkpoint)]
        return sum(cache.hits for cache in caches), sum(cache.misses for cache in caches)

    def __contains__(self, key: str) -> bool:
        """Tell whether a checkpoint is in memory."""
        return key in self._held
