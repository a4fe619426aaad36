"""Noise schedules: the sigmas a sampler walks through, descending, most of them to zero.

Formulas of k-diffusion (Karras et al., arXiv:2206.00364), of "Align Your Steps" (arXiv:2404.14507) and of A1111
v1.10.1, in float32 as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from latentfarm_shared.names import TRAITS, effective_schedule
from latentfarm_shared.parameters import SamplingOptions
from torch import Tensor

from latentfarm_worker.sampling.noise_model import NoiseModel

OLD_RANGE = (0.1, 10.0)  # of A1111's first Karras schedules
# Published optima for ten steps (arXiv:2404.14507), as A1111 has them.
ALIGN_YOUR_STEPS = {
    "sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


@dataclass(frozen=True)
class Range:
    """What a schedule is made for: the model and, where options narrow them, its lowest and highest sigma."""

    model: NoiseModel
    low: float
    high: float
    family: str = "sd1"


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _steps(span: Range, n: int) -> Tensor:
    """Return `n` even training steps between the ends of a range, descending."""
    return torch.linspace(span.model.step_at(span.high), span.model.step_at(span.low), n)


def uniform(span: Range, n: int, _options: SamplingOptions) -> Tensor:
    """Even training steps from the last to the first, whatever the range."""
    return _with_zero(span.model.sigma_at(_steps(Range(span.model, span.model.sigma_min, span.model.sigma_max), n)))


def normal(span: Range, n: int, _options: SamplingOptions) -> Tensor:
    """Even training steps over the range."""
    return _with_zero(span.model.sigma_at(_steps(span, n)))


def sgm_uniform(span: Range, n: int, _options: SamplingOptions) -> Tensor:
    """Even training steps without the first, as Stability's own samplers have them."""
    return _with_zero(span.model.sigma_at(_steps(span, n + 1)[:-1]))


def karras(span: Range, n: int, options: SamplingOptions) -> Tensor:
    """Even in sigma^(1/rho) (arXiv:2206.00364, eq. 5)."""
    rho = options.rho or 7.0
    low, high = span.low ** (1 / rho), span.high ** (1 / rho)
    return _with_zero((high + torch.linspace(0, 1, n) * (low - high)) ** rho)


def exponential(span: Range, n: int, _options: SamplingOptions) -> Tensor:
    """Even in log sigma."""
    return _with_zero(torch.linspace(math.log(span.high), math.log(span.low), n).exp())


def polyexponential(span: Range, n: int, options: SamplingOptions) -> Tensor:
    """A power of an even ramp in log sigma."""
    ramp = torch.linspace(1, 0, n) ** (options.rho or 1.0)
    return _with_zero((ramp * (math.log(span.high) - math.log(span.low)) + math.log(span.low)).exp())


def kl_optimal(span: Range, n: int, _options: SamplingOptions) -> Tensor:
    """Even in the arctangent of sigma (arXiv:2404.14507, theorem 3.1); ends at the lowest sigma, not at zero."""
    ramp = torch.arange(n + 1) / n
    return (ramp * math.atan(span.low) + (1 - ramp) * math.atan(span.high)).tan()


def align_your_steps(span: Range, n: int, _options: SamplingOptions) -> Tensor:
    """The published optimum for ten steps, resampled evenly in log sigma."""
    table = torch.tensor(ALIGN_YOUR_STEPS["sdxl" if span.family == "sdxl" else "sd1"], dtype=torch.float64)
    if n != len(table):
        places = torch.linspace(0, len(table) - 1, n, dtype=torch.float64)
        low, high = places.floor().long(), places.ceil().long()
        logs = table.log()
        table = (logs[low] + (places - low) * (logs[high] - logs[low])).exp()
    return _with_zero(table.float())


def simple(span: Range, n: int, _options: SamplingOptions) -> Tensor:
    """Every (1000/n)-th training step, from the last."""
    count = len(span.model.sigmas)
    return _with_zero(torch.stack([span.model.sigmas[-(1 + int(i * count / n))] for i in range(n)]))


def ddim(span: Range, n: int, _options: SamplingOptions) -> Tensor:
    """The steps DDIM walks, which are more than asked for when they do not divide 1000."""
    count = len(span.model.sigmas)
    return _with_zero(span.model.sigmas[1 :: max(count // n, 1)].flip(0))


def beta(span: Range, n: int, options: SamplingOptions) -> Tensor:
    """Quantiles of a beta distribution between the ends (arXiv:2407.12173)."""
    from scipy.special import betaincinv  # noqa: PLC0415 - slow to import and seldom needed

    quantiles = betaincinv(options.beta_alpha, options.beta_beta, 1 - np.linspace(0, 1, n))
    return _with_zero(torch.from_numpy(span.low + quantiles * (span.high - span.low)).float())


SCHEDULES: dict[str, Callable[[Range, int, SamplingOptions], Tensor]] = {
    "Uniform": uniform,
    "Karras": karras,
    "Exponential": exponential,
    "Polyexponential": polyexponential,
    "SGM Uniform": sgm_uniform,
    "KL Optimal": kl_optimal,
    "Align Your Steps": align_your_steps,
    "Simple": simple,
    "Normal": normal,
    "DDIM": ddim,
    "Beta": beta,
}


def sigmas_for(
    sampler: str, schedule: str, model: NoiseModel, steps: int, options: SamplingOptions, family: str = "sd1"
) -> list[float]:
    """Return the noise levels a sampler walks through in `steps` steps, `steps + 1` of them unless the schedule differs.

    Samplers that discard the penultimate level compute one more first, as A1111 does.
    """
    low, high = OLD_RANGE if options.old_karras_range else (model.sigma_min, model.sigma_max)
    span = Range(model, options.sigma_min or low, options.sigma_max or high, family)
    discards = TRAITS[sampler].discards_penultimate or options.discard_penultimate
    sigmas = SCHEDULES[effective_schedule(sampler, schedule)](span, steps + discards, options)
    if discards:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return [level for level, _ in groupby(sigmas.tolist())]  # more steps than levels would repeat some


def timesteps_for(steps: int, options: SamplingOptions) -> list[int]:
    """Return the training steps DDIM, PLMS and UniPC walk, ascending: every (1000 // steps)-th, from 1.

    They are more than asked for when `steps` does not divide 1000. Discarding the penultimate level adds a step here
    and discards nothing, as in A1111.
    """
    stride = max(1000 // (steps + options.discard_penultimate), 1)
    return [min(step + 1, 999) for step in range(0, 1000, stride)]
