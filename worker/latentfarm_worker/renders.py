"""Renders, written to be read: generators that yield what they need from the device."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from latentfarm_shared.names import effective_schedule
from latentfarm_shared.prompts.chunks import Chunk, chunk_prompt
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import ImageSpec
from torch import Tensor

from latentfarm_worker.operations import Conditioning, Decode, Denoise, Encode, Operation
from latentfarm_worker.samplers import SAMPLERS
from latentfarm_worker.schedules import NoiseModel, sigmas_for

Render = Generator[Operation, Any, Tensor]


@dataclass(frozen=True)
class RenderRequest:
    """Everything a render needs that is no device work: chunks of both prompts, seed, sampler, sizes."""

    positive: tuple[Chunk, ...]
    negative: tuple[Chunk, ...]
    image: ImageSpec

    @classmethod
    def build(cls, image: ImageSpec, lock: Lock, tokenizer: ClipTokenizer) -> RenderRequest:
        """Lay out both prompts, matched against the job's lock alone."""
        matcher = NameMatcher(tokenizer, lock.embeddings)
        positive, negative = (
            tuple(chunk_prompt(text, tokenizer, matcher, end_pads="clip_l" in lock.checkpoint.widths))
            for text in (image.job.prompt, image.job.negative_prompt)
        )
        return cls(positive, negative, image)

    def missing(self, lock: Lock) -> list[str]:
        """Return the names in the lock that neither prompt places."""
        placed = {p.embedding.content_id for chunk in self.positive + self.negative for p in chunk.placements}
        return [e.name for e in lock.embeddings if e.content_id not in placed]


def txt2img(request: RenderRequest, noise_model: NoiseModel) -> Render:
    """Render one image as A1111 does: its own generator on the CPU, noise times the first sigma. Returns pixels."""
    job = request.image.job
    positive: Conditioning = yield Encode(request.positive, job.clip_skip)
    negative: Conditioning = yield Encode(request.negative, job.clip_skip)
    generator = torch.Generator("cpu").manual_seed(request.image.seed)
    shape = (4, job.height // 8, job.width // 8)

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator)

    sigmas = sigmas_for(effective_schedule(job.sampler, job.schedule), noise_model, job.steps)
    steps = SAMPLERS[job.sampler](noise() * sigmas[0], sigmas, noise)
    latent, sigma = next(steps)
    while True:
        denoised = yield Denoise(latent, sigma, positive, negative, job.cfg_scale)
        try:
            latent, sigma = steps.send(denoised)
        except StopIteration as finished:
            pixels: Tensor = yield Decode(finished.value)
            return pixels
