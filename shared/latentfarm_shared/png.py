"""The texts in a PNG file (PNG specification, third edition, section 11.3.3), read without a picture library."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 64 * 2**20


def png_texts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield keyword and text of every tEXt (latin-1), zTXt (latin-1) and iTXt (UTF-8) chunk; damaged ones are passed over.

    Texts of tEXt and zTXt chunks are turned into UTF-8.
    """
    at = len(SIGNATURE)
    while data.startswith(SIGNATURE) and at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        at += 12 + length
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = body.partition(b"\0")
            yield keyword.decode("latin-1"), _text(kind, rest)


def _text(kind: bytes, rest: bytes) -> bytes:
    if kind == b"tEXt":
        return rest.decode("latin-1").encode()
    if kind == b"zTXt":
        return _inflate(rest[1:]).decode("latin-1").encode()
    packed, text = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    return _inflate(text) if packed else text


def _inflate(packed: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, MAX_TEXT_BYTES)
    except zlib.error:
        return b""
