"""The noise of one image: every image has generators of its own, so an image of a batch equals the image alone.

Sources are PyTorch's CPU generator (Mersenne twister) and `NV`, numbers as a CUDA device draws them (Philox 4x32-10,
Salmon et al. 2011) computed on the CPU. Behaviour of A1111 v1.10.1; all tensors are `[4, H/8, W/8]`, float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentfarm_worker.sampling.brownian import BrownianPath

Source = Literal["CPU", "NV"]
Words = NDArray[np.uint32]


class Generator(Protocol):
    """A stream of standard normal tensors."""

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """Draw the next tensor."""
        ...


class TorchGenerator:
    """PyTorch's own generator on the CPU."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """Draw the next tensor."""
        return torch.randn(shape, generator=self._generator)


class PhiloxGenerator:
    """What `torch.randn` draws on a CUDA device, call by call, without one."""

    def __init__(self, seed: int) -> None:
        self._seed, self._calls = seed, 0

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """Draw the next tensor: element i is the first Box-Muller output of Philox block (call, i)."""
        count = math.prod(shape)
        counter = np.zeros((4, count), dtype=np.uint32)
        counter[0] = self._calls
        counter[2] = np.arange(count, dtype=np.uint32)
        self._calls += 1
        first, second = _philox(counter, self._seed)[:2]
        radius = np.sqrt(-2 * np.log(_unit(first)))
        values = radius * np.sin(_unit(second) * np.float32(2 * math.pi))
        return torch.from_numpy(values.astype(np.float32).reshape(shape))


def _unit(words: Words) -> NDArray[np.float32]:
    """Map 32-bit words into (0, 1)."""
    scale = np.float32(2.0**-32)
    return words.astype(np.float32) * scale + scale / 2


def _philox(counter: Words, seed: int) -> Words:
    """Run ten rounds over `counter: [4, n]`."""
    key = [np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32 & 0xFFFFFFFF)]
    with np.errstate(over="ignore"):
        for _ in range(10):
            left = counter[0].astype(np.uint64) * np.uint64(0xD2511F53)
            right = counter[2].astype(np.uint64) * np.uint64(0xCD9E8D57)
            counter = np.stack(
                [
                    (right >> np.uint64(32)).astype(np.uint32) ^ counter[1] ^ key[0],
                    right.astype(np.uint32),
                    (left >> np.uint64(32)).astype(np.uint32) ^ counter[3] ^ key[1],
                    left.astype(np.uint32),
                ]
            )
            key = [key[0] + np.uint32(0x9E3779B9), key[1] + np.uint32(0xBB67AE85)]
    return counter


GENERATORS: dict[str, Callable[[int], Generator]] = {"CPU": TorchGenerator, "NV": PhiloxGenerator}


@dataclass(frozen=True)
class NoiseRecipe:
    """What decides an image's noise.

    `variation_strength` > 0 mixes in the noise of `variation_seed`; `resize_from` (width, height in pixels) draws the
    noise of another size and pastes it into the middle; `ensd` is A1111's eta noise seed delta.
    """

    seed: int
    source: Source = "CPU"
    variation_seed: int = 0
    variation_strength: float = 0.0
    resize_from: tuple[int, int] | None = None
    ensd: int = 0


class ImageNoise:
    """All the noise of one pass over one image, in the order it is asked for."""

    def __init__(self, recipe: NoiseRecipe, shape: tuple[int, int, int], device: str = "cpu") -> None:
        """`shape` is the latent's; tensors are moved to `device`."""
        self._recipe, self._shape, self._device = recipe, shape, device
        self._make = GENERATORS[recipe.source]
        self._generator: Generator = self._make(recipe.seed)
        self._ends = (0.0, 1.0)
        self._path: BrownianPath | None = None

    def initial(self) -> Tensor:
        """Draw the noise an image starts from. To be called once, before `fresh`."""
        recipe = self._recipe
        old = recipe.resize_from
        small = self._shape if old is None else (self._shape[0], old[1] // 8, old[0] // 8)
        resized = small != self._shape
        noise = (self._make(recipe.seed) if resized else self._generator).randn(small)
        if recipe.variation_strength:
            other = self._make(recipe.variation_seed).randn(small)
            noise = slerp(recipe.variation_strength, noise, other)
        if resized:
            noise = paste_centred(noise, self._generator.randn(self._shape))
        if recipe.ensd:
            self._generator = self._make(recipe.seed + recipe.ensd)
        return noise.to(self._device)

    def fresh(self) -> Tensor:
        """Draw the next noise of the image's own generator, as ancestral samplers want it."""
        return self._generator.randn(self._shape).to(self._device)

    def span(self, low: float, high: float, ahead: Sequence[float] = ()) -> None:
        """Lay the image's Brownian path over noise levels `low` to `high`; it depends on the seed alone.

        Levels known `ahead` are drawn in the background; without any, nothing is drawn before it is asked for.
        """
        self._ends = low, high
        self._path = BrownianPath(low, high, self._recipe.seed, self._draw, ahead) if ahead else None

    def stop(self) -> None:
        """Draw no more in the background."""
        if self._path is not None:
            self._path.stop()

    def _draw(self, seed: int) -> Tensor:
        return self._make(seed).randn(self._shape)

    def between(self, sigma: float, next_sigma: float) -> Tensor:
        """Return the path's increment between two noise levels, scaled to unit variance."""
        if self._path is None:
            self._path = BrownianPath(*self._ends, self._recipe.seed, self._draw)
        return self._path.increment(sigma, next_sigma).to(self._device)


def slerp(weight: float, start: Tensor, end: Tensor) -> Tensor:
    """Go from `start` to `end` along the sphere; angles between rows, as A1111 takes them.

    Nearly parallel tensors are mixed the other way round, which is A1111's way too.
    """
    cosine = (start / start.norm(dim=1, keepdim=True) * (end / end.norm(dim=1, keepdim=True))).sum(1)
    if cosine.mean() > 0.9995:
        return start * weight + end * (1 - weight)
    angle = cosine.acos()
    shares = ((1 - weight) * angle).sin() / angle.sin(), (weight * angle).sin() / angle.sin()
    mixed: Tensor = shares[0].unsqueeze(1) * start + shares[1].unsqueeze(1) * end
    return mixed


def paste_centred(patch: Tensor, ground: Tensor) -> Tensor:
    """Return `ground` with `patch` over its middle; a larger patch is cropped, off-centre by half where odd."""
    result = ground.clone()
    spans = [_overlap(patch.shape[axis], ground.shape[axis]) for axis in (1, 2)]
    (from_y, to_y, high), (from_x, to_x, wide) = spans
    result[:, to_y : to_y + high, to_x : to_x + wide] = patch[:, from_y : from_y + high, from_x : from_x + wide]
    return result


def _overlap(patch: int, ground: int) -> tuple[int, int, int]:
    """Return where the overlap of two centred lengths begins in each, and how long it is."""
    margin = (ground - patch) // 2
    return (0, margin, patch) if margin >= 0 else (-margin, 0, patch + 2 * margin)
