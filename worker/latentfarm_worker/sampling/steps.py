"""What samplers have in common: how they ask, the walk they take, and arithmetic of noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from latentfarm_shared.parameters import SamplingOptions
from torch import Tensor

Steps = Generator[tuple[Tensor, float], Tensor, Tensor]
"""Yields (latent, sigma or training step), is sent what the model makes of it, returns the last latent."""


class Noise(Protocol):
    """The noise of one image."""

    def fresh(self) -> Tensor:
        """Draw independent noise."""
        ...

    def between(self, sigma: float, next_sigma: float) -> Tensor:
        """Return the noise of a Brownian path between two levels."""
        ...


@dataclass(frozen=True)
class Walk:
    """A way through noise levels: `sigmas` descending; `low` and `high` bound adaptive samplers."""

    sigmas: list[float]
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class TimestepWalk:
    """A way through training steps, ascending; `alphas_cumprod: [1000]`. `resumed` if it starts from a noised image."""

    timesteps: list[int]
    alphas_cumprod: Tensor
    resumed: bool = False


Sampler = Callable[[Tensor, Walk, Noise, SamplingOptions], Steps]
TimestepSampler = Callable[[Tensor, TimestepWalk, Noise, SamplingOptions], Steps]


def eta_of(options: SamplingOptions, default: float) -> float:
    """Return how much fresh noise a sampler adds, relative to its own measure."""
    return default if options.eta is None else options.eta


def slope(latent: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """Return the derivative of the latent by sigma on the probability flow (arXiv:2206.00364, eq. 1)."""
    return (latent - denoised) / sigma


def ancestral(sigma: float, next_sigma: float, eta: float) -> tuple[float, float]:
    """Return the level to step down to and the level of fresh noise to add, so that they sum to `next_sigma`."""
    if not eta:
        return next_sigma, 0.0
    up = min(next_sigma, eta * math.sqrt(next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2))
    return math.sqrt(next_sigma**2 - up**2), up


def churned(latent: Tensor, sigma: float, count: int, noise: Noise, options: SamplingOptions) -> tuple[Tensor, float]:
    """Raise the noise level a little before a step (arXiv:2206.00364, algorithm 2); `count` is the number of steps."""
    within = options.s_tmin <= sigma <= (options.s_tmax or math.inf)
    gamma = min(options.s_churn / count, math.sqrt(2) - 1) if within else 0.0
    if not options.s_churn:
        return latent, sigma
    added = noise.fresh() * options.s_noise
    raised = sigma * (gamma + 1)
    return (latent + added * math.sqrt(raised**2 - sigma**2) if gamma else latent), raised
