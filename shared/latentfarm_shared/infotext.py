"""The `parameters` text of a picture, with A1111's keys, order and quoting."""

from __future__ import annotations

import json

from latentfarm_shared import __version__
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import ImageSpec


def quote(value: object) -> str:
    """Return a value as A1111 writes it: a JSON string if it holds a comma, colon or line break."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def format_infotext(image: ImageSpec, lock: Lock) -> str:
    """Describe an image so that A1111 and its readers understand it; every embedding stands once in `TI hashes`."""
    job = image.job
    names = (f"{e.name.replace(':', '').replace(',', '')}: {e.ti_hash}" for e in lock.embeddings)
    fields: dict[str, object | None] = {
        "Steps": job.steps,
        "Sampler": job.sampler,
        "Schedule type": job.schedule,
        "CFG scale": f"{job.cfg_scale:g}",
        "Seed": image.seed,
        "Size": f"{job.width}x{job.height}",
        "Model hash": lock.checkpoint.weights_hash[:10],
        "Model": lock.checkpoint.name,
        "Clip skip": job.clip_skip if job.clip_skip > 1 else None,
        "RNG": "CPU",
        "TI hashes": ", ".join(names) or None,
        "Version": f"latentfarm {__version__}",
    }
    line = ", ".join(f"{key}: {quote(value)}" for key, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {job.negative_prompt}" if job.negative_prompt else ""
    return f"{job.prompt}{negative}\n{line}".strip()
