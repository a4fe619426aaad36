"""What a render asks of the device. A render yields one of these and is sent the result."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from latentfarm_shared.prompts.chunks import Chunk
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Encoded prompt: `tokens: [77 * chunks, width]`."""

    tokens: Tensor


@dataclass(frozen=True)
class Encode:
    """Encode the chunks of one prompt. Answered with a `Conditioning`."""

    chunks: tuple[Chunk, ...]
    clip_skip: int


@dataclass(frozen=True, eq=False)
class Denoise:
    """Predict the clean latent from `latent: [4, H/8, W/8]` at noise level `sigma`, guided.

    Answered with `denoised`, a tensor of the latent's shape.
    """

    latent: Tensor
    sigma: float
    positive: Conditioning
    negative: Conditioning
    cfg_scale: float


@dataclass(frozen=True, eq=False)
class Decode:
    """Turn `latent: [4, H/8, W/8]` into `pixels: [H, W, 3]`, uint8."""

    latent: Tensor


Operation = Encode | Denoise | Decode


@dataclass(frozen=True)
class Pixels:
    """A finished picture, `data: [H, W, 3]`, uint8 on the CPU."""

    data: Tensor = field(default_factory=lambda: torch.empty(0, 0, 3, dtype=torch.uint8))


def group_key(operation: Operation) -> tuple[object, ...]:
    """Return what two operations must share to run in one batch of one checkpoint."""
    if isinstance(operation, Encode):
        return "encode", operation.clip_skip
    if isinstance(operation, Denoise):
        lengths = len(operation.positive.tokens), len(operation.negative.tokens)
        return "denoise", tuple(operation.latent.shape), lengths, operation.cfg_scale == 1
    return "decode", tuple(operation.latent.shape)
