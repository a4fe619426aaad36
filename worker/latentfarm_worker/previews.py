"""Live previews: a latent as a small picture, by a linear map from latent channels to colours.

The map is fitted once to a checkpoint's own decoder, so it suits any of them; after that a preview is one small matrix
product, made on the thread that asks, from what the render saw last.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latentfarm_worker.operations import EncodePixels, Operation, Progress, Rendered
from latentfarm_worker.renders import CHANNELS

EDGE = 128
PICTURES = 4


def fitting() -> Generator[Operation, Any, Rendered]:
    """Encode pictures of coloured patches; returns the map, `[channels + 1, 3]`, in place of pixels."""
    source = torch.Generator().manual_seed(0)
    known, wanted = [], []
    for patches in (2, 4, 8, 16)[:PICTURES]:
        colours = torch.rand(1, 3, patches, patches, generator=source) * 255
        picture = functional.interpolate(colours, size=(EDGE, EDGE), mode="nearest")
        pixels = picture[0].permute(1, 2, 0).to(torch.uint8)
        latent: Tensor = yield EncodePixels(pixels, torch.zeros(CHANNELS, EDGE // 8, EDGE // 8))
        small = functional.interpolate(picture, size=latent.shape[1:], mode="area")[0]
        known.append(torch.cat([latent.cpu().flatten(1), torch.ones(1, small[0].numel())]).T)
        wanted.append(small.flatten(1).T)
    return Rendered(torch.linalg.lstsq(torch.cat(known), torch.cat(wanted)).solution)


def preview(progress: Progress, colours: Tensor) -> Tensor | None:
    """Return `[H/8, W/8, 3]` uint8 of what a render sees now, or None before its first step.

    `colours: [channels + 1, 3]` is the map of the checkpoint.
    """
    latent = progress.latent
    if latent is None:
        return None
    seen = latent.float().cpu()
    picture = torch.einsum("chw,cr->hwr", seen, colours[:-1]) + colours[-1]
    return picture.clamp(0, 255).to(torch.uint8)
