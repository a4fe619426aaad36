"""What the engine is held against: diffusers' own pipeline on the same checkpoint, called as its documentation does."""

from __future__ import annotations

import time
from typing import Any

import diffusers
import torch
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.specs import JobSpec
from latentfarm_worker.renderer import Renderer

PROMPT, NEGATIVE = "masterpiece, a girl with blue hair", "blurry, low quality"
STEPS, EDGE = 20, 128


def pipeline() -> Any:
    """Return a loaded pipeline with A1111's Euler."""
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(
        CHECKPOINT, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    loaded.set_progress_bar_config(disable=True)
    config = loaded.scheduler.config
    loaded.scheduler = diffusers.EulerDiscreteScheduler.from_config(config, timestep_spacing="linspace", steps_offset=0)
    return loaded


def bare_s(loaded: Any, images: int, batch: int) -> float:
    """Render so many images in static batches; return the seconds an image took."""
    began = time.perf_counter()
    for start in range(0, images, batch):
        generators = [torch.Generator().manual_seed(start + i) for i in range(batch)]
        loaded(
            [PROMPT] * batch,
            negative_prompt=[NEGATIVE] * batch,
            num_inference_steps=STEPS,
            guidance_scale=7.0,
            width=EDGE,
            height=EDGE,
            generator=generators,
        )
    return (time.perf_counter() - began) / images


def job(**values: Any) -> JobSpec:
    """Return the same as a job."""
    given = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE, "steps": STEPS, "width": EDGE, "height": EDGE, "seed": 0,
        "reuse": False,
    }  # fmt: skip
    return JobSpec.check(given | values)


def engine_s(renderer: Renderer, images: int, **values: Any) -> float:
    """Render so many images through the engine; return the seconds an image took."""
    spec, lock = renderer.freeze(job(count=images, **values))
    renderer.checkpoint.cache.clear()
    began = time.perf_counter()
    futures = [renderer.submit(spec, lock, index) for index in range(images)]
    for future in futures:
        future.result()
    return (time.perf_counter() - began) / images
