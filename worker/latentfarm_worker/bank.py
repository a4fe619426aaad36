"""The embeddings at hand, by content id: what may be written over rows of a text encoder's input."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from latentfarm_shared.embeddings.files import from_normalised
from latentfarm_shared.errors import RenderError
from latentfarm_shared.records import EmbeddingRecord
from torch import Tensor

BUDGET_BYTES = 512 * 2**20


class TensorSource(Protocol):
    """Where embeddings come from; the library is one."""

    def embedding_tensors(self, record: EmbeddingRecord) -> bytes:
        """Return the normalised safetensors of an embedding."""
        ...


class VectorSource(Protocol):
    """Where vectors to write in come from; the bank is one."""

    def rows(self, record: EmbeddingRecord, encoder: str) -> Tensor:
        """Return `[vectors, width]` for one encoder."""
        ...


class EmbeddingBank:
    """Tensors by (content id, encoder), each `[vectors, width]` float32. Safe to share between threads.

    Holds up to `budget_bytes`; beyond, the least recently used that no render has is given up.
    """

    def __init__(self, source: TensorSource, budget_bytes: int = BUDGET_BYTES) -> None:
        """Fetch from this source what is asked for and missing."""
        self._source, self._budget = source, budget_bytes
        self._tensors: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Count the embeddings held."""
        return len(self._tensors)

    def __contains__(self, content_id: str) -> bool:
        """Tell whether an embedding is held."""
        return content_id in self._tensors

    def resident(self) -> list[str]:
        """Return the content ids of what is held."""
        with self._lock:
            return list(self._tensors)

    def has_room(self, record: EmbeddingRecord) -> bool:
        """Tell whether an embedding fits beside what is held."""
        return self._bytes + 4 * record.vectors * sum(record.widths.values()) <= self._budget

    def hold(self, record: EmbeddingRecord) -> None:
        """Fetch an embedding unless it is here, and make sure that it is the one meant.

        Raises:
            RenderError: what the source gave is something else.
        """
        with self._lock:
            if record.content_id in self._tensors:
                self._tensors.move_to_end(record.content_id)
                return
        found = from_normalised(self._source.embedding_tensors(record), record)
        if found.content_id != record.content_id:
            raise RenderError(f"the store holds other tensors for embedding {record.name!r} than its content id says")
        tensors = {encoder: torch.from_numpy(rows.copy()) for encoder, rows in found.tensors.items()}
        with self._lock:
            if record.content_id not in self._tensors:
                self._tensors[record.content_id] = tensors
                self._bytes += _size(tensors)
                self._make_room(record.content_id)

    def _make_room(self, newest: str) -> None:
        for content_id in list(self._tensors):
            if self._bytes <= self._budget:
                return
            if not self._users[content_id] and content_id != newest:
                self._bytes -= _size(self._tensors.pop(content_id))

    @contextmanager
    def using(self, records: Iterable[EmbeddingRecord]) -> Iterator[None]:
        """Keep embeddings for as long as the block runs, fetching those that are not here."""
        records = list(records)
        with self._lock:
            self._users.update(record.content_id for record in records)
        try:
            for record in records:
                self.hold(record)
            yield
        finally:
            with self._lock:
                self._users.subtract(record.content_id for record in records)
                self._users += Counter()  # forget those at zero

    def rows(self, record: EmbeddingRecord, encoder: str) -> Tensor:
        """Return `[vectors, width]` for one encoder.

        Raises:
            RenderError: it was never fetched, or has no such encoder.
        """
        try:
            return self._tensors[record.content_id][encoder]
        except KeyError:
            raise RenderError(f"embedding {record.name!r} has no vectors for {encoder} here") from None


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
