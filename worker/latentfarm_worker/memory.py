"""How much memory there is for batches and for checkpoints: what the settings say, or a share of the device's."""

from __future__ import annotations

import os

import torch
from latentfarm_shared.settings import Settings

CHECKPOINTS, BATCHES = 0.6, 0.3  # shares of the device's memory


def device_memory(device: str) -> int:
    """Return the memory of a device in bytes."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def checkpoint_budget(settings: Settings) -> int:
    """Return how many bytes of weights may be held."""
    return settings.checkpoints_mb * 2**20 or int(CHECKPOINTS * device_memory(settings.device))


def engine_budget(settings: Settings) -> int:
    """Return how many bytes one batch may take beside the weights."""
    return settings.memory_mb * 2**20 or int(BATCHES * device_memory(settings.device))
