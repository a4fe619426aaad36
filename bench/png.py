"""PNG encoding of a 512 x 512 picture against Pillow at its defaults, with equal pixels."""

from __future__ import annotations

import io
import time
from typing import Any

import torch
from latentfarm_worker.png import encode_png
from PIL import Image
from torch.nn import functional

from bench.pairs import interleaved, ratio

REPEATS = 20


def picture(edge: int = 512) -> torch.Tensor:
    """Return a picture like a photograph: smooth shapes with fine grain on them."""
    source = torch.Generator().manual_seed(1)
    layers = [
        functional.interpolate(torch.randn(1, 3, size, size, generator=source), size=(edge, edge), mode="bicubic")
        * share
        for size, share in ((4, 0.4), (16, 0.2), (64, 0.08), (256, 0.03))
    ]
    return ((torch.stack(layers).sum(0)[0] + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).contiguous()


def measure() -> dict[str, Any]:
    """Return the ratio of times, the sizes, and whether the pixels are the same."""
    pixels = picture()
    ours = encode_png(pixels.numpy(), "a cat")
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")

    def isal() -> float:
        began = time.perf_counter()
        for _ in range(REPEATS):
            encode_png(pixels.numpy(), "a cat")
        return (time.perf_counter() - began) / REPEATS * 1000

    def pillow() -> float:
        began = time.perf_counter()
        for _ in range(REPEATS):
            Image.fromarray(pixels.numpy()).save(io.BytesIO(), "PNG")
        return (time.perf_counter() - began) / REPEATS * 1000

    found = interleaved({"ours": isal, "Pillow": pillow})
    decoded = torch.frombuffer(bytearray(Image.open(io.BytesIO(ours)).tobytes()), dtype=torch.uint8)
    return {
        "ms": {name: [round(value, 2) for value in values] for name, values in found.items()},
        "time over Pillow, at most 0.1": ratio(found["ours"], found["Pillow"]).row(),
        "KB": {"ours": len(ours) // 1024, "Pillow": len(buffer.getvalue()) // 1024},
        "pixels equal": bool(torch.equal(decoded.reshape(pixels.shape), pixels)),
    }
