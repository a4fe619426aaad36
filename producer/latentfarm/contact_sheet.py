"""Contact sheets: pictures side by side with a line of text under each."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, INK, PAPER = 12, 18, (30, 30, 34), (250, 250, 248)
COLUMN_WIDTH = 256


def contact_sheet(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, bytes]]]]) -> Image.Image:
    """Lay out rows of PNG pictures; each row has a heading, each picture a caption."""
    font = ImageFont.load_default(13)
    columns = max(len(pictures) for _, pictures in rows)
    height = MARGIN + 2 * LINE + len(rows) * (COLUMN_WIDTH + 2 * LINE + 2 * MARGIN)
    sheet = Image.new("RGB", (MARGIN + columns * (COLUMN_WIDTH + MARGIN), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(16))
    top = MARGIN + 2 * LINE
    for heading, pictures in rows:
        draw.text((MARGIN, top), _fit(draw, heading, sheet.width - 2 * MARGIN, font), INK, font)
        for column, (caption, png) in enumerate(pictures):
            left = MARGIN + column * (COLUMN_WIDTH + MARGIN)
            picture = Image.open(io.BytesIO(png)).convert("RGB")
            sheet.paste(picture.resize((COLUMN_WIDTH, COLUMN_WIDTH), Image.Resampling.LANCZOS), (left, top + LINE))
            draw.text((left, top + LINE + COLUMN_WIDTH + 3), _fit(draw, caption, COLUMN_WIDTH, font), INK, font)
        top += COLUMN_WIDTH + 2 * LINE + 2 * MARGIN
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a text until it fits."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
