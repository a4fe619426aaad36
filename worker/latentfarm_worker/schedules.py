"""Noise schedules: the sigmas a sampler walks through, descending to zero.

Formulas of k-diffusion (Karras et al., arXiv:2206.00364) and of A1111 v1.10.1, float32 as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """A checkpoint's own noise levels: `sigmas: [1000]`, ascending with the training step."""

    sigmas: Tensor

    @classmethod
    def from_alphas(cls, alphas_cumprod: Tensor) -> NoiseModel:
        """Build it from the cumulative products of the training schedule."""
        return cls(((1 - alphas_cumprod) / alphas_cumprod).sqrt())

    @property
    def sigma_min(self) -> float:
        """The lowest noise level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The highest noise level."""
        return float(self.sigmas[-1])

    def sigma_at(self, step: Tensor) -> Tensor:
        """Interpolate log sigma at fractional training steps."""
        low = step.floor().long().clamp(max=len(self.sigmas) - 1)
        high = step.ceil().long().clamp(max=len(self.sigmas) - 1)
        weight = step.frac()
        logs = self.sigmas.log()
        return ((1 - weight) * logs[low] + weight * logs[high]).exp()

    def step_at(self, sigma: float) -> float:
        """Return the fractional training step of a noise level, the inverse of `sigma_at`."""
        logs = self.sigmas.log()
        wanted = torch.tensor(math.log(sigma), dtype=logs.dtype)
        low = int((logs <= wanted).sum().clamp(1, len(logs) - 1)) - 1
        weight = ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)
        return low + float(weight)


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def uniform(model: NoiseModel, n: int) -> Tensor:
    """Even training steps from the last to the first."""
    return _with_zero(model.sigma_at(torch.linspace(len(model.sigmas) - 1, 0, n)))


def karras(model: NoiseModel, n: int, rho: float = 7.0) -> Tensor:
    """Even in sigma^(1/rho) (arXiv:2206.00364, eq. 5)."""
    ramp = torch.linspace(0, 1, n)
    low, high = model.sigma_min ** (1 / rho), model.sigma_max ** (1 / rho)
    return _with_zero((high + ramp * (low - high)) ** rho)


def exponential(model: NoiseModel, n: int) -> Tensor:
    """Even in log sigma."""
    return _with_zero(torch.linspace(math.log(model.sigma_max), math.log(model.sigma_min), n).exp())


def sgm_uniform(model: NoiseModel, n: int) -> Tensor:
    """Even training steps, without the first, as Stability's own samplers have them."""
    return _with_zero(model.sigma_at(torch.linspace(len(model.sigmas) - 1, 0, n + 1)[:-1]))


def simple(model: NoiseModel, n: int) -> Tensor:
    """Every (1000/n)-th training step, from the last."""
    count = len(model.sigmas)
    return _with_zero(torch.stack([model.sigmas[-(1 + int(i * count / n))] for i in range(n)]))


SCHEDULES = {
    "Uniform": uniform,
    "Karras": karras,
    "Exponential": exponential,
    "SGM Uniform": sgm_uniform,
    "Simple": simple,
}


def sigmas_for(schedule: str, model: NoiseModel, steps: int) -> list[float]:
    """Return `steps + 1` noise levels of a schedule, the last of them zero."""
    return [float(sigma) for sigma in SCHEDULES[schedule](model, steps)]
