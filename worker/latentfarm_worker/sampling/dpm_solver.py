"""The DPM-Solver family in log sigma: `h` is a step of -log sigma, `t` its value.

DPM-Solver (arXiv:2206.00927), DPM-Solver++ (arXiv:2211.01095), its SDE forms as k-diffusion writes them.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from latentfarm_shared.parameters import SamplingOptions
from torch import Tensor

from latentfarm_worker.sampling.steps import Noise, Sampler, Steps, Walk, ancestral, eta_of, slope


def _t(sigma: float) -> float:
    return -math.log(sigma) if sigma > 0 else math.inf


def _toward(latent: Tensor, guess: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Step to `next_sigma` as if the clean latent were `guess` all the way."""
    ratio = next_sigma / sigma
    return ratio * latent + (1 - ratio) * guess


def dpmpp_2m(latent: Tensor, walk: Walk, _noise: Noise, _options: SamplingOptions) -> Steps:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2)."""
    before: Tensor | None = None
    last_h = 0.0
    for sigma, next_sigma in pairwise(walk.sigmas):
        denoised = yield latent, sigma
        h, guess = _t(next_sigma) - _t(sigma), denoised
        if before is not None and next_sigma > 0:
            share = h / (2 * last_h)
            guess = (1 + share) * denoised - share * before
        latent = _toward(latent, guess, sigma, next_sigma)
        before, last_h = denoised, h
    return latent


def dpmpp_2s_ancestral(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """DPM-Solver++(2S) that steps too far down and adds fresh noise."""
    for sigma, next_sigma in pairwise(walk.sigmas):
        denoised = yield latent, sigma
        down, up = ancestral(sigma, next_sigma, eta_of(options, 1.0))
        if down == 0:
            latent = latent + slope(latent, denoised, sigma) * (down - sigma)
        else:
            middle = math.sqrt(sigma * down)
            second = yield _toward(latent, denoised, sigma, middle), middle
            latent = _toward(latent, second, sigma, down)
        if next_sigma > 0:
            latent = latent + noise.fresh() * (options.s_noise * up)
    return latent


def dpmpp_sde(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """DPM-Solver++ for the reverse SDE, with a midpoint; noise from the image's Brownian path."""
    eta = eta_of(options, 1.0)
    for sigma, next_sigma in pairwise(walk.sigmas):
        denoised = yield latent, sigma
        if next_sigma == 0:
            latent = latent + slope(latent, denoised, sigma) * (next_sigma - sigma)
            continue
        first, middle, last = _float32_levels(sigma, next_sigma)
        down, up = ancestral(sigma, middle, eta)
        ahead = _toward(latent, denoised, sigma, down) + noise.between(first, middle) * (options.s_noise * up)
        second = yield ahead, middle
        down, up = ancestral(sigma, next_sigma, eta)
        latent = _toward(latent, second, sigma, down)
        latent = latent + noise.between(first, last) * (options.s_noise * up)
    return latent


def _float32_levels(sigma: float, next_sigma: float) -> tuple[float, float, float]:
    """Return a step's ends and its middle in log sigma, rounded as k-diffusion rounds them.

    A Brownian path moves by a thousandth in a millionth of its time, so the last bit shows.
    """
    start, end = -torch.tensor([sigma, next_sigma]).log()
    levels = torch.stack([start, start + (end - start) * 0.5, end]).neg().exp()
    first, middle, last = levels.tolist()
    return first, middle, last


def levels_asked(sampler: str, sigmas: list[float]) -> list[float]:
    """Return the noise levels whose Brownian noise a sampler will ask for, in order; none if it asks for none."""
    steps = [pair for pair in pairwise(sigmas) if pair[1] > 0]
    if sampler == "DPM++ SDE":
        return [level for pair in steps for level in _float32_levels(*pair)]
    return [level for pair in steps for level in pair] if "SDE" in sampler else []


def _sde_noise(next_sigma: float, eta_h: float, options: SamplingOptions) -> float:
    return next_sigma * math.sqrt(-math.expm1(-2 * eta_h)) * options.s_noise


def dpmpp_2m_sde(solver: Literal["midpoint", "heun"]) -> Sampler:
    """Return DPM-Solver++(2M) for the reverse SDE with one of its two corrections."""

    def sample(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
        eta, before, last_h = eta_of(options, 1.0), None, 0.0
        for sigma, next_sigma in pairwise(walk.sigmas):
            denoised = yield latent, sigma
            if next_sigma == 0:
                latent = denoised
                continue
            h = _t(next_sigma) - _t(sigma)
            eta_h = eta * h
            pull = -math.expm1(-h - eta_h)
            latent = next_sigma / sigma * math.exp(-eta_h) * latent + pull * denoised
            if before is not None:
                bend = pull / (-h - eta_h) + 1 if solver == "heun" else 0.5 * pull
                latent = latent + (bend * h / last_h) * (denoised - before)
            if eta:
                latent = latent + noise.between(sigma, next_sigma) * _sde_noise(next_sigma, eta_h, options)
            before, last_h = denoised, h
        return latent

    return sample


def dpmpp_3m_sde(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """DPM-Solver++(3M) for the reverse SDE."""
    eta = eta_of(options, 1.0)
    past: list[tuple[Tensor, float]] = []  # clean latents before, the latest first, and the steps that followed them
    for sigma, next_sigma in pairwise(walk.sigmas):
        denoised = yield latent, sigma
        if next_sigma == 0:
            latent = denoised
            continue
        h = _t(next_sigma) - _t(sigma)
        h_eta = h * (eta + 1)
        latent = math.exp(-h_eta) * latent - math.expm1(-h_eta) * denoised
        latent = latent + _multistep_correction(denoised, past, h, h_eta)
        if eta:
            latent = latent + noise.between(sigma, next_sigma) * _sde_noise(next_sigma, h * eta, options)
        past = [(denoised, h), *past[:1]]
    return latent


def _multistep_correction(denoised: Tensor, past: list[tuple[Tensor, float]], h: float, h_eta: float) -> Tensor:
    """Return what the clean latents before say about the next step."""
    phi_2 = math.expm1(-h_eta) / h_eta + 1
    if not past:
        return torch.zeros_like(denoised)
    (first, first_h), *older = past
    ratio = first_h / h
    change = (denoised - first) / ratio
    if not older:
        return phi_2 * change
    second, second_h = older[0]
    second_ratio = second_h / h
    second_change = (first - second) / second_ratio
    bend = (change - second_change) / (ratio + second_ratio)
    return phi_2 * (change + bend * ratio) - (phi_2 / h_eta - 0.5) * bend


# ---- DPM-Solver on noise: fast and adaptive
#
# Times are float32 scalars, as in k-diffusion: an adaptive walk magnifies the last bit.


def _time(sigma: float) -> Tensor:
    return -torch.tensor(sigma).log()


def _level(t: Tensor) -> Tensor:
    return t.neg().exp()


def _ask(latent: Tensor, t: Tensor) -> Generator[tuple[Tensor, float], Tensor, Tensor]:
    """Ask for the noise in a latent."""
    sigma = _level(t)
    denoised = yield latent, float(sigma)
    return (latent - denoised) / sigma


def _order_1(latent: Tensor, noise: Tensor, end: Tensor, h: Tensor) -> Tensor:
    return latent - _level(end) * h.expm1() * noise


def _order_2(latent: Tensor, noise: Tensor, part: Tensor, end: Tensor, h: Tensor, r: float) -> Tensor:
    return _order_1(latent, noise, end, h) - _level(end) / (2 * r) * h.expm1() * (part - noise)


def _first_part(latent: Tensor, noise: Tensor, t: Tensor, h: Tensor, r: float) -> Steps:
    """Ask for the noise a share `r` into a step."""
    there = t + r * h
    return (yield from _ask(_order_1(latent, noise, there, r * h), there))


def _second_part(latent: Tensor, noise: Tensor, first: Tensor, t: Tensor, h: Tensor) -> Steps:
    """Ask for the noise two thirds into a step, given that at one third."""
    share = 2 / 3 * h
    there = t + share
    bend = _level(there) * 2 * (share.expm1() / share - 1) * (first - noise)
    return (yield from _ask(_order_1(latent, noise, there, share) - bend, there))


def _order_3(latent: Tensor, noise: Tensor, part: Tensor, end: Tensor, h: Tensor) -> Tensor:
    return _order_1(latent, noise, end, h) - _level(end) / (2 / 3) * (h.expm1() / h - 1) * (part - noise)


def _solver_step(latent: Tensor, t: Tensor, end: Tensor, order: int) -> Steps:
    """Take one DPM-Solver step of order 1, 2 or 3 (arXiv:2206.00927, algorithms 1, 4 and 5)."""
    h = end - t
    noise = yield from _ask(latent, t)
    if order == 1:
        return _order_1(latent, noise, end, h)
    r = 1 / 2 if order == 2 else 1 / 3
    part = yield from _first_part(latent, noise, t, h, r)
    if order == 2:
        return _order_2(latent, noise, part, end, h, r)
    return _order_3(latent, noise, (yield from _second_part(latent, noise, part, t, h)), end, h)


def _noisy_end(t: Tensor, end: Tensor, last: Tensor, eta: float) -> tuple[Tensor, float]:
    """Return where to step to so that fresh noise leads to `end`, and how much noise that is."""
    if not eta:
        return end, 0.0
    down, _ = ancestral(float(_level(t)), float(_level(end)), eta)
    aim = torch.minimum(last, _time(down))
    return aim, math.sqrt(max(float(_level(end)) ** 2 - float(_level(aim)) ** 2, 0.0))


def dpm_fast(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """DPM-Solver-fast: steps of order 3 and a rest, a fixed number of model calls (arXiv:2206.00927, algorithm 3)."""
    calls = len(walk.sigmas) - 1
    start, last = _time(walk.high), _time(walk.low)
    count, rest = calls // 3 + 1, calls % 3
    orders = [3] * (count - 2) + [2, 1] if rest == 0 else [3] * (count - 1) + [rest]
    times = torch.linspace(float(start), float(last), len(orders) + 1)
    for t, end, order in zip(times[:-1], times[1:], orders, strict=True):
        aim, up = _noisy_end(t, end, last, eta_of(options, 1.0))
        latent = yield from _solver_step(latent, t, aim, order)
        latent = latent + noise.fresh() * (options.s_noise * up)
    return latent


@dataclass
class _StepSize:
    """Chooses adaptive steps from their errors (an integral controller, as k-diffusion sets it)."""

    order: float
    h: float = 0.05
    safety: float = 0.81
    errors: list[float] = field(default_factory=list)

    def accepts(self, error: float) -> bool:
        """Take a step's error into account and tell whether the step is good enough."""
        factor = (1 / (error + 1e-8)) ** (1 / self.order)
        factor = 1 + math.atan(factor - 1)
        self.h *= factor
        return factor >= self.safety


def dpm_adaptive(latent: Tensor, walk: Walk, noise: Noise, options: SamplingOptions) -> Steps:
    """DPM-Solver-12-3 with steps as long as an error allows (arXiv:2206.00927, algorithm 6 and appendix C)."""
    relative, absolute, eta = 0.05, 0.0078, eta_of(options, 1.0)
    t, last, before = _time(walk.high), _time(walk.low), latent
    size = _StepSize(1.5 if eta else 3)
    while bool(t < last - 1e-5):
        end = torch.minimum(last, t + size.h)
        aim, up = _noisy_end(t, end, last, eta)
        h = aim - t
        eps = yield from _ask(latent, t)
        part = yield from _first_part(latent, eps, t, h, 1 / 3)
        low = _order_2(latent, eps, part, aim, h, 1 / 3)
        high = _order_3(latent, eps, (yield from _second_part(latent, eps, part, t, h)), aim, h)
        allowed = torch.maximum(torch.full_like(low, absolute), relative * torch.maximum(low.abs(), before.abs()))
        error = float(torch.linalg.vector_norm((low - high) / allowed) / math.sqrt(latent.numel()))
        if not math.isfinite(error):  # no step would ever be small enough
            return high
        if size.accepts(error):
            before, t = low, end
            latent = high + noise.fresh() * (options.s_noise * up) if up else high
    return latent
