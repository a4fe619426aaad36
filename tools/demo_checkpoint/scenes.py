"""Everything the demo checkpoint can draw, as frozen values and as pictures.

A scene says *what* is in a picture; `render` decides the rest (position, tint) from a random generator
and paints it with Pillow. Coordinates are in units of 1/64 of the picture's edge, so one scene can be
painted at any size.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[int, int, int]

PALETTE: dict[str, RGB] = {
    "red": (222, 38, 38),
    "yellow": (248, 218, 44),
    "green": (40, 165, 65),
    "blue": (40, 80, 215),
    "purple": (130, 50, 175),
    "pink": (250, 140, 190),
    "brown": (120, 72, 38),
    "black": (22, 22, 25),
    "white": (246, 246, 246),
}
COLOURS = tuple(PALETTE)
SKIN: RGB = (252, 215, 185)
VISOR: RGB = (70, 205, 225)
MOON_GREY: RGB = (160, 160, 166)
NIGHT: RGB = (14, 14, 28)
SKY: RGB = (130, 200, 245)
GRASS: RGB = (70, 170, 65)

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES = ("medium", "large")
PATTERNS = ("striped", "polka dot", "checkered")
HAIR = ("brown", "black", "yellow", "pink", "blue", "purple", "red", "white")
EYES = ("blue", "green", "brown")
HORSES = ("brown", "white")
SUBJECTS = ("astronaut riding a horse", "horse", "astronaut")
PLACES = ("moon", "field", "plain")
SUPERSAMPLING = 3


@dataclass(frozen=True)
class Background:
    """A plain colour, or a pattern of two."""

    colour: str
    pattern: str = ""
    second: str = ""


@dataclass(frozen=True)
class ShapeScene:
    """One flat shape in the middle of a background."""

    shape: str
    colour: str
    size: str
    background: Background


@dataclass(frozen=True)
class Portrait:
    """Head and shoulders of one girl; an empty headphones or scarf colour means she wears none."""

    hair: str
    long_hair: bool
    eyes: str
    smile: bool
    blush: bool
    headphones: str
    scarf: str
    suit: str
    background: Background


@dataclass(frozen=True)
class RidingScene:
    """An astronaut, a horse, or one on the other, somewhere."""

    subject: str
    horse: str
    place: str
    background: Background


Scene = ShapeScene | Portrait | RidingScene


def is_held_out(scene: Scene) -> bool:
    """Tell whether a scene is kept from training; one in twelve shapes and portraits is."""
    return not isinstance(scene, RidingScene) and zlib.crc32(repr(scene).encode()) % 12 == 0


def random_scene(rng: random.Random, kind: type[Scene] | None = None) -> Scene:
    """Draw one scene, of `kind` if given, else in the proportions the training uses."""
    if kind is None:
        kind = rng.choices((ShapeScene, Portrait, RidingScene), (0.4, 0.44, 0.16))[0]
    if kind is ShapeScene:
        return _random_shape(rng)
    if kind is Portrait:
        return _random_portrait(rng)
    return _random_riding(rng)


def _random_shape(rng: random.Random) -> ShapeScene:
    colour, first, second = rng.sample(COLOURS, 3)
    background = Background(first) if rng.random() < 0.7 else Background(first, rng.choice(PATTERNS), second)
    return ShapeScene(rng.choice(SHAPES), colour, rng.choice(SIZES), background)


def _random_portrait(rng: random.Random) -> Portrait:
    hair = rng.choice(HAIR)
    background = rng.choice([c for c in COLOURS if c != hair])
    headphones = rng.choice([c for c in COLOURS if c not in (hair, background)]) if rng.random() < 0.6 else ""
    suit = rng.choice([c for c in COLOURS if c not in (background, hair)])
    scarf = rng.choice([c for c in COLOURS if c not in (suit, hair, background)]) if rng.random() < 0.5 else ""
    return Portrait(
        hair=hair,
        long_hair=rng.random() < 0.5,
        eyes=rng.choice(EYES),
        smile=rng.random() < 0.5,
        blush=rng.random() < 0.5,
        headphones=headphones,
        scarf=scarf,
        suit=suit,
        background=Background(background),
    )


def _random_riding(rng: random.Random) -> RidingScene:
    horse = rng.choice(HORSES)
    colour = rng.choice([c for c in ("red", "yellow", "green", "blue", "purple", "pink") if c != horse])
    return RidingScene(
        rng.choices(SUBJECTS, (0.5, 0.25, 0.25))[0],
        horse,
        rng.choices(PLACES, (0.45, 0.3, 0.25))[0],
        Background(colour),
    )


class _Canvas:
    """Pillow drawing in units of 1/64 edge about a movable, scalable origin."""

    def __init__(self, edge: int, colour: RGB) -> None:
        self.image = Image.new("RGB", (edge, edge), colour)
        self.draw = ImageDraw.Draw(self.image)
        self.unit = edge / 64
        self.origin = (32.0, 32.0)
        self.scale = 1.0

    def at(self, x: float, y: float, scale: float = 1.0) -> None:
        self.origin, self.scale = (x, y), scale

    def _points(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        (ox, oy), k = self.origin, self.scale
        return [((ox + x * k) * self.unit, (oy + y * k) * self.unit) for x, y in points]

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        (left, top), (right, bottom) = self._points([(x0, y0), (x1, y1)])
        return left, top, right, bottom

    def polygon(self, points: list[tuple[float, float]], colour: RGB) -> None:
        self.draw.polygon(self._points(points), fill=colour)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, colour: RGB) -> None:
        self.draw.ellipse(self._box(x0, y0, x1, y1), fill=colour)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, colour: RGB, radius: float = 0.0) -> None:
        self.draw.rounded_rectangle(self._box(x0, y0, x1, y1), radius * self.unit * self.scale, fill=colour)

    def pie(self, box: tuple[float, float, float, float], start: int, end: int, colour: RGB) -> None:
        self.draw.pieslice(self._box(*box), start, end, fill=colour)

    def arc(self, box: tuple[float, float, float, float], width: float, colour: RGB) -> None:
        self.draw.arc(self._box(*box), 180, 360, fill=colour, width=round(width * self.unit * self.scale))


def _tint(rng: random.Random, colour: RGB, amount: float = 8) -> RGB:
    red, green, blue = (round(min(255, max(0, c + rng.uniform(-amount, amount)))) for c in colour)
    return red, green, blue


def shape_outline(name: str) -> list[list[tuple[float, float]]]:
    """Return the polygons of a shape of radius 1 about the origin, y downwards."""
    circle = [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64)]
    turns = [math.radians(-90 + 36 * i) for i in range(10)]
    curve = np.linspace(0, 2 * math.pi, 64)
    polygons: dict[str, list[list[tuple[float, float]]]] = {
        "circle": [circle],
        "square": [[(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]],
        "triangle": [[(0, -1), (1.05, 0.85), (-1.05, 0.85)]],
        "star": [[(math.cos(a) * r, math.sin(a) * r) for a, r in zip(turns, (1.12, 0.44) * 5, strict=True)]],
        "heart": [
            [
                (
                    16 * math.sin(t) ** 3 / 16.5,
                    -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5 - 0.05,
                )
                for t in curve
            ]
        ],
        "cross": [
            [(-0.32, -1), (0.32, -1), (0.32, 1), (-0.32, 1)],
            [(-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)],
        ],
    }
    return polygons[name]


def _paint_background(canvas: _Canvas, rng: random.Random, background: Background) -> None:
    canvas.at(0, 0)
    canvas.rectangle(0, 0, 64, 64, _tint(rng, PALETTE[background.colour]))
    if not background.pattern:
        return
    colour = _tint(rng, PALETTE[background.second])
    if background.pattern == "striped":
        for i in range(4):
            canvas.rectangle(0, i * 16 + 8, 64, i * 16 + 16, colour)
        return
    for row in range(4):
        for column in range(4):
            x, y = column * 16, row * 16
            if background.pattern == "polka dot":
                canvas.ellipse(x + 3, y + 3, x + 13, y + 13, colour)
            elif (row + column) % 2:
                canvas.rectangle(x, y, x + 16, y + 16, colour)


def _paint_shape(canvas: _Canvas, rng: random.Random, scene: ShapeScene) -> None:
    radius = rng.uniform(15.5, 18) if scene.size == "medium" else rng.uniform(23, 26)
    canvas.at(32 + rng.uniform(-2, 2), 32 + rng.uniform(-2, 2), radius)
    colour = _tint(rng, PALETTE[scene.colour])
    for polygon in shape_outline(scene.shape):
        canvas.polygon(polygon, colour)


def _paint_portrait(canvas: _Canvas, rng: random.Random, girl: Portrait) -> None:
    canvas.at(32 + rng.uniform(-1.5, 1.5), 30 + rng.uniform(-1, 1), rng.uniform(0.97, 1.04))
    hair, suit = _tint(rng, PALETTE[girl.hair]), _tint(rng, PALETTE[girl.suit])
    if girl.long_hair:
        canvas.rectangle(-19, -8, 19, 27, hair, radius=7)
    canvas.polygon([(-9, 17), (9, 17), (20, 26), (23, 46), (-23, 46), (-20, 26)], suit)
    if girl.scarf:
        canvas.rectangle(-12, 15, 12, 23, _tint(rng, PALETTE[girl.scarf]), radius=3)
    canvas.ellipse(-17, -20, 17, 15, hair)
    canvas.ellipse(-13, -11, 13, 16, SKIN)
    canvas.pie((-14.5, -18, 14.5, 9), 180, 360, hair)
    for x in (-9.0, -3.0, 3.0, 9.0):
        canvas.polygon([(x - 4, -5), (x + 4, -5), (x, -1)], hair)
    _paint_face(canvas, girl)
    if girl.headphones:
        colour = _tint(rng, PALETTE[girl.headphones])
        canvas.arc((-19.5, -23, 19.5, 15), 4, colour)
        for x in (-17.5, 17.5):
            canvas.ellipse(x - 5.5, -6, x + 5.5, 10, colour)


def _paint_face(canvas: _Canvas, girl: Portrait) -> None:
    iris = PALETTE[girl.eyes]
    for x in (-6.0, 6.0):
        canvas.ellipse(x - 3.7, -1, x + 3.7, 8.2, iris)
        canvas.ellipse(x - 0.2, 0.4, x + 2.2, 3.0, (255, 255, 255))
    if girl.blush:
        for x in (-8.8, 8.8):
            canvas.ellipse(x - 3.2, 8.2, x + 3.2, 13.2, (246, 110, 125))
    if girl.smile:
        canvas.pie((-4.8, 4.6, 4.8, 15.4), 0, 180, (190, 30, 50))
    else:
        canvas.rectangle(-3.2, 10.2, 3.2, 12.8, (60, 25, 30))


def _paint_horse(canvas: _Canvas, colour: RGB) -> None:
    dark: RGB = (70, 42, 24) if sum(colour) < 500 else (175, 175, 182)
    for x in (-11.0, -6.5, 6.5, 11.0):
        canvas.rectangle(x - 1.8, 2, x + 1.8, 18, colour)
    canvas.ellipse(-15, -6, 14, 8, colour)
    canvas.polygon([(6, 0), (12, 4), (21, -13), (14, -18)], colour)
    canvas.ellipse(13, -20, 27, -11.5, colour)
    canvas.polygon([(-13, -3), (-20, 9), (-15, 10), (-10, 1)], dark)
    canvas.polygon([(14.5, -20.5), (10.5, -18), (4.5, -4), (8.5, -3), (16, -17)], dark)
    canvas.ellipse(18.5, -18, 21, -15.5, PALETTE["black"])


def _paint_astronaut(canvas: _Canvas, *, standing: bool) -> None:
    suit, shade = PALETTE["white"], (190, 190, 200)
    canvas.rectangle(-8, -3, -4, 8, shade)
    if standing:
        for x in (-3.4, 3.4):
            canvas.rectangle(x - 2.8, 7, x + 2.8, 19, suit, radius=2)
    else:
        canvas.rectangle(-2, 6, 4, 16, suit, radius=2)
    canvas.rectangle(-6.5, -4, 6.5, 11, suit, radius=3)
    canvas.rectangle(2, 0, 12, 4.5, shade, radius=2)
    canvas.ellipse(-8.5, -19, 8.5, -2, suit)
    canvas.ellipse(-4.5, -15.5, 8, -5, VISOR)


def _paint_place(canvas: _Canvas, rng: random.Random, scene: RidingScene) -> None:
    if scene.place == "plain":
        _paint_background(canvas, rng, scene.background)
        return
    canvas.at(0, 0)
    if scene.place == "moon":
        canvas.rectangle(0, 0, 64, 64, NIGHT)
        for x, y in ((6, 8), (16, 20), (27, 6), (44, 5), (57, 10), (60, 27), (8, 34)):
            canvas.ellipse(x - 1.2, y - 1.2, x + 1.2, y + 1.2, (240, 240, 225))
        canvas.ellipse(-40, 46, 104, 140, _tint(rng, MOON_GREY, 4))
        for x, y, r in ((9, 58, 5), (55, 57, 5)):
            canvas.ellipse(x - r, y - r * 0.5, x + r, y + r * 0.5, (122, 122, 128))
        return
    canvas.rectangle(0, 0, 64, 64, _tint(rng, SKY, 4))
    canvas.rectangle(0, 46, 64, 64, _tint(rng, GRASS, 4))
    canvas.ellipse(4, 4, 15, 15, (252, 225, 70))


def _paint_riding(canvas: _Canvas, rng: random.Random, scene: RidingScene) -> None:
    _paint_place(canvas, rng, scene)
    x, y, scale = 31 + rng.uniform(-2, 2), 37 + rng.uniform(-1, 1), rng.uniform(0.97, 1.05)
    if "horse" in scene.subject:
        canvas.at(x, y, scale)
        _paint_horse(canvas, _tint(rng, PALETTE[scene.horse]))
    if scene.subject == "astronaut":
        canvas.at(x + 1, y - 2, scale * 1.15)
        _paint_astronaut(canvas, standing=True)
    elif "astronaut" in scene.subject:
        canvas.at(x - 2, y - 12, scale * 0.85)
        _paint_astronaut(canvas, standing=False)


def render(scene: Scene, rng: random.Random, size: int = 128) -> Image.Image:
    """Paint a scene at `size` x `size` pixels."""
    canvas = _Canvas(size * SUPERSAMPLING, (0, 0, 0))
    if isinstance(scene, ShapeScene):
        _paint_background(canvas, rng, scene.background)
        _paint_shape(canvas, rng, scene)
    elif isinstance(scene, Portrait):
        _paint_background(canvas, rng, scene.background)
        _paint_portrait(canvas, rng, scene)
    else:
        _paint_riding(canvas, rng, scene)
    return canvas.image.reduce(SUPERSAMPLING)


DEGRADATIONS = ("blurry", "pixelated", "deformed")


def degrade(image: Image.Image, rng: random.Random, kind: str) -> Image.Image:
    """Spoil a picture in one of the ways that the quality tags name."""
    edge = image.width
    if kind == "blurry":
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(2.6, 3.6) * edge / 64))
    if kind == "pixelated":
        return image.reduce(edge // 8).resize((edge, edge), Image.Resampling.NEAREST)
    pixels = np.asarray(image)
    y, x = np.mgrid[0:edge, 0:edge]
    amplitude, frequency = rng.uniform(3.5, 5) * edge / 64, rng.uniform(2.5, 3.5) * 2 * math.pi / edge
    phase_x, phase_y = rng.uniform(0, 6), rng.uniform(0, 6)
    source_x = np.clip(x + amplitude * np.sin(y * frequency + phase_x), 0, edge - 1).astype(int)
    source_y = np.clip(y + amplitude * np.sin(x * frequency + phase_y), 0, edge - 1).astype(int)
    return Image.fromarray(pixels[source_y, source_x])
