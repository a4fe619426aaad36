"""`generate`: a job of one prompt, the same for every kind of farm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from latentfarm_shared.parameters import EmbeddingUse, HiresFix, SamplingOptions
from latentfarm_shared.specs import JobSpec

R_co = TypeVar("R_co", covariant=True)


class Generates(ABC, Generic[R_co]):
    """What can submit jobs; `R_co` is what a submission returns."""

    @abstractmethod
    def submit(self, spec: JobSpec, job_id: str | None = None) -> R_co:
        """Submit a job."""

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        embeddings: Sequence[str | EmbeddingUse] = (),
        model: str = "demo",
        sampler: str = "Euler",
        schedule: str = "Automatic",
        steps: int = 20,
        cfg_scale: float = 7.0,
        seed: int = -1,
        width: int = 128,
        height: int = 128,
        clip_skip: int = 1,
        count: int = 1,
        lane: str = "interactive",
        hires: HiresFix | None = None,
        options: SamplingOptions | None = None,
        **parameters: Any,
    ) -> R_co:
        """Submit a job of `count` images with seeds `seed`, `seed + 1`, …; -1 draws one.

        `hires` is A1111's hires fix, `options` are its sampler settings; `parameters` are the other fields of JobSpec
        (variation_seed, rng, emphasis, tiling …). `embeddings` are names, or `NAME:neg` for the negative prompt; those the prompts do not mention are added.

        Raises:
            UsageError: what is wrong with the request, before anything is queued.
            Unavailable: the farm does not answer.
        """
        uses = [EmbeddingUse.parse(use) if isinstance(use, str) else use for use in embeddings]
        values = {
            "prompt": prompt, "negative_prompt": negative_prompt, "embeddings": uses, "model": model,
            "sampler": sampler, "schedule": schedule, "steps": steps, "cfg_scale": cfg_scale, "seed": seed,
            "width": width, "height": height, "clip_skip": clip_skip, "count": count, "lane": lane,
            "hires": hires, "options": options or SamplingOptions(),
        }  # fmt: skip
        return self.submit(JobSpec.check(values | parameters))
