"""Samplers as generators on sigmas: each yields the latent and noise level to denoise and is sent the clean guess.

`latent: [4, H/8, W/8]`. Methods and names of k-diffusion; ancestral noise comes from the image's own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import pairwise

import torch
from torch import Tensor

Steps = Generator[tuple[Tensor, float], Tensor, Tensor]
Noise = Callable[[], Tensor]


def euler(latent: Tensor, sigmas: list[float], _noise: Noise) -> Steps:
    """Euler's method on the probability flow (arXiv:2206.00364, algorithm 2 without churn)."""
    for sigma, next_sigma in pairwise(sigmas):
        denoised = yield latent, sigma
        slope = (latent - denoised) / sigma
        latent = latent + slope * (next_sigma - sigma)
    return latent


def _ancestral(sigma: float, next_sigma: float) -> tuple[float, float]:
    """Return the level to step down to and the level of fresh noise to add, so that they sum to `next_sigma`."""
    up = min(next_sigma, (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) ** 0.5)
    return (next_sigma**2 - up**2) ** 0.5, up


def euler_ancestral(latent: Tensor, sigmas: list[float], noise: Noise) -> Steps:
    """Euler's method that steps too far down and adds fresh noise."""
    for sigma, next_sigma in pairwise(sigmas):
        denoised = yield latent, sigma
        down, up = _ancestral(sigma, next_sigma)
        latent = latent + (latent - denoised) / sigma * (down - sigma)
        if next_sigma > 0:
            latent = latent + noise() * up
    return latent


def heun(latent: Tensor, sigmas: list[float], _noise: Noise) -> Steps:
    """Heun's second-order method (arXiv:2206.00364, algorithm 1)."""
    for sigma, next_sigma in pairwise(sigmas):
        denoised = yield latent, sigma
        slope = (latent - denoised) / sigma
        ahead = latent + slope * (next_sigma - sigma)
        if next_sigma > 0:
            denoised = yield ahead, next_sigma
            slope = (slope + (ahead - denoised) / next_sigma) / 2
            ahead = latent + slope * (next_sigma - sigma)
        latent = ahead
    return latent


def dpmpp_2m(latent: Tensor, sigmas: list[float], _noise: Noise) -> Steps:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2) in the log of sigma."""
    levels = torch.tensor(sigmas)
    times = -levels.log()
    before: Tensor | None = None
    for i in range(len(sigmas) - 1):
        denoised = yield latent, sigmas[i]
        step = times[i + 1] - times[i]
        guess = denoised
        if before is not None and sigmas[i + 1] > 0:
            ratio = (times[i] - times[i - 1]) / step
            guess = (1 + 1 / (2 * ratio)) * denoised - (1 / (2 * ratio)) * before
        latent = (levels[i + 1] / levels[i]) * latent - (-step).expm1() * guess
        before = denoised
    return latent


SAMPLERS = {
    "Euler": euler,
    "Euler a": euler_ancestral,
    "Heun": heun,
    "DPM++ 2M": dpmpp_2m,
}
