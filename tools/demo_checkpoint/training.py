"""What every training loop here needs: a clock that survives restarts, an average of weights, a fast norm."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

SAVE_EVERY_S = 300.0


def to_tensor(images: Iterable[Image.Image]) -> Tensor:
    """Stack pictures of one size as `pixels: [B, 3, H, W]`, float in [-1, 1]."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn `pixels: [B, 3, H, W]` in [-1, 1] into pictures, rounding as A1111 does (truncation)."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).to(torch.uint8).numpy()
    return [Image.fromarray(item) for item in array]


@contextmanager
def fast_group_norm() -> Iterator[None]:
    """Compute GroupNorm through the CPU's layer_norm kernel, which is much the faster in training."""

    def forward(self: nn.GroupNorm, input: Tensor) -> Tensor:  # noqa: A002 - GroupNorm's own name for it
        x = input.contiguous()
        flat = x.view(x.shape[0] * self.num_groups, -1)
        normed = functional.layer_norm(flat, (flat.shape[1],), None, None, self.eps).view(x.shape)
        shape = (1, x.shape[1]) + (1,) * (x.dim() - 2)
        return normed * self.weight.to(normed.dtype).view(shape) + self.bias.to(normed.dtype).view(shape)

    original = nn.GroupNorm.forward
    nn.GroupNorm.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.GroupNorm.forward = original  # type: ignore[method-assign]


class Run:
    """A training run with a time budget whose state is saved every five minutes and resumed from."""

    def __init__(self, path: Path, minutes: float, parts: dict[str, Any]) -> None:
        """Resume `parts` (anything with a state_dict) from `path` if it exists."""
        self.path, self.budget_s, self.parts = path, minutes * 60, parts
        self.step, self.spent_s, self.cpu_s = 0, 0.0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step, self.spent_s, self.cpu_s = state["step"], state["spent_s"], state["cpu_s"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        self._tick = self._saved = time.monotonic()
        self._cpu_tick = time.process_time()

    @property
    def fraction(self) -> float:
        """Share of the time budget that is spent, in [0, 1]."""
        return min(1.0, self.spent_s / self.budget_s)

    def advance(self) -> bool:
        """Count one step, save when it is time, and tell whether to go on."""
        now, cpu = time.monotonic(), time.process_time()
        self.spent_s += now - self._tick
        self.cpu_s += cpu - self._cpu_tick
        self._tick, self._cpu_tick = now, cpu
        self.step += 1
        done = self.fraction >= 1
        if done or now - self._saved > SAVE_EVERY_S:
            self.save()
        return not done

    def save(self) -> None:
        """Write the state beside its place and move it there, so a kill leaves a whole file."""
        state = {"step": self.step, "spent_s": self.spent_s, "cpu_s": self.cpu_s}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        self._saved = time.monotonic()


class Average:
    """Exponential moving average of parameters (Polyak averaging, as in DDPM, arXiv:2006.11239)."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        """Start from the parameters as they are."""
        self.parameters = list(parameters)
        self.decay = decay
        self.values = [p.detach().clone() for p in self.parameters]
        self.updates = 0

    def update(self) -> None:
        """Move towards the current parameters; the first updates move faster."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (20 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the parameters for a while."""
        current = [p.detach().clone() for p in self.parameters]
        self._copy(self.values)
        try:
            yield
        finally:
            self._copy(current)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes."""
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average."""
        self.values, self.updates = state["values"], state["updates"]
