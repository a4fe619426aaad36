"""How a device is used: number formats, memory layout, and fixed batch sizes where results or kernels need them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from latentfarm_shared.settings import Settings
from torch import Tensor

T = TypeVar("T")
MAX_ROWS = 64
_DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """Choices for one device.

    `fixed_size` > 0 runs every call with exactly so many rows, filled up with copies: an image's bits then depend on
    nothing but the image, and compiled kernels see one shape.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    channels_last: bool = False
    fixed_size: int = 0
    compile_mode: str | None = None
    offload_text: bool = False

    @classmethod
    def from_settings(cls, settings: Settings) -> Runtime:
        """Return what the settings ask for, with what suits the device where they leave it open.

        CUDA: float16 and channels last; CPU: float32. Compiled and strict runs have fixed batch sizes.
        """
        cuda = settings.device.startswith("cuda")
        dtype = _DTYPES[settings.dtype] or (torch.float16 if cuda else torch.float32)
        fixed = settings.determinism == "strict" or settings.compile_mode != "off"
        return cls(
            device=settings.device,
            dtype=dtype,
            vae_dtype=dtype,
            channels_last=cuda if settings.channels_last is None else settings.channels_last,
            fixed_size=2 * settings.slots if fixed else 0,
            compile_mode=None if settings.compile_mode == "off" else settings.compile_mode,
            offload_text=settings.offload_text,
        )

    def fixed(self, rows: Sequence[T], size: int | None = None) -> Iterator[list[T]]:
        """Split rows into calls of up to MAX_ROWS, or of the fixed size, the last filled up with its first row."""
        if not self.fixed_size:
            yield from (list(rows[start : start + MAX_ROWS]) for start in range(0, len(rows), MAX_ROWS))
            return
        size = size or self.fixed_size
        for start in range(0, len(rows), size):
            some = list(rows[start : start + size])
            yield some + some[:1] * (size - len(some))

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Return `tensor: [B, C, H, W]` in the layout the device's convolutions like."""
        return tensor.contiguous(memory_format=torch.channels_last) if self.channels_last else tensor
