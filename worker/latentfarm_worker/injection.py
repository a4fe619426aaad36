"""Textual inversion: vectors written over rows of a text encoder's input embeddings, and proof that they went in.

No token is registered and no matrix resized: a hook on the token embedding puts the vectors in for one call, a second
hook behind it keeps the tensor that really enters the encoder. Ejecting removes both and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from latentfarm_shared.errors import EmbeddingNotApplied
from latentfarm_shared.prompts.chunks import Placement
from torch import Tensor, nn

from latentfarm_worker.bank import VectorSource


@dataclass
class Injection:
    """What is to be written in each row of a batch, and what entered the encoder (`[B, 77, width]`)."""

    placements: Sequence[tuple[Placement, ...]]
    bank: VectorSource
    encoder: str
    entered: Tensor | None = None

    def _vectors(self, placement: Placement, like: Tensor) -> Tensor:
        rows = self.bank.rows(placement.embedding, self.encoder)
        return rows[placement.first_row : placement.first_row + placement.rows].to(like)

    def write(self, _module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
        """Put the vectors in their rows; a hook on the token embedding."""
        written = embedded.clone()
        for row, placements in enumerate(self.placements):
            for placement in placements:
                end = placement.position + placement.rows
                written[row, placement.position : end] = self._vectors(placement, written)
        return written

    def witness(self, _module: nn.Module, _inputs: Any, embedded: Tensor) -> None:
        """Keep what the encoder gets; a hook behind `write`."""
        self.entered = embedded.detach()

    def prove(self) -> tuple[frozenset[str], ...]:
        """Return, row by row, the content ids of the embeddings that entered, by comparing what did with the bank.

        Raises:
            EmbeddingNotApplied: an embedding's rows are not where they should be.
        """
        return tuple(self._entered_in(row) for row in range(len(self.placements)))

    def _entered_in(self, row: int) -> frozenset[str]:
        found = set()
        for placement in self.placements[row]:
            if self.entered is None:
                raise EmbeddingNotApplied(f"embedding {placement.embedding.name!r} never reached the encoder")
            end = placement.position + placement.rows
            entered = self.entered[row, placement.position : end]
            if not torch.equal(entered, self._vectors(placement, entered)):
                raise EmbeddingNotApplied(f"embedding {placement.embedding.name!r} did not enter the encoder")
            found.add(placement.embedding.content_id)
        return frozenset(found)


@contextmanager
def injected(token_embedding: nn.Module, injection: Injection) -> Iterator[None]:
    """Inject for the calls inside, then eject."""
    handles = [
        token_embedding.register_forward_hook(injection.write),
        token_embedding.register_forward_hook(injection.witness),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
