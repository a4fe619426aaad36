"""A1111's image embeddings: the dictionary of a `.pt` file in a picture's text, or hidden in its pixels.

After the behaviour of A1111 v1.10.1: the text `sd-ti-embedding` first, then the low four bits of every byte, which
survive sites that strip texts.
"""

from __future__ import annotations

import base64
import io
import json
import warnings
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentfarm_shared.embeddings.refusals import Caps, Refusal
from latentfarm_shared.png import png_texts

KEYWORD = "sd-ti-embedding"
MAX_PIXELS = 4096 * 4096 // 2
_MULTIPLIER, _INCREMENT, _MODULUS = 1664525, 1013904223, 2**32
Bytes = NDArray[np.uint8]


def is_picture(data: bytes) -> bool:
    """Tell whether these are the first bytes of a PNG, JPEG, WebP, AVIF, JPEG XL or GIF."""
    starts = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\x0a", b"GIF8", b"\0\0\0\x0cJXL ")
    return data.startswith(starts) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP") or data[4:12] == b"ftypavif"


def read_picture(data: bytes, caps: Caps) -> dict[str, Any]:
    """Return what an image embedding holds.

    Raises:
        Refusal: an ordinary picture, or a damaged one.
    """
    text = next((value for key, value in png_texts(data) if key == KEYWORD), None)
    try:
        packed = base64.b64decode(text) if text is not None else _hidden(data, caps)
        content = json.loads(packed, object_hook=_tensor)
    except (ValueError, RecursionError, zlib.error) as error:
        raise Refusal("CORRUPT", "a picture whose embedding is damaged") from error
    if not isinstance(content, dict):
        raise Refusal("CORRUPT", "a picture whose embedding is damaged")
    return content


def _tensor(item: dict[str, Any]) -> Any:
    if "TORCHTENSOR" not in item:
        return item
    return np.asarray(item["TORCHTENSOR"], dtype=np.float64).astype(np.float32)


def _hidden(data: bytes, caps: Caps) -> bytes:
    """Return the JSON in a picture's pixels."""
    pixels = _cropped(_pixels(data))
    low = pixels & 0x0F
    empty = np.flatnonzero(low.sum((0, 2), dtype=np.int64) == 0)
    if len(empty) < 2:
        raise Refusal("PICTURE", "a picture that holds no embedding")
    lower, upper = low[:, : empty[0]], low[:, empty[-1] + 1 :]
    if lower.shape != upper.shape:
        raise Refusal("PICTURE", "a picture that holds no embedding")
    stream = _key_stream(lower.size).reshape(lower.shape)
    joined = ((upper ^ stream) << 4 | (lower ^ stream)).astype(np.uint8)
    unpacked = zlib.decompressobj().decompress(joined.tobytes(), caps.file_bytes)
    if len(unpacked) >= caps.file_bytes:
        raise Refusal("TOO_LARGE", f"its embedding unpacks to more than {caps.file_mb} MB")
    return unpacked


def _pixels(data: bytes) -> Bytes:
    from PIL import Image  # noqa: PLC0415 - only pictures need it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "AVIF", "JPEG", "GIF")) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise Refusal("TOO_LARGE", f"a picture of {picture.width} x {picture.height} pixels")
                return np.asarray(picture.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise Refusal("TOO_LARGE", "a picture that unpacks to far more than any embedding") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise Refusal("PICTURE", "a picture that holds no embedding, or a damaged one") from error


def _cropped(pixels: Bytes) -> Bytes:
    """Cut off the black border; a pixel is lit if all three of its channels are."""
    lit = np.asarray(pixels.min(2) > 0)
    rows, columns = np.flatnonzero(lit.sum(1)), np.flatnonzero(lit.sum(0))
    if not len(rows):
        raise Refusal("PICTURE", "a picture that holds no embedding")
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _key_stream(count: int) -> Bytes:
    """Return the low four bits of a linear congruential generator's values modulo 255."""
    values = bytearray(count)
    state = 0
    for i in range(count):
        state = (_MULTIPLIER * state + _INCREMENT) % _MODULUS
        values[i] = (state % 255) & 0x0F
    return np.frombuffer(bytes(values), np.uint8)
