"""What identifies an image: its key in the store and the hash of everything that decides its pixels."""

from __future__ import annotations

import hashlib
import json

from latentfarm_shared.records import Lock
from latentfarm_shared.specs import JOB_FIELDS, ImageSpec


def image_key(job: str, index: int) -> str:
    """Return where image `index` of a job lies in the store."""
    return f"jobs/{job}/{index:06d}.png"


def content_id(image: ImageSpec, lock: Lock) -> str:
    """Return the sha256 of everything that decides an image's pixels."""
    aside = JOB_FIELDS - {"expander"} if image.job.expander == 1 else JOB_FIELDS
    request = image.job.model_dump(exclude=set(aside))
    embeddings = {e.name.lower(): e.content_id for e in lock.embeddings}
    decides = {"request": request, "seed": image.seed, "checkpoint": lock.checkpoint.hash, "embeddings": embeddings}
    return hashlib.sha256(json.dumps(decides, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
