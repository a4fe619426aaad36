"""A device of PyTorch's: its errors, and the memory a call takes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentfarm_worker.device import Device, Peak, Trouble


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive that were made inside; `peak` is their highest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for item in args:
            if isinstance(item, Tensor):  # made outside: what only looks at it costs nothing
                self._seen.setdefault(item.untyped_storage().data_ptr(), 0)
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor):
                self._count(item)
        return result

    def _count(self, tensor: Tensor) -> None:
        pointer, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if pointer in self._seen or not size:
            return
        self._seen[pointer] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor, self._forget, pointer)

    def _forget(self, pointer: int) -> None:
        self.live -= self._seen.pop(pointer, 0)


class TorchDevice(Device):
    """A device of PyTorch's, by its name there."""

    def __init__(self, name: str = "cpu") -> None:
        self._name = name

    def trouble(self, error: Exception) -> Trouble:
        """Tell by PyTorch's own error classes."""
        if isinstance(error, torch.OutOfMemoryError):
            return "memory"
        return "device" if isinstance(error, torch.AcceleratorError) else "render"

    def advancing(self) -> AbstractContextManager[object]:
        """Keep no gradients."""
        return torch.inference_mode()

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Measure a call: the allocator's own count on CUDA, live tensors elsewhere."""
        peak = Peak()
        if self._name.startswith("cuda"):
            before = torch.cuda.memory_allocated(self._name)
            torch.cuda.reset_peak_memory_stats(self._name)
            yield peak
            peak.bytes = torch.cuda.max_memory_allocated(self._name) - before
        else:
            with _LiveBytes() as counter:
                yield peak
            peak.bytes = counter.peak

    def relieve(self) -> None:
        """Empty CUDA's cache."""
        if self._name.startswith("cuda"):
            torch.cuda.empty_cache()
