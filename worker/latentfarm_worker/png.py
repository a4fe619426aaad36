"""Encode pictures as PNG with A1111's `parameters` text."""

from __future__ import annotations

import io

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def encode_png(pixels: Tensor, infotext: str) -> bytes:
    """Encode `pixels: [H, W, 3]` uint8; fast compression, since A1111's default level costs four times as much."""
    info = PngInfo()
    info.add_text("parameters", infotext)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG", pnginfo=info, compress_level=1)
    return buffer.getvalue()
