"""A worker whose device sleeps 250 ms a picture, with everything else real; run and watched like any worker process.

`LATENTFARM_BENCH_PUT_S` in the folder of its data, a file with a number, delays every PUT by so many seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import CheckpointRecord
from latentfarm_worker.checkpoint import Checkpoint, Parts
from latentfarm_worker.operations import Conditioning, Decode, Denoise, Encode, Picture
from latentfarm_worker.process import main
from latentfarm_worker.runtime import Runtime
from latentfarm_worker.sampling.noise_model import NoiseModel
from latentfarm_worker.worker import Worker
from torch import Tensor, nn

from bench.png import picture

DEVICE_S = 0.25


class SleepingCheckpoint(Checkpoint):
    """Knows one picture of 512 x 512 and takes its time for it."""

    def __init__(self, record: CheckpointRecord) -> None:
        folder = CHECKPOINT / "tokenizer"
        tokenizer = ClipTokenizer(folder / "vocab.json", folder / "merges.txt")
        nothing = nn.Module()
        noise = NoiseModel(torch.linspace(0.999, 0.005, 1000))
        super().__init__(record.hash, Parts([], nothing, nothing, noise, tokenizer, "sd1"), Runtime())
        self._picture = picture()

    def encode(self, batch: Sequence[Encode]) -> list[tuple[Conditioning, ...]]:
        """Answer at once."""
        return [tuple(Conditioning(torch.zeros(77, 4)) for _ in item.texts) for item in batch]

    def denoise(self, batch: Sequence[Denoise]) -> list[Tensor]:
        """Answer at once."""
        return [item.latent for item in batch]

    def decode(self, batch: Sequence[Decode]) -> list[Picture]:
        """Sleep as long as a device would work."""
        time.sleep(DEVICE_S * len(batch))
        return [Picture(self._picture) for _ in batch]


class SleepingWorker(Worker):
    """Loads the sleeping checkpoint in place of every other."""

    def load_checkpoint(self, record: CheckpointRecord) -> Checkpoint:
        """Return the sleeping checkpoint."""
        delay = Path(self._settings.data) / "put_s"
        put = self._store.put_once

        def slow(*arguments: object) -> None:
            time.sleep(float(delay.read_text()) if delay.exists() else 0.0)
            put(*arguments)  # type: ignore[arg-type]

        self._store.put_once = slow  # type: ignore[method-assign, assignment]
        return SleepingCheckpoint(record)


if __name__ == "__main__":
    main(SleepingWorker)
