"""Contact sheets: pictures side by side with a line of text under each."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import product

from latentfarm_shared.specs import JobSpec
from latentfarm_shared.sweeps.axes import Value
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
        draw.text((MARGIN, top), fit(draw, heading, sheet.width - 2 * MARGIN, font), INK, font)
        for column, (caption, png) in enumerate(pictures):
            left = MARGIN + column * (COLUMN_WIDTH + MARGIN)
            picture = Image.open(io.BytesIO(png)).convert("RGB")
            sheet.paste(picture.resize((COLUMN_WIDTH, COLUMN_WIDTH), Image.Resampling.LANCZOS), (left, top + LINE))
            draw.text((left, top + LINE + COLUMN_WIDTH + 3), fit(draw, caption, COLUMN_WIDTH, font), INK, font)
        top += COLUMN_WIDTH + 2 * LINE + 2 * MARGIN
    return sheet


def fit(draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten a text until it fits."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


CELL, LABEL = 160, 18


def axis_sheet(spec: JobSpec, pictures: Mapping[int, bytes]) -> Image.Image:
    """Lay a sweep's PNG pictures out along its axes: columns the first, rows the others, each labelled with its value.

    `pictures` are by index; those that are missing stay blank. Without axes the rows are seeds.
    """
    columns = [_label(spec.axes[0].field, value) for value in spec.axes[0].items] if spec.axes else [""]
    rows = _row_labels(spec)
    font = ImageFont.load_default(12)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = MARGIN + max(int(probe.textlength(label, font)) for label in rows) + MARGIN
    size = left + len(columns) * (CELL + 4) + MARGIN, 2 * MARGIN + 2 * LABEL + len(rows) * (CELL + 4)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), fit(draw, spec.prompt, size[0] - 2 * MARGIN, font), INK, font)
    for column, label in enumerate(columns):
        draw.text((left + column * (CELL + 4), MARGIN + LABEL), fit(draw, label, CELL, font), INK, font)
    for row, label in enumerate(rows):
        top = MARGIN + 2 * LABEL + row * (CELL + 4)
        draw.text((MARGIN, top + CELL // 2), label, INK, font)
        for column in range(len(columns)):
            png = pictures.get(column * len(rows) + row)
            if png is not None:
                picture = Image.open(io.BytesIO(png)).convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
                sheet.paste(picture, (left + column * (CELL + 4), top))
    return sheet


def _row_labels(spec: JobSpec) -> list[str]:
    """Return a label for every image at one value of the first axis, in order of index."""
    others = spec.axes[1:]
    points = product(*([_label(axis.field, value) for value in axis.items] for axis in others))
    counted = [_seed_label(spec, number) for number in range(spec.count)] if spec.count > 1 or not others else [""]
    return [", ".join(filter(None, (*point, seed))) for point in points for seed in counted]


def _seed_label(spec: JobSpec, number: int) -> str:
    """Name one of the images at a point: by its seed, or how far it is from the one that an axis gives."""
    if any(axis.field == "seed" for axis in spec.axes):
        return f"seed + {number}" if spec.count > 1 else ""
    return f"seed {spec.seed + number}"


def _label(field: str, value: Value) -> str:
    shown = f"{value:g}" if isinstance(value, float | int) else value
    return f"{field.removeprefix('strength:').removeprefix('replace:')} {shown}"[:60]
