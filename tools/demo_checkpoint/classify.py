"""An independent judge: tells from pixels which attributes of a scene a picture has.

It knows nothing of the checkpoint, only where things stand in a picture and what the palette looks like; `validate`
measures it on painted pictures, whose attributes are known.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from demo_checkpoint.scenes import (
    MOON_GREY,
    PALETTE,
    SHAPES,
    SKIN,
    SKY,
    VISOR,
    Background,
    Portrait,
    RidingScene,
    Scene,
    ShapeScene,
    random_scene,
    render,
    shape_outline,
)

Labels = NDArray[np.str_]
Box = tuple[float, float, float, float]

_NAMED = PALETTE | {"skin": SKIN, "visor": VISOR, "sky": SKY, "grey": MOON_GREY, "blush": (246, 110, 125)}
_NAMES = np.array(list(_NAMED))
EDGE = 128
MAJORITY = 0.6


def _lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert sRGB in [0, 255], `[..., 3]`, to CIE Lab (D65)."""
    c = rgb / 255
    linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


_LAB = _lab(np.array(list(_NAMED.values()), dtype=np.float64))


def label(image: Image.Image) -> Labels:
    """Name the nearest known colour of every pixel, `[128, 128]`."""
    pixels = np.asarray(image.convert("RGB").resize((EDGE, EDGE)), dtype=np.float64)
    distance = ((_lab(pixels)[:, :, None] - _LAB) ** 2).sum(-1)
    named: Labels = _NAMES[distance.argmin(-1)]
    return named


def _share(labels: Labels, boxes: Iterable[Box], *names: str) -> float:
    """Share of the pixels in some boxes (in 1/64 of the edge: left, top, right, bottom) that have one of the names."""
    parts = [labels[round(t * 2) : round(b * 2), round(x0 * 2) : round(x1 * 2)].ravel() for x0, t, x1, b in boxes]
    found: float = np.isin(np.concatenate(parts), names).mean()
    return found


def _mirrored(x0: float, top: float, x1: float, bottom: float) -> tuple[Box, Box]:
    """Return a box right of the face's middle and its mirror image; portraits are centred at (32, 30)."""
    return (32 + x0, 30 + top, 32 + x1, 30 + bottom), (32 - x1, 30 + top, 32 - x0, 30 + bottom)


def check(image: Image.Image, scene: Scene) -> dict[str, bool]:
    """Tell for each attribute of the scene whether the picture has it."""
    labels = label(image)
    if isinstance(scene, ShapeScene):
        return _check_shape(labels, scene)
    return _check_portrait(labels, scene) if isinstance(scene, Portrait) else _check_riding(labels, scene)


# ---- shapes


def _expected_background(background: Background) -> Labels:
    blank = ShapeScene("circle", background.colour, "medium", background)
    labels = np.full((EDGE, EDGE), background.colour, dtype=_NAMES.dtype)
    if blank.background.pattern:
        y, x = np.mgrid[0:EDGE, 0:EDGE] / 2
        column, row = (x // 16).astype(int), (y // 16).astype(int)
        second = {
            "striped": y % 16 >= 8,
            "checkered": (column + row) % 2 == 1,
            "polka dot": (x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 <= 25,
        }[background.pattern]
        labels[second] = background.second
    return labels


@cache
def _template(shape: str) -> NDArray[np.bool_]:
    from PIL import ImageDraw  # noqa: PLC0415 - here alone

    image = Image.new("L", (256, 256))
    draw = ImageDraw.Draw(image)
    for polygon in shape_outline(shape):
        draw.polygon([(128 + x * 100, 128 + y * 100) for x, y in polygon], fill=255)
    return _normalised(np.asarray(image) > 127)


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Crop a mask to what is set and scale it to 32 x 32."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cropped = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return np.asarray(cropped.convert("L").resize((32, 32), Image.Resampling.BOX)) > 127


def _figure(labels: Labels) -> NDArray[np.bool_]:
    """Return the mask of the figure in the middle: what has the colour most common there and hangs together."""
    middle = labels[52:76, 52:76].ravel()
    names, counts = np.unique(middle, return_counts=True)
    parts, _ = ndimage.label(ndimage.binary_opening(labels == names[counts.argmax()], iterations=1))
    inside = parts[52:76, 52:76].ravel()
    inside = inside[inside > 0]
    filled: NDArray[np.bool_] = parts == (np.bincount(inside).argmax() if len(inside) else -1)
    return filled


def classify_shape(labels: Labels) -> tuple[str, float]:
    """Return the shape of the figure in the middle ("" if none is near) and its extent in 1/64 of the edge."""
    mask = _figure(labels)
    if mask.sum() < 200:
        return "", 0.0
    extent = max(np.ptp(np.flatnonzero(mask.any(axis))) for axis in (0, 1)) / 2
    shape = _normalised(mask)
    overlap = {name: (shape & _template(name)).sum() / (shape | _template(name)).sum() for name in SHAPES}
    best = max(overlap, key=lambda name: overlap[name])
    return (best if overlap[best] > 0.62 else ""), extent


def _check_shape(labels: Labels, scene: ShapeScene) -> dict[str, bool]:
    expected = _expected_background(scene.background)
    frame = np.ones((EDGE, EDGE), bool)
    frame[14:-14, 14:-14] = False
    shape, extent = classify_shape(labels)
    return {
        "shape": shape == scene.shape,
        "colour": _share(labels, [(27, 27, 37, 37)], scene.colour) > MAJORITY,
        "size": (extent > 38.5) == (scene.size == "large"),
        "background": bool((labels == expected)[frame].mean() > 0.7),
    }


# ---- portraits


def _check_portrait(labels: Labels, girl: Portrait) -> dict[str, bool]:
    cups, neck = _mirrored(15.5, -2, 19.5, 6), [(24.0, 47.5, 40.0, 51.5)]
    irises = {iris: _share(labels, _mirrored(3.6, 3.4, 8.4, 7), iris) for iris in ("blue", "green", "brown")}
    mouth = [(28.5, 41.0, 35.5, 43.5)]
    ground = girl.background.colour
    if girl.headphones:
        headphones = _share(labels, cups, girl.headphones) > MAJORITY
    else:  # hair against background blends into other colours along the edge, but never mostly into one
        others = (colour for colour in PALETTE if colour not in (girl.hair, ground))
        headphones = max(_share(labels, cups, colour) for colour in others) < 0.5
    return {
        "background": _share(labels, [(0.5, 1, 6, 22), (58, 1, 63.5, 22)], ground) > 0.75,
        "hair": _share(labels, [(25, 14, 39, 20)], girl.hair) > MAJORITY,
        "hair length": (_share(labels, _mirrored(14.5, 13, 17.5, 18.5), girl.hair) > 0.5) == girl.long_hair,
        "eyes": max(irises, key=lambda iris: irises[iris]) == girl.eyes and irises[girl.eyes] > 0.25,
        "mouth": (_share(labels, mouth, "red") > 0.4) == girl.smile,
        "blush": (_share(labels, _mirrored(6.8, 9.4, 9.4, 12), "blush", "pink") > 0.5) == girl.blush,
        "headphones": headphones,
        "scarf": _share(labels, neck, girl.scarf or girl.suit) > MAJORITY,
        "suit": _share(labels, [(18, 59, 46, 63)], girl.suit) > MAJORITY,
    }


# ---- astronauts and horses


def _check_riding(labels: Labels, scene: RidingScene) -> dict[str, bool]:
    corners: list[Box] = [(0.5, 0.5, 5, 20), (58, 0.5, 63.5, 14)]
    low: list[Box] = [(0.5, 57, 14, 63), (50, 60, 63.5, 63.5)]
    if scene.place == "plain":
        place = _share(labels, corners + low, scene.background.colour) > 0.75
    elif scene.place == "moon":
        place = _share(labels, [(46, 8, 63, 14), (1, 24, 10, 32)], "black") > MAJORITY and _share(
            labels, [(18, 60, 46, 63.5)], "grey") > MAJORITY  # fmt: skip
    else:
        place = _share(labels, [(30, 0.5, 63, 8)], "sky") > MAJORITY and _share(labels, low, "green") > MAJORITY
    helmet = _share(labels, [(23, 7, 40, 19)], "white", "grey", "visor") > 0.2
    coat = {"brown": ("brown",), "white": ("white", "grey")}
    head = _share(labels, [(46, 18.5, 54, 23.5)], *coat[scene.horse]) > 0.5
    some_head = any(_share(labels, [(46, 18.5, 54, 23.5)], *names) > 0.5 for names in coat.values())
    wants_horse, wants_astronaut = "horse" in scene.subject, "astronaut" in scene.subject
    answers = {"scene": place, "subject": helmet == wants_astronaut and some_head == wants_horse}
    return answers | ({"horse": head} if wants_horse else {})


def validate(count: int = 300, seed: int = 4242) -> dict[str, float]:
    """Return the share of attributes the judge confirms on painted pictures, and denies on others' (suffix `false`)."""
    rng = random.Random(seed)
    right: dict[str, list[bool]] = {}
    for kind in (ShapeScene, Portrait, RidingScene):
        scenes = [random_scene(rng, kind) for _ in range(count)]
        images = [render(scene, rng) for scene in scenes]
        for number, scene in enumerate(scenes):
            for name, answer in check(images[number], scene).items():
                right.setdefault(f"{kind.__name__} {name}", []).append(answer)
            for name, answer in check(images[number - 1], scene).items():
                right.setdefault(f"{kind.__name__} {name} false", []).append(answer)
    return {name: round(float(np.mean(answers)), 4) for name, answers in right.items()}
