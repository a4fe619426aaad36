"""Classifier-free guidance over time: which texts guide a call of the model, and with what share.

Shares follow `negative + sum of weight * cfg * (positive - negative)` (composable diffusion, arXiv:2206.01714); when the
negative side is left out, the first positive side takes its place, as in A1111 v1.10.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from latentfarm_shared.parameters import SamplingOptions

from latentfarm_worker.operations import Conditioning, Side

CFG_PLUS_PLUS = 1 / 12.5  # A1111's factor between its CFG scale and CFG++'s


@dataclass(frozen=True, eq=False)
class Timed:
    """The encoded texts of one side of an `AND`, each with the last call it serves."""

    weight: float
    ends: tuple[int, ...]
    conditionings: tuple[Conditioning, ...]

    def at(self, call: int) -> Conditioning:
        """Return the text that serves a call."""
        return self.conditionings[self.index_at(call)]

    def index_at(self, call: int) -> int:
        """Return which text serves the model's call number `call`, counted from 0.

        One that ends at step n serves calls 0 to n, one more than it has steps; calls past the last one's end get the
        first. Both are A1111's ways.
        """
        return next((i for i, end in enumerate(self.ends) if call <= end), 0)


@dataclass(frozen=True, eq=False)
class Guidance:
    """What guides one pass over one image.

    `calls` is how often A1111 expects the model to be asked; `empty` is the encoded empty prompt if conds are padded.
    """

    positive: tuple[Timed, ...]
    negative: Timed
    cfg_scale: float
    calls: int
    options: SamplingOptions
    empty: Conditioning | None = None
    renoises: bool = False

    def sides(self, call: int, level: float) -> tuple[Side, ...]:
        """Return the sides of a call at a noise level (or training step), last the one the others are seen from.

        That is the negative one, or the first positive one where the negative is left out.
        """
        positives = _same_length([part.at(call) for part in self.positive])
        scale = self.cfg_scale * (CFG_PLUS_PLUS if self.renoises else 1.0)
        shares = [part.weight * scale for part in self.positive]
        rest = 1.0 - sum(shares)
        if self._leaves_negative_out(call, level, shares):
            others = zip(positives[1:], shares[1:], strict=True)
            return (*(Side(c, share) for c, share in others), Side(positives[0], shares[0] + rest))
        negative = self.negative.at(call)
        positives, negative = self._padded(positives, negative)
        return (*(Side(c, share) for c, share in zip(positives, shares, strict=True)), Side(negative, rest))

    def _leaves_negative_out(self, call: int, level: float, shares: list[float]) -> bool:
        options = self.options
        if self.renoises:
            return False
        if shares == [1.0]:
            return True
        if options.skip_early_cfg and call / self.calls <= options.skip_early_cfg:
            return True
        return level < options.ngms and bool(call % 2 or options.ngms_all_steps)

    def _padded(self, positives: list[Conditioning], negative: Conditioning) -> tuple[list[Conditioning], Conditioning]:
        """Bring both sides to one length if the options ask for it (A1111's pad conds, and its first version)."""
        length = len(positives[0].tokens)
        if self.options.pad_conds == "no" or len(negative.tokens) == length:
            return positives, negative
        if self.options.pad_conds == "v0":
            return positives, _repeat_last(negative, length)
        longest = max(length, len(negative.tokens))
        return [self._with_empty(c, longest) for c in positives], self._with_empty(negative, longest)

    def _with_empty(self, conditioning: Conditioning, length: int) -> Conditioning:
        if self.empty is None:
            raise RuntimeError("padding needs the encoded empty prompt")
        missing = (length - len(conditioning.tokens)) // len(self.empty.tokens)
        tokens = torch.cat([conditioning.tokens, self.empty.tokens.repeat(missing, 1)])
        return Conditioning(tokens, conditioning.pooled, conditioning.applied)


def _same_length(conditionings: list[Conditioning]) -> list[Conditioning]:
    longest = max(len(c.tokens) for c in conditionings)
    return [c if len(c.tokens) == longest else _repeat_last(c, longest) for c in conditionings]


def _repeat_last(conditioning: Conditioning, length: int) -> Conditioning:
    """Cut to a length, or repeat the last row up to it."""
    tokens = conditioning.tokens[:length]
    tokens = torch.cat([tokens, tokens[-1:].expand(length - len(tokens), -1)])
    return Conditioning(tokens, conditioning.pooled, conditioning.applied)
