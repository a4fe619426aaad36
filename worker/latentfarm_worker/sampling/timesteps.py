"""Samplers in training steps, on latents of unit variance: DDIM, DDIM CFG++, PLMS and UniPC.

They yield (latent, training step) and are sent the noise the model sees. Behaviour of A1111 v1.10.1, which leaves out the
last step of DDIM.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from latentfarm_shared.parameters import SamplingOptions
from numpy.typing import NDArray
from torch import Tensor

from latentfarm_worker.sampling.steps import Noise, Steps, TimestepWalk, eta_of


def _alpha_pairs(walk: TimestepWalk) -> list[tuple[int, float, float]]:
    """Return (step, its cumulative alpha, that of the step before), from the highest step to the second lowest."""
    alphas = [float(walk.alphas_cumprod[step]) for step in walk.timesteps]
    return [(walk.timesteps[i], alphas[i], alphas[i - 1]) for i in range(len(alphas) - 1, 0, -1)]


def ddim(latent: Tensor, walk: TimestepWalk, noise: Noise, options: SamplingOptions) -> Steps:
    """DDIM (arXiv:2010.02502, eq. 12)."""
    for step, alpha, before in _alpha_pairs(walk):
        eps = yield latent, float(step)
        latent = _ddim_step(latent, eps, eps, (alpha, before), noise, options)
    return latent


def ddim_cfg_plus_plus(latent: Tensor, walk: TimestepWalk, noise: Noise, options: SamplingOptions) -> Steps:
    """DDIM that renoises with the unconditional noise (CFG++, arXiv:2406.08070); is sent both, stacked."""
    for step, alpha, before in _alpha_pairs(walk):
        eps, unguided = yield latent, float(step)
        latent = _ddim_step(latent, eps, unguided, (alpha, before), noise, options)
    return latent


def _ddim_step(
    latent: Tensor, eps: Tensor, renoise: Tensor, alphas: tuple[float, float], noise: Noise, options: SamplingOptions
) -> Tensor:
    alpha, before = alphas
    spread = eta_of(options, 0.0) * math.sqrt((1 - before) / (1 - alpha) * (1 - alpha / before))
    clean = (latent - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    stepped = math.sqrt(before) * clean + math.sqrt(1 - before - spread**2) * renoise
    return stepped + spread * noise.fresh() if spread else stepped


def plms(latent: Tensor, walk: TimestepWalk, _noise: Noise, _options: SamplingOptions) -> Steps:
    """Pseudo linear multistep of order 4 (arXiv:2202.09778); the first step asks twice."""
    past: list[Tensor] = []
    for step, alpha, before in _alpha_pairs(walk):
        eps = yield latent, float(step)
        if not past:
            ahead = _plain_step(latent, eps, alpha, before)
            again = yield ahead, float(walk.timesteps[walk.timesteps.index(step) - 1])
            mixed = (eps + again) / 2
        elif len(past) == 1:
            mixed = (3 * eps - past[0]) / 2
        elif len(past) == 2:
            mixed = (23 * eps - 16 * past[0] + 5 * past[1]) / 12
        else:
            mixed = (55 * eps - 59 * past[0] + 37 * past[1] - 9 * past[2]) / 24
        latent = _plain_step(latent, mixed, alpha, before)
        past = [eps, *past[:2]]
    return latent


def _plain_step(latent: Tensor, eps: Tensor, alpha: float, before: float) -> Tensor:
    clean = (latent - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    return math.sqrt(before) * clean + math.sqrt(1 - before) * eps


# ---- UniPC


class _Continuous:
    """The training schedule as a function of time in (0, 1], linear in log alpha between the steps."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self._log_alphas = (0.5 * alphas_cumprod.log()).double().numpy()
        self.count = len(self._log_alphas)
        self._times = np.arange(1, self.count + 1) / self.count

    def log_alpha(self, time: float) -> float:
        """Return log alpha, extended in a straight line past the ends."""
        if time < self._times[0]:
            first, second = self._log_alphas[:2]
            return float(first + (time - self._times[0]) * (second - first) * self.count)
        return float(np.interp(time, self._times, self._log_alphas))

    def alpha_sigma(self, time: float) -> tuple[float, float]:
        """Return the shares of clean latent and noise."""
        log_alpha = self.log_alpha(time)
        return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))

    def log_snr(self, time: float) -> float:
        """Return log(alpha / sigma)."""
        alpha, sigma = self.alpha_sigma(time)
        return math.log(alpha / sigma)

    def time_of(self, log_snr: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the times of log(alpha / sigma)."""
        log_alpha = -0.5 * np.logaddexp(-2 * log_snr, 0)
        return np.interp(log_alpha, self._log_alphas[::-1], self._times[::-1])

    def step(self, time: float) -> float:
        """Return the training step of a time."""
        return (time - 1 / self.count) * self.count


def unipc(latent: Tensor, walk: TimestepWalk, _noise: Noise, options: SamplingOptions) -> Steps:
    """UniPC: a multistep predictor and a corrector that costs no further call (arXiv:2302.04867, algorithms 1 and 2)."""
    schedule = _Continuous(walk.alphas_cumprod)
    count = len(walk.timesteps)
    times = _unipc_times(schedule, walk, options)
    order = min(options.uni_pc_order, count)
    past: list[tuple[float, Tensor]] = []  # times and clean guesses, the latest first

    def clean(at: Tensor, eps: Tensor, time: float) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(time)
        return (at - sigma * eps) / alpha

    eps = yield latent, schedule.step(times[0])
    past = [(times[0], clean(latent, eps, times[0]))]
    for i in range(1, count + 1):
        wanted = min(i, order)
        if i >= order and options.uni_pc_lower_order_final:
            wanted = min(wanted, count + 1 - i)
        update = _UniPCStep(schedule, past[:wanted], times[i], options.uni_pc_variant)
        predicted = update.predict(latent)
        if i == count:
            return predicted
        eps = yield predicted, schedule.step(times[i])
        guess = clean(predicted, eps, times[i])
        latent = update.correct(latent, guess)
        past = [(times[i], guess), *past[: order - 1]]
    return latent


def _unipc_times(schedule: _Continuous, walk: TimestepWalk, options: SamplingOptions) -> list[float]:
    """Return the times UniPC visits, one more than it has steps."""
    count, last = len(walk.timesteps), 1 / schedule.count
    first = (walk.timesteps[-1] + 1) / schedule.count if walk.resumed else 1.0
    if options.uni_pc_skip_type == "logSNR":
        levels = np.linspace(schedule.log_snr(first), schedule.log_snr(last), count + 1)
        return [float(time) for time in schedule.time_of(levels)]
    if options.uni_pc_skip_type == "time_quadratic":
        return [float(root**2) for root in np.linspace(math.sqrt(first), math.sqrt(last), count + 1)]
    return [float(time) for time in np.linspace(first, last, count + 1)]


class _UniPCStep:
    """One step of UniPC in data prediction, from the clean guesses of the last steps to time `end`."""

    def __init__(self, schedule: _Continuous, past: list[tuple[float, Tensor]], end: float, variant: str) -> None:
        (start, self._guess), *older = past
        self._alpha, sigma = schedule.alpha_sigma(end)
        _, start_sigma = schedule.alpha_sigma(start)
        self._ratio = sigma / start_sigma
        h = schedule.log_snr(end) - schedule.log_snr(start)
        ratios = [(schedule.log_snr(time) - schedule.log_snr(start)) / h for time, _ in older]
        self._changes = [(guess - self._guess) / r for r, (_, guess) in zip(ratios, older, strict=True)]
        self._pull = math.expm1(-h)
        self._scale = -h if variant == "bh1" else math.expm1(-h)
        self._matrix, self._vector = _unipc_system([*ratios, 1.0], -h, self._scale)

    def _plain(self, latent: Tensor) -> Tensor:
        return self._ratio * latent - self._alpha * self._pull * self._guess

    def predict(self, latent: Tensor) -> Tensor:
        """Return the latent at the end of the step."""
        plain = self._plain(latent)
        if not self._changes:
            return plain
        count = len(self._changes)
        weights = np.array([0.5]) if count == 1 else np.linalg.solve(self._matrix[:count, :count], self._vector[:count])
        bend = sum(
            (float(w) * change for w, change in zip(weights, self._changes, strict=True)), torch.zeros_like(plain)
        )
        return plain - self._alpha * self._scale * bend

    def correct(self, latent: Tensor, guess: Tensor) -> Tensor:
        """Return the latent at the end of the step, now that the model was asked there."""
        change = guess - self._guess
        weights = np.array([0.5]) if not self._changes else np.linalg.solve(self._matrix, self._vector)
        bend = float(weights[-1]) * change
        for weight, past in zip(weights, self._changes, strict=False):
            bend = bend + float(weight) * past
        return self._plain(latent) - self._alpha * self._scale * bend


def _unipc_system(ratios: list[float], hh: float, scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the linear system for the weights of past changes (arXiv:2302.04867, eq. 9 to 11)."""
    count = len(ratios)
    matrix = np.array([[ratio**power for ratio in ratios] for power in range(count)])
    phi, factorial = math.expm1(hh) / hh - 1, 1
    vector = np.zeros(count)
    for k in range(1, count + 1):
        vector[k - 1] = phi * factorial / scale
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    return matrix, vector
