"""Jobs about an embedding: what it does (preview), how strong it should be (sweep), and making one (pack)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.ledger import JobStatus
from latentfarm_shared.library import EmbeddingLibrary
from latentfarm_shared.records import EmbeddingRecord, Lock
from latentfarm_shared.specs import JobSpec, Pack
from latentfarm_shared.sweeps.axes import Axis
from PIL import Image

from latentfarm.contact_sheet import axis_sheet, contact_sheet
from latentfarm.jobs import Job
from latentfarm.library import Embeddings

PREVIEW_SEED, PREVIEW_SEEDS = 43, 4
PREVIEW_PROMPT = "masterpiece, high quality"
DEAD_BELOW = 0.01
Watch = Callable[[JobStatus], None]


class Studio(Protocol):
    """What a study needs of a farm."""

    embeddings: Embeddings
    library: EmbeddingLibrary

    def freeze(self, spec: JobSpec) -> tuple[JobSpec, tuple[Lock, ...]]:
        """Settle a job."""
        ...

    def submit_frozen(self, spec: JobSpec, locks: Sequence[Lock]) -> Job:
        """Submit a job that is settled."""
        ...

    def submit_all(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Submit several jobs."""
        ...


@dataclass(frozen=True)
class Preview:
    """Pictures with and without an embedding at fixed seeds, and how far it moves them.

    `effect` is the mean difference of pixels, 0 to 1, from pictures with as many vectors of zeros in its place: any tokens
    move a picture by the room they take, a dead embedding by nothing more.
    """

    record: EmbeddingRecord
    effect: float
    without: Sequence[bytes]
    with_it: Sequence[bytes]
    sheet: Image.Image

    @property
    def is_dead(self) -> bool:
        """Whether nobody would see a difference."""
        return self.effect < DEAD_BELOW


def preview(
    farm: Studio, name: str, model: str, prompt: str, timeout_s: float | None = None, watch: Watch | None = None
) -> Preview:
    """Render without, with, and with zeros in place of an embedding, at four seeds; one picture becomes the card's."""
    record = farm.embeddings.show(name)
    side = "negative" if record.kind == "Negative" else "positive"
    shared = {"prompt": prompt, "model": model, "seed": PREVIEW_SEED, "count": PREVIEW_SEEDS, "lane": "batch"}
    plain = JobSpec.check(shared)
    using = JobSpec.check(shared | {"embeddings": [{"name": name, "side": side}]})
    spec, (lock,) = farm.freeze(using)
    jobs = [
        *farm.submit_all([plain]),
        farm.submit_frozen(spec, [lock]),
        farm.submit_frozen(spec, [_with_zeros(farm, lock)]),
    ]
    *pictures, zeros = [_pictures(job, timeout_s, watch) for job in jobs]
    effect = float(np.mean([_difference(a, b) for a, b in zip(pictures[1], zeros, strict=True)]))
    captions = [f"seed {PREVIEW_SEED + number}" for number in range(PREVIEW_SEEDS)]
    rows = [
        (f"without: {prompt}", list(zip(captions, pictures[0], strict=True))),
        (f"with {record.name} ({side})", list(zip(captions, pictures[1], strict=True))),
    ]
    sheet = contact_sheet(f"{record.name}: effect {effect:.3f}", rows)
    farm.library.put_preview(record.content_id, pictures[1][0])
    return Preview(record, effect, pictures[0], pictures[1], sheet)


def _with_zeros(farm: Studio, lock: Lock) -> Lock:
    """Return a lock in which the embeddings' names stand for as many vectors of zeros."""
    neutral = []
    for record in lock.embeddings:
        tensors = {name: np.zeros((record.vectors, width), np.float32) for name, width in record.widths.items()}
        content_id = farm.library.keep(EmbeddingFile(record.name, "zeros", None, "", tensors))
        neutral.append(record.model_copy(update={"content_id": content_id}))
    return lock.model_copy(update={"embeddings": tuple(neutral)})


def sweep_spec(
    record: EmbeddingRecord, name: str, model: str, prompt: str, strengths: Sequence[float], seeds: int
) -> JobSpec:
    """Return the job that draws an embedding at several strengths and seeds."""
    side = "negative" if record.kind == "Negative" else "positive"
    axes = (Axis(field=f"strength:{record.name}", values=tuple(strengths)), _seed_axis(seeds))
    return JobSpec.check(
        {
            "prompt": prompt,
            "model": model,
            "embeddings": [{"name": name, "side": side}],
            "axes": [axis.model_dump() for axis in axes],
            "seed": PREVIEW_SEED,
            "lane": "batch",
        }
    )


def _seed_axis(seeds: int) -> Axis:
    return Axis(field="seed", values=tuple(PREVIEW_SEED + number for number in range(seeds)))


def sheet_of(job: Job) -> Image.Image:
    """Return a finished sweep's pictures along its labelled axes: the first two as columns and rows."""
    pictures = {image.index: image.png() for image in job.iter_images() if image.state == "succeeded"}
    return axis_sheet(job.spec, pictures)


def pack_spec(prompt: str, pack: Pack, model: str, size: tuple[int, int], seed: int) -> JobSpec:
    """Return the job that packs a prompt."""
    width, height = size
    return JobSpec.check(
        {"prompt": prompt, "pack": pack.model_dump(), "model": model, "width": width, "height": height, "seed": seed,
         "lane": "batch"}
    )  # fmt: skip


def _pictures(job: Job, timeout_s: float | None, watch: Watch | None) -> list[bytes]:
    job.wait(timeout_s, watch)
    return [image.png() for image in job.iter_images()]


def _difference(left: bytes, right: bytes) -> float:
    a, b = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float32) for png in (left, right))
    return float(np.abs(a - b).mean() / 255)
