"""Making pictures and latents larger: A1111's latent modes, plain resampling, and upscaler models in tiles."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from latentfarm_shared.names import LATENT_UPSCALERS
from PIL import Image
from torch import Tensor
from torch.nn import functional

from latentfarm_worker.operations import Enlarge, Operation

TILE, OVERLAP = 192, 8  # of the small picture, in pixels; A1111's defaults for ESRGAN
MAX_ROUNDS = 3
_FILTERS = {"Nearest": Image.Resampling.NEAREST, "Lanczos": Image.Resampling.LANCZOS}


def enlarge_latent(latent: Tensor, upscaler: str, size: tuple[int, int]) -> Tensor:
    """Interpolate `latent: [4, h, w]` to `size` (width, height in pixels)."""
    mode, antialias = LATENT_UPSCALERS[upscaler]
    shape = size[1] // 8, size[0] // 8
    return functional.interpolate(latent[None].float(), size=shape, mode=mode, antialias=antialias)[0]


def enlarge_pixels(pixels: Tensor, upscaler: str, size: tuple[int, int]) -> Generator[Operation, Any, Tensor]:
    """Enlarge `pixels: [H, W, 3]` uint8 to `size` (width, height).

    A model is applied until the picture is large enough, three times at most; Lanczos does the rest.
    """
    picture = pixels
    if upscaler not in ("None", *_FILTERS):
        for _ in range(MAX_ROUNDS):
            if picture.shape[1] >= size[0] and picture.shape[0] >= size[1]:
                break
            enlarged = yield from _with_model(picture, upscaler)
            if enlarged.shape == picture.shape:
                break
            picture = enlarged
    filter_ = _FILTERS.get(upscaler, Image.Resampling.LANCZOS)
    return _resize(picture, size, filter_)


def _resize(pixels: Tensor, size: tuple[int, int], how: Image.Resampling) -> Tensor:
    if (pixels.shape[1], pixels.shape[0]) == size:
        return pixels
    resized = Image.fromarray(pixels.numpy()).resize(size, how)
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3)


def _with_model(pixels: Tensor, upscaler: str) -> Generator[Operation, Any, Tensor]:
    """Run an upscaler model over the picture, tile by tile, blended where tiles overlap."""
    picture = pixels.permute(2, 0, 1).float() / 255
    high, wide = picture.shape[1:]
    result, weight = torch.zeros(()), torch.zeros(())
    for top in _starts(high):
        for left in _starts(wide):
            tile = picture[:, top : top + TILE, left : left + TILE]
            enlarged: Tensor = yield Enlarge(tile, upscaler)
            scale = enlarged.shape[1] // tile.shape[1]
            if not result.dim():
                result = torch.zeros(3, high * scale, wide * scale)
                weight = torch.zeros(1, high * scale, wide * scale)
            mask = _feather(enlarged.shape[1], enlarged.shape[2], OVERLAP * scale)
            rows = slice(top * scale, top * scale + enlarged.shape[1])
            columns = slice(left * scale, left * scale + enlarged.shape[2])
            result[:, rows, columns] += enlarged * mask
            weight[:, rows, columns] += mask
    return ((result / weight).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def _starts(length: int) -> list[int]:
    """Return where tiles begin so that they cover a length and overlap."""
    if length <= TILE:
        return [0]
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    return [round(i * (length - TILE) / (count - 1)) for i in range(count)]


def _feather(high: int, wide: int, edge: int) -> Tensor:
    """Return weights that rise from the borders, `[1, high, wide]`."""
    ramps = [torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1)).clamp(max=edge) / edge for n in (high, wide)]
    return (ramps[0][:, None] * ramps[1][None, :])[None]
