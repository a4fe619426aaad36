"""The embeddings at hand, by content id: what may be written over rows of a text encoder's input."""

from __future__ import annotations

import threading
from typing import Protocol

from latentfarm_shared.errors import RenderError
from latentfarm_shared.records import EmbeddingRecord
from safetensors.torch import load
from torch import Tensor


class TensorSource(Protocol):
    """Where embeddings come from; the registry is one."""

    def embedding_tensors(self, record: EmbeddingRecord) -> bytes:
        """Return the normalised safetensors of an embedding."""
        ...


class EmbeddingBank:
    """Tensors by (content id, encoder), each `[vectors, width]` float32. Safe to share between threads."""

    def __init__(self, source: TensorSource) -> None:
        """Fetch from this source what is asked for and missing."""
        self._source = source
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Count the embeddings held."""
        return len(self._tensors)

    def hold(self, record: EmbeddingRecord) -> None:
        """Fetch an embedding unless it is here."""
        if record.content_id in self._tensors:
            return
        tensors = load(self._source.embedding_tensors(record))
        with self._lock:
            self._tensors[record.content_id] = tensors

    def rows(self, record: EmbeddingRecord, encoder: str) -> Tensor:
        """Return `[vectors, width]` for one encoder.

        Raises:
            RenderError: it was never fetched, or has no such encoder.
        """
        try:
            return self._tensors[record.content_id][encoder]
        except KeyError:
            raise RenderError(f"embedding {record.name!r} has no vectors for {encoder} here") from None
