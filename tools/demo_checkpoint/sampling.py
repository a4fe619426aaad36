"""Render many pictures with the worker's own renderer, for evaluation and for choosing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from latentfarm_shared.parameters import HiresFix
from latentfarm_shared.specs import JobSpec
from latentfarm_worker.renderer import Renderer
from latentfarm_worker.runtime import Runtime
from PIL import Image

SLOTS = 16


@dataclass(frozen=True)
class Wish:
    """One picture to render; `hires` doubles its edges in a second pass."""

    prompt: str
    seed: int
    negative_prompt: str = ""
    cfg_scale: float = 7.0
    sampler: str = "Euler"
    steps: int = 20
    size: int = 128
    hires: bool = False

    def spec(self) -> JobSpec:
        """Return it as a job of one image."""
        return JobSpec(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            cfg_scale=self.cfg_scale,
            sampler=self.sampler,
            schedule="Uniform",
            steps=self.steps,
            seed=self.seed,
            width=self.size,
            height=self.size,
            hires=HiresFix(denoising_strength=0.5) if self.hires else None,
        )


class Studio:
    """A checkpoint folder and embedding files, ready to render in bfloat16, which is twice as fast on a CPU that has it."""

    def __init__(self, folder: Path) -> None:
        runtime = Runtime(dtype=torch.bfloat16, vae_dtype=torch.bfloat16)
        self._renderer = Renderer(folder, runtime=runtime, slots=SLOTS)

    def add(self, path: Path) -> None:
        """Make an embedding usable by its file's stem."""
        self._renderer.add_embedding(path)

    def render(self, wishes: Sequence[Wish]) -> list[Image.Image]:
        """Render the wishes in order."""
        futures = [self._renderer.submit(*self._renderer.freeze(wish.spec())) for wish in wishes]
        return [Image.fromarray(future.result().pixels.numpy()) for future in futures]


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay pictures of one size out in a grid."""
    edge = images[0].width + 4
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * edge, rows * edge), (60, 60, 60))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * edge + 2, number // columns * edge + 2))
    return sheet
