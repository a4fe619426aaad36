"""Comparing a job's images: a grid with one thing that varies across, another down, and each value written beside it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from latentfarm_shared.errors import InvalidField, nearest
from latentfarm_shared.infotext import read_infotext, spec_values
from PIL import Image, ImageDraw, ImageFont

from latentfarm.contact_sheet import INK, MARGIN, PAPER, fit
from latentfarm.pictures import Picture

CELL, GAP, LINE = 192, 4, 18
MOST_CELLS = 2500
EMBEDDING = "embedding"
ALIASES = {"cfg": "cfg_scale", "embeddings": EMBEDDING, "negative": "negative_prompt"}
FAINT = (170, 170, 174)
Place = tuple[str, str]


@dataclass
class _Cell:
    """One place of a grid: the first image there that is rendered, and how many there are."""

    first: Picture
    shown: Picture | None = None
    count: int = 0


class Grid:
    """Where images lie when `x` varies across and `y` down; their pictures come later."""

    def __init__(self, x: str, y: str | None = None) -> None:
        """Begin empty."""
        self._x, self._y = x, y
        self._columns: dict[str, None] = {}
        self._rows: dict[str, None] = {}
        self._cells: dict[Place, _Cell] = {}

    def add(self, image: Picture) -> None:
        """Put an image where it belongs.

        Raises:
            InvalidField: it has no such field, or there are too many cells to be seen.
        """
        place = _value(image, "x", self._x), "" if self._y is None else _value(image, "y", self._y)
        self._columns[place[0]] = self._rows[place[1]] = None
        cell = self._cells.setdefault(place, _Cell(image))
        cell.count += 1
        if cell.shown is None and image.state == "succeeded":
            cell.shown = image
        if len(self._columns) * len(self._rows) > MOST_CELLS:
            reason = (
                f"{self._x} by {self._y or 'nothing'} makes over {MOST_CELLS} cells; choose others, or fewer images"
            )
            raise InvalidField("x", reason)

    def wanted(self) -> dict[Place, Picture]:
        """Return the images whose pictures are shown."""
        return {place: cell.shown for place, cell in self._cells.items() if cell.shown is not None}

    def drawn(self, title: str, thumbnails: Mapping[Place, Image.Image]) -> Image.Image:
        """Return the grid with these pictures in it.

        Raises:
            InvalidField: there is nothing to compare.
        """
        if not self._cells:
            raise InvalidField("x", "the job has no images to compare")
        rows, columns = list(self._rows), list(self._columns)
        font = ImageFont.load_default(13)
        probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
        labels = [f"{self._y or ''} {label}".strip() for label in rows]
        left = 2 * MARGIN + min(2 * CELL, max(int(probe.textlength(label, font)) for label in labels))
        top = 2 * MARGIN + 2 * LINE
        size = left + len(columns) * (CELL + GAP) + MARGIN, top + len(rows) * (CELL + LINE + GAP) + MARGIN
        sheet = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(sheet)
        draw.text((MARGIN, MARGIN), fit(draw, title, size[0] - 2 * MARGIN, font), INK, font)
        for column, label in enumerate(columns):
            text = fit(draw, f"{self._x} {label}", CELL, font)
            draw.text((left + column * (CELL + GAP), MARGIN + LINE), text, INK, font)
        for row, (y, label) in enumerate(zip(rows, labels, strict=True)):
            height = top + row * (CELL + LINE + GAP)
            draw.text((MARGIN, height + CELL // 2), fit(draw, label, left - 2 * MARGIN, font), INK, font)
            for column, x in enumerate(columns):
                at = left + column * (CELL + GAP), height
                _draw_cell(sheet, draw, at, self._cells.get((x, y)), thumbnails.get((x, y)), font)
        return sheet


def comparison(images: Iterable[Picture], x: str, y: str | None = None, title: str = "") -> Image.Image:
    """Return a grid of pictures: `x` varies across, `y` down.

    Both are fields (`seed`, `sampler`, `cfg_scale`, `embedding` …) or axes of a sweep (`strength:NAME`, `replace:TEXT`), in
    the order in which their values come. Where several images share a place the first is shown, and how many more there are.

    Raises:
        InvalidField: the images have no such field, or there are too many cells to be seen.
    """
    grid = Grid(x, y)
    for image in images:
        grid.add(image)
    wanted = grid.wanted()
    with ThreadPoolExecutor(8, "comparison") as threads:
        thumbnails = threads.map(lambda image: thumbnail(image.png()), wanted.values())
        return grid.drawn(title, dict(zip(wanted, thumbnails, strict=True)))


def thumbnail(png: bytes) -> Image.Image:
    """Return a picture as large as a cell."""
    with Image.open(io.BytesIO(png)) as file:
        picture = file.convert("RGB")
    scale = CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _value(image: Picture, field_name: str, axis: str) -> str:
    """Return what an image has on an axis, in words."""
    name = ALIASES.get(axis, axis)
    if name == "seed":
        return str(image.seed)
    if name == EMBEDDING:
        applied = [str(row["name"]) for row in image.summary()["embeddings"]]
        return " + ".join(applied) or "none"
    if name in image.point:
        return _shown(image.point[name])
    values = spec_values(read_infotext(image.parameters))
    if name not in values:
        known = ["seed", EMBEDDING, *image.point, *values]
        near = nearest(axis, known)
        hint = f"; did you mean {near[0]}?" if near else f"; they have {', '.join(sorted(set(known)))}"
        raise InvalidField(field_name, f"the images have no {axis!r}{hint}")
    return _shown(values[name])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _draw_cell(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    cell: _Cell | None,
    picture: Image.Image | None,
    font: Font,
) -> None:
    left, top = at
    if picture is None:
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=FAINT)
        draw.text((left + 6, top + CELL // 2 - 8), "nothing" if cell is None else cell.first.state, FAINT, font)
        return
    sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
    if cell is not None and cell.count > 1:
        draw.text((left, top + CELL), f"and {cell.count - 1} more", FAINT, font)
