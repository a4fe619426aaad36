"""A checkpoint's noise levels, and how the UNet's output becomes a clean latent at each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
ZERO_SNR_ABAR = 4.8973451890853435e-08  # what stands for zero in the last step, so that its sigma stays finite


@dataclass(frozen=True)
class Scaling:
    """How to ask the UNet: answer = `keep` * latent + `gain` * unet(`shrink` * latent, `step`)."""

    step: float
    shrink: float
    keep: float
    gain: float


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """The noise levels a UNet was trained on: `alphas_cumprod: [1000]`, descending with the training step.

    They are float32, or float16 where A1111's downcast is wanted, which then rounds the levels too.

    `stride` > 1 keeps every so manieth level only, as latent consistency models know them. `rounds_steps` asks the
    UNet at the nearest whole training step instead of between two.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"
    stride: int = 1
    rounds_steps: bool = False

    def __post_init__(self) -> None:
        alphas = self.alphas_cumprod[self.stride - 1 :: self.stride]
        sigmas = ((1 - alphas) / alphas).sqrt()
        object.__setattr__(self, "sigmas", sigmas.float())
        object.__setattr__(self, "_logs", sigmas.log().float())

    sigmas: Tensor = None  # type: ignore[assignment]
    _logs: Tensor = None  # type: ignore[assignment]

    @property
    def sigma_min(self) -> float:
        """The lowest noise level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The highest noise level."""
        return float(self.sigmas[-1])

    def sigma_at(self, steps: Tensor) -> Tensor:
        """Interpolate log sigma at fractional training steps."""
        place = ((steps - (self.stride - 1)) / self.stride).clamp(0, len(self.sigmas) - 1)
        low, high = place.floor().long(), place.ceil().long()
        weight = place.frac()
        return ((1 - weight) * self._logs[low] + weight * self._logs[high]).exp()

    def step_at(self, sigma: float) -> float:
        """Return the training step of a noise level, the inverse of `sigma_at`."""
        wanted = torch.tensor(sigma, dtype=torch.float32).log()
        if self.rounds_steps or self.stride > 1:
            nearest = int((wanted - self._logs).abs().argmin())
            return float(nearest * self.stride + self.stride - 1)
        low = int((self._logs <= wanted).sum().clamp(1, len(self._logs) - 1)) - 1
        weight = ((self._logs[low] - wanted) / (self._logs[low] - self._logs[low + 1])).clamp(0, 1)
        return float((1 - weight) * low + weight * (low + 1))  # in float32, whose rounding UNets notice

    def at_sigma(self, sigma: float) -> Scaling:
        """Return how to denoise `clean + sigma * noise` to a clean latent (Karras et al., arXiv:2206.00364).

        In float32 as k-diffusion: adaptive samplers magnify the last bit.
        """
        variance = torch.tensor(sigma) ** 2 + 1
        step, shrink = self.step_at(sigma), float(1 / variance**0.5)
        if self.stride > 1:
            return self._consistency(step, sigma, shrink)
        if self.prediction == "v_prediction":
            return Scaling(step, shrink, float(1 / variance), -sigma * shrink)
        return Scaling(step, shrink, 1.0, -sigma)

    @staticmethod
    def _consistency(step: float, sigma: float, shrink: float) -> Scaling:
        """Blend the clean latent with the noisy one near step 0 (latent consistency models, arXiv:2310.04378)."""
        data, scaled = 0.5, step * 10
        norm = scaled**2 + data**2
        skip, out = data**2 / norm, scaled / math.sqrt(norm)
        return Scaling(step, shrink, out + skip, -sigma * out)

    def at_step(self, step: float) -> Scaling:
        """Return how to get the noise in a latent of unit variance at a training step."""
        if self.prediction == "v_prediction":
            alpha = float(self.alphas_cumprod[round(step)])
            return Scaling(step, 1.0, math.sqrt(1 - alpha), math.sqrt(alpha))
        return Scaling(step, 1.0, 0.0, 1.0)


def with_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale the square roots so that the last step is all noise (Lin et al., arXiv:2305.08891, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    alphas: Tensor = ((roots - last) * (first / (first - last))) ** 2
    alphas[-1] = ZERO_SNR_ABAR
    return alphas
