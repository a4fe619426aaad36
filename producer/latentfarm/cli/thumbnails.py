"""Pictures in a terminal: as kitty and iTerm2 show them, or in half blocks where there is colour."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Literal, TextIO

Way = Literal["kitty", "iterm", "blocks"]
COLUMNS, CHUNK = 32, 4096
UPPER = "▀"


def way_of(terminal: TextIO, environ: Mapping[str, str] | None = None) -> Way | None:
    """Return how a terminal shows pictures; None if it does not, or is none."""
    environ = os.environ if environ is None else environ
    if not terminal.isatty() or environ.get("TERM") == "dumb":
        return None
    if environ.get("KITTY_WINDOW_ID") or environ.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if environ.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return "iterm"
    return "blocks" if environ.get("COLORTERM") in ("truecolor", "24bit") else None


def thumbnail(png: bytes, way: Way) -> str:
    """Return what a terminal is sent to show a picture, `COLUMNS` wide."""
    if way == "kitty":
        return _kitty(_small(png, 10 * COLUMNS))
    if way == "iterm":
        small = _small(png, 10 * COLUMNS)
        return f"\x1b]1337;File=inline=1;width={COLUMNS};size={len(small)}:{base64.b64encode(small).decode()}\x07\n"
    return _blocks(png)


def _small(png: bytes, width: int) -> bytes:
    from PIL import Image  # noqa: PLC0415 - keeps --help fast

    with Image.open(io.BytesIO(png)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((width, width))
    file = io.BytesIO()
    small.save(file, "PNG")
    return file.getvalue()


def _kitty(png: bytes) -> str:
    """Return kitty's graphics protocol: PNG (f=100), sent and shown at once (a=T), in chunks of base64."""
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    parts = []
    for number, chunk in enumerate(chunks):
        more = int(number < len(chunks) - 1)
        head = f"a=T,f=100,c={COLUMNS},q=2,m={more}" if number == 0 else f"m={more}"
        parts.append(f"\x1b_G{head};{chunk}\x1b\\")
    return "".join(parts) + "\n"


def _blocks(png: bytes) -> str:
    """Return two rows of pixels a line: the upper half block's colour is the upper pixel, its ground the lower."""
    from PIL import Image  # noqa: PLC0415

    with Image.open(io.BytesIO(png)) as picture:
        rows = max(2, round(COLUMNS * picture.height / picture.width) // 2 * 2)
        pixels = picture.convert("RGB").resize((COLUMNS, rows)).tobytes()

    def at(column: int, row: int) -> str:
        start = 3 * (row * COLUMNS + column)
        return ";".join(str(value) for value in pixels[start : start + 3])

    lines = (
        "".join(f"\x1b[38;2;{at(column, row)};48;2;{at(column, row + 1)}m{UPPER}" for column in range(COLUMNS))
        for row in range(0, rows, 2)
    )
    return "".join(f"{line}\x1b[0m\n" for line in lines)


def show_thumbnails(pngs: Iterable[bytes], terminal: TextIO | None = None) -> None:
    """Show pictures in a terminal that can; otherwise nothing."""
    terminal = terminal or sys.stderr
    way = way_of(terminal)
    if way is not None:
        for png in pngs:
            terminal.write(thumbnail(png, way))
        terminal.flush()
