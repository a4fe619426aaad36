"""Comparing a job's images: a grid with one thing that varies across, another down, and each value written beside it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from latentfarm_shared.errors import InvalidField, nearest
from latentfarm_shared.infotext import read_infotext, spec_values
from latentfarm_shared.ledger import ImageState
from PIL import Image, ImageDraw, ImageFont

from latentfarm.contact_sheet import INK, MARGIN, PAPER, fit

CELL, GAP, LINE = 192, 4, 18
MOST_CELLS = 2500
EMBEDDING = "embedding"
ALIASES = {"cfg": "cfg_scale", "embeddings": EMBEDDING, "negative": "negative_prompt"}
FAINT = (170, 170, 174)


class Compared(Protocol):
    """An image as it is compared."""

    @property
    def index(self) -> int:
        """Which image of the job it is."""
        ...

    @property
    def state(self) -> ImageState:
        """Where it stands."""
        ...

    @property
    def seed(self) -> int:
        """Its seed."""
        ...

    @property
    def point(self) -> Mapping[str, Any]:
        """Where it lies on the job's axes."""
        ...

    @property
    def parameters(self) -> str:
        """Its infotext."""
        ...

    def summary(self) -> Mapping[str, Any]:
        """Return what is told of it."""
        ...

    def png(self) -> bytes:
        """Return the picture."""
        ...


@dataclass
class _Cell:
    """The images at one place of the grid, of which the first that is rendered is shown."""

    images: list[Compared] = field(default_factory=list)

    @property
    def shown(self) -> Compared | None:
        return next((image for image in self.images if image.state == "succeeded"), None)


def comparison(images: Iterable[Compared], x: str, y: str | None = None, title: str = "") -> Image.Image:
    """Return a grid of pictures: `x` varies across, `y` down.

    Both are fields (`seed`, `sampler`, `cfg_scale`, `embedding` …) or axes of a sweep (`strength:NAME`, `replace:TEXT`), in
    the order in which their values come. Where several images share a place the first is shown, and how many more there are.

    Raises:
        InvalidField: the images have no such field, or there are too many cells to be seen.
    """
    cells: dict[tuple[str, str], _Cell] = {}
    columns: dict[str, None] = {}
    rows: dict[str, None] = {}
    for image in images:
        place = _value(image, "x", x), "" if y is None else _value(image, "y", y)
        columns[place[0]] = rows[place[1]] = None
        cells.setdefault(place, _Cell()).images.append(image)
        if len(columns) * len(rows) > MOST_CELLS:
            raise InvalidField(
                "x", f"{x} by {y or 'nothing'} makes over {MOST_CELLS} cells; choose others, or fewer images"
            )
    if not cells:
        raise InvalidField("x", "the job has no images to compare")
    return _drawn(title, (x, list(columns)), (y or "", list(rows)), cells)


def _value(image: Compared, field_name: str, axis: str) -> str:
    """Return what an image has on an axis, in words."""
    name = ALIASES.get(axis, axis)
    if name == "seed":
        return str(image.seed)
    if name == EMBEDDING:
        applied = [str(row["name"]) for row in image.summary().get("embeddings", ())]
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


def _drawn(
    title: str,
    across: tuple[str, Sequence[str]],
    down: tuple[str, Sequence[str]],
    cells: Mapping[tuple[str, str], _Cell],
) -> Image.Image:
    font = ImageFont.load_default(13)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    labels = [f"{down[0]} {label}".strip() for label in down[1]]
    left = 2 * MARGIN + min(2 * CELL, max(int(probe.textlength(label, font)) for label in labels))
    top = 2 * MARGIN + 2 * LINE
    size = left + len(across[1]) * (CELL + GAP) + MARGIN, top + len(down[1]) * (CELL + LINE + GAP) + MARGIN
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), fit(draw, title, size[0] - 2 * MARGIN, font), INK, font)
    for column, label in enumerate(across[1]):
        text = fit(draw, f"{across[0]} {label}", CELL, font)
        draw.text((left + column * (CELL + GAP), MARGIN + LINE), text, INK, font)
    pictures = _pictures(cells)
    for row, (label, text) in enumerate(zip(down[1], labels, strict=True)):
        height = top + row * (CELL + LINE + GAP)
        draw.text((MARGIN, height + CELL // 2), fit(draw, text, left - 2 * MARGIN, font), INK, font)
        for column, x in enumerate(across[1]):
            at = left + column * (CELL + GAP), height
            cell = cells.get((x, label), _Cell())
            _draw_cell(sheet, draw, at, cell, pictures.get((x, label)), font)
    return sheet


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], cell: _Cell, png: bytes | None, font: Font
) -> None:
    left, top = at
    if png is None:
        word = cell.images[0].state if cell.images else "nothing"
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=FAINT)
        draw.text((left + 6, top + CELL // 2 - 8), word, FAINT, font)
        return
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    if max(picture.size) < CELL:
        scale = CELL / max(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
        )
    sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
    if len(cell.images) > 1:
        draw.text((left, top + CELL), f"and {len(cell.images) - 1} more", FAINT, font)


def _pictures(cells: Mapping[tuple[str, str], _Cell]) -> dict[tuple[str, str], bytes]:
    shown = {place: cell.shown for place, cell in cells.items()}
    found = {place: image for place, image in shown.items() if image is not None}
    with ThreadPoolExecutor(8, "comparison") as threads:
        return dict(zip(found, threads.map(lambda image: image.png(), found.values()), strict=True))
