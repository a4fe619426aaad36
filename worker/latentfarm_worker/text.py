"""Text encoders: chunks of tokens in, states out, embeddings written in on the way and proven.

CLIP-L of SD1, OpenCLIP-H of SD2 (the layer before the last), CLIP-L and bigG of SDXL (the same, without the final norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from latentfarm_shared.prompts.chunks import Chunk
from torch import Tensor

from latentfarm_worker.bank import EmbeddingBank, VectorSource
from latentfarm_worker.injection import Injection, injected


@dataclass(frozen=True)
class EncoderTraits:
    """What sets a family's encoder apart.

    `pads_with_end`: whether padding is the end token or 0. `layer`: which hidden state is taken, counted from the end,
    None for the one clip skip asks for. `final_norm`: whether the encoder's last norm is applied to it.
    """

    pads_with_end: bool = True
    layer: int | None = None
    final_norm: bool = True


@dataclass(frozen=True, eq=False)
class Encoded:
    """States of some chunks, `[n, 77, width]`; `pooled: [n, width]` where the encoder has a projection.

    `applied` are, chunk by chunk, the content ids of embeddings found in what entered the encoder.
    """

    states: Tensor
    pooled: Tensor | None
    applied: tuple[frozenset[str], ...]


class TextEncoder:
    """One of a checkpoint's text encoders."""

    def __init__(self, module: Any, name: str, bank: EmbeddingBank, traits: EncoderTraits) -> None:
        """`module` is a CLIPTextModel, with or without projection; `name` is the encoder's in the bank (`clip_l`)."""
        self.module, self.name, self._bank, self._traits = module, name, bank, traits
        self._core = getattr(module, "text_model", module)
        self._projection = getattr(module, "text_projection", None)

    def around(self, module: Any) -> TextEncoder:
        """Return the same encoder with another module, such as a copy in another number format."""
        return TextEncoder(module, self.name, self._bank, self._traits)

    def token_table(self) -> Tensor:
        """Return the input embeddings of the vocabulary, `[tokens, width]`."""
        table: Tensor = self._core.get_input_embeddings().weight
        return table

    def encode(self, chunks: Sequence[Chunk], clip_skip: int, bank: VectorSource | None = None) -> Encoded:
        """Encode chunks in one call and look up which embeddings went in; their vectors are those of another `bank` if given.

        Raises:
            EmbeddingNotApplied: the vectors of an embedding are not in the rows they belong in.
        """
        device = self._core.final_layer_norm.weight.device
        ids = torch.tensor([self._ids(chunk) for chunk in chunks], device=device)
        injection = Injection([chunk.placements for chunk in chunks], bank or self._bank, self.name)
        skip = self._traits.layer or clip_skip
        with injected(self._core.get_input_embeddings(), injection):
            output = self._core(input_ids=ids, output_hidden_states=skip > 1 or not self._traits.final_norm)
        states: Tensor = output.last_hidden_state
        if skip > 1 or not self._traits.final_norm:
            states = output.hidden_states[-skip]
            states = self._core.final_layer_norm(states) if self._traits.final_norm else states
        pooled = None
        if self._projection is not None:
            ends = torch.tensor([chunk.length + 1 for chunk in chunks], device=device)
            pooled = self._projection(output.last_hidden_state[torch.arange(len(chunks), device=device), ends])
        return Encoded(states, pooled, injection.prove())

    def _ids(self, chunk: Chunk) -> tuple[int, ...]:
        if self._traits.pads_with_end:
            return chunk.tokens
        used = chunk.length + 2
        return chunk.tokens[:used] + (0,) * (len(chunk.tokens) - used)
