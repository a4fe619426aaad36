"""Samplers of k-diffusion in sigma: Euler, Heun, DPM2, LMS, LCM and Restart.

`latent: [4, H/8, W/8]`. Names and methods of k-diffusion; Restart after Xu et al. (arXiv:2306.14878).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from latentfarm_shared.parameters import SamplingOptions
from torch import Tensor

from latentfarm_worker.sampling.steps import Noise, Steps, Walk, ancestral, churned, eta_of, slope

LMS_ORDER = 4


def euler(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """Euler's method (arXiv:2206.00364, algorithm 2)."""
    for sigma, next_sigma in pairwise(walk.sigmas):
        latent, raised = churned(latent, sigma, len(walk.sigmas) - 1, noise, options)
        denoised = yield latent, raised
        latent = latent + slope(latent, denoised, raised) * (next_sigma - raised)
    return latent


def euler_ancestral(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """Euler's method that steps too far down and adds fresh noise."""
    for sigma, next_sigma in pairwise(walk.sigmas):
        denoised = yield latent, sigma
        down, up = ancestral(sigma, next_sigma, eta_of(options, 1.0))
        latent = latent + slope(latent, denoised, sigma) * (down - sigma)
        if next_sigma > 0:
            latent = latent + noise.fresh() * (options.s_noise * up)
    return latent


def _heun_step(latent: Tensor, sigma: float, next_sigma: float) -> Steps:
    denoised = yield latent, sigma
    first = slope(latent, denoised, sigma)
    ahead = latent + first * (next_sigma - sigma)
    if next_sigma == 0:
        return ahead
    denoised = yield ahead, next_sigma
    return latent + (first + slope(ahead, denoised, next_sigma)) / 2 * (next_sigma - sigma)


def heun(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """Heun's second-order method (arXiv:2206.00364, algorithm 1)."""
    for sigma, next_sigma in pairwise(walk.sigmas):
        latent, raised = churned(latent, sigma, len(walk.sigmas) - 1, noise, options)
        latent = yield from _heun_step(latent, raised, next_sigma)
    return latent


def _midpoint_step(latent: Tensor, sigma: float, next_sigma: float) -> Steps:
    denoised = yield latent, sigma
    first = slope(latent, denoised, sigma)
    if next_sigma == 0:
        return latent + first * (next_sigma - sigma)
    middle = math.sqrt(sigma * next_sigma)
    ahead = latent + first * (middle - sigma)
    denoised = yield ahead, middle
    return latent + slope(ahead, denoised, middle) * (next_sigma - sigma)


def dpm2(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """DPM-Solver-2 with the midpoint in log sigma (arXiv:2206.00927)."""
    for sigma, next_sigma in pairwise(walk.sigmas):
        latent, raised = churned(latent, sigma, len(walk.sigmas) - 1, noise, options)
        latent = yield from _midpoint_step(latent, raised, next_sigma)
    return latent


def dpm2_ancestral(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """DPM-Solver-2 that steps too far down and adds fresh noise."""
    for sigma, next_sigma in pairwise(walk.sigmas):
        down, up = ancestral(sigma, next_sigma, eta_of(options, 1.0))
        latent = yield from _midpoint_step(latent, sigma, down)
        if down:
            latent = latent + noise.fresh() * (options.s_noise * up)
    return latent


def lms(latent: Tensor, walk: Walk, _noise: Noise, _options: SamplingOptions) -> Steps:
    """Linear multistep (Adams-Bashforth) of order 4 on uneven steps."""
    slopes: list[Tensor] = []
    for i, sigma in enumerate(walk.sigmas[:-1]):
        denoised = yield latent, sigma
        slopes = [slope(latent, denoised, sigma), *slopes[: LMS_ORDER - 1]]
        weights = _adams_bashforth(walk.sigmas[i - len(slopes) + 1 : i + 1][::-1], walk.sigmas[i + 1])
        for weight, past in zip(weights, slopes, strict=True):
            latent = latent + weight * past
    return latent


def _adams_bashforth(nodes: list[float], end: float) -> list[float]:
    """Integrate from the first node to `end` each Lagrange polynomial on the nodes."""
    weights = []
    for j, node in enumerate(nodes):
        basis = np.poly1d([1.0])
        for k, other in enumerate(nodes):
            if k != j:
                basis *= np.poly1d([1.0, -other]) / (node - other)
        integral = basis.integ()
        weights.append(float(integral(end) - integral(nodes[0])))
    return weights


def lcm(latent: Tensor, walk: Walk, noise: Noise, _options: SamplingOptions) -> Steps:
    """Jump to the clean latent and back to the next level (latent consistency models, arXiv:2310.04378)."""
    for sigma, next_sigma in pairwise(walk.sigmas):
        latent = yield latent, sigma
        if next_sigma > 0:
            latent = latent + next_sigma * noise.fresh()
    return latent


def restart(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """Heun's method that goes back up to a higher level once or twice near the end (arXiv:2306.14878)."""
    last: float | None = None
    for sigma, next_sigma in _restart_pairs(walk.sigmas):
        if last is not None and last < sigma:
            latent = latent + noise.fresh() * (options.s_noise * math.sqrt(sigma**2 - last**2))
        latent = yield from _heun_step(latent, sigma, next_sigma)
        last = next_sigma
    return latent


def _restart_pairs(sigmas: list[float]) -> list[tuple[float, float]]:
    """Return the steps of a walk with its restarts: from about 0.1 back to 2, as A1111 sets them by step count."""
    steps = len(sigmas) - 1
    if steps < 20:
        return list(pairwise(sigmas))
    extra, times = (steps // 4, 2) if steps >= 36 else (9, 1)
    sigmas = [*_karras(steps - extra * times, sigmas[-2], sigmas[0]), 0.0]
    bottom, top = _nearest(sigmas, 0.1), _nearest(sigmas, 2.0)
    pairs = list(pairwise(sigmas))
    if top >= bottom:
        return pairs
    again = list(pairwise(_karras(extra + 1, sigmas[bottom], sigmas[top])))
    return pairs[:bottom] + again * times + pairs[bottom:]


def _nearest(sigmas: list[float], level: float) -> int:
    return min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - level))


def _karras(n: int, low: float, high: float) -> list[float]:
    ends = high ** (1 / 7), low ** (1 / 7)
    return [(ends[0] + ramp * (ends[1] - ends[0])) ** 7 for ramp in np.linspace(0, 1, n).tolist()]
