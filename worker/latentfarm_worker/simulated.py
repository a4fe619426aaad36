"""A simulated GPU: takes its time for every operation and knows one picture. No torch.

Everything around it is the real thing: engine and slots, claims, supervisor, PNG and PUT; so scheduling and faults are
measured and tested with as many workers as a laptop bears.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.ledger import Claim, Ledger
from latentfarm_shared.records import CheckpointRecord, Lock
from latentfarm_shared.registry import Registry
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import ImageSpec
from latentfarm_shared.storage import ObjectStore
from numpy.typing import NDArray

from latentfarm_worker.capacity import Capacity
from latentfarm_worker.counts import Counts
from latentfarm_worker.device import Device
from latentfarm_worker.operations import (
    Conditioning,
    Decode,
    Denoise,
    Encode,
    EncodePixels,
    Enlarge,
    Model,
    Picture,
    Progress,
    Render,
    Rendered,
)
from latentfarm_worker.png import encode_png

ENCODING, DECODING = 0.05, 0.1  # shares of an image's time; the rest is denoising
EDGE = 64


class SimulatedModel:
    """Takes `image_s` seconds of the device for an image of any size and steps, give or take a share of `jitter`."""

    def __init__(self, name: str, image_s: float, jitter: float) -> None:
        self.name, self._image_s, self._jitter = name, image_s, jitter
        self._random = random.Random()

    def _spend(self, share: float) -> None:
        """Keep the device busy for a share of an image's time."""
        time.sleep(self._image_s * share * self._random.uniform(1 - self._jitter, 1 + self._jitter))

    def encode(self, batch: Sequence[Encode]) -> list[tuple[Conditioning, ...]]:
        """Encode nothing."""
        self._spend(ENCODING * len(batch))
        return [() for _ in batch]

    def denoise(self, batch: Sequence[Denoise]) -> list[Any]:
        """Take a step's share for every image; how many steps it has stands in `rescale`."""
        self._spend((1 - ENCODING - DECODING) * sum(1 / item.rescale for item in batch))
        return [item.latent for item in batch]

    def decode(self, batch: Sequence[Decode]) -> list[Picture]:
        """Answer with the picture of a latent's size."""
        self._spend(DECODING * len(batch))
        pictures: list[Any] = [simulated_picture(item.latent.shape[2] * 8, item.latent.shape[1] * 8) for item in batch]
        return [Picture(pixels) for pixels in pictures]

    def encode_pixels(self, batch: Sequence[EncodePixels]) -> list[Any]:
        """Answer at once."""
        return [item.noise for item in batch]

    def enlarge(self, batch: Sequence[Enlarge]) -> list[Any]:
        """Answer at once."""
        return [item.tile for item in batch]


def simulated_picture(width: int, height: int) -> NDArray[np.uint8]:
    """Return `[height, width, 3]`: a gradient."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], 2).astype(np.uint8)


def simulated_render(image: ImageSpec, lock: Lock, progress: Progress) -> Render:
    """Ask the device for what an image of these parameters asks for, hires fix included."""
    job = image.job
    yield Encode(((),), clip_skip=job.clip_skip)
    passes = [(job.steps, job.width, job.height)]
    if job.hires is not None:
        passes.append((job.hires.steps or job.steps, *job.hires.target(job.width, job.height)))
    steps = float(sum(count for count, _, _ in passes))
    for number, (count, width, height) in enumerate(passes):
        latent: Any = np.broadcast_to(np.float32(0), (4, height // 8, width // 8))
        scaling: Any = None
        progress.begin("hires pass" if number else "first pass", count)
        for _ in range(count):
            yield Denoise(latent, scaling, (), rescale=steps, tiling=job.tiling)
            progress.step += 1
    picture: Picture = yield Decode(latent, job.tiling)
    content_ids = frozenset(record.content_id for record in lock.embeddings)
    return Rendered(picture.pixels, content_ids, content_ids)


def _nothing_to_fit() -> Render:
    yield Encode(((),))
    pixels: Any = simulated_picture(EDGE, EDGE)
    return Rendered(pixels)


class SimulatedBackend:
    """Serves every checkpoint of the farm at once and applies every embedding in name."""

    def __init__(
        self, _name: str, settings: Settings, ledger: Ledger, store: ObjectStore, _on_progress: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._registry = Registry(ledger.redis, store)
        self._models: dict[str, SimulatedModel] = {}
        self.device, self.capacity = Device(), Capacity()

    def checkpoints(self) -> Sequence[CheckpointRecord]:
        """Return the checkpoints registered on the farm."""
        return list(self._registry.checkpoints().values())

    def load(self, record: CheckpointRecord) -> None:
        """Serve a checkpoint."""
        settings = self._settings
        self._models[record.hash] = SimulatedModel(record.hash, settings.image_seconds, settings.jitter)

    def is_warm(self, checkpoint_hash: str) -> bool:
        """Tell whether a checkpoint is served."""
        return checkpoint_hash in self._models

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[Model]:
        """Return the checkpoint's model."""
        yield self._models[claim.lock.checkpoint.hash]

    def render(self, claim: Claim, image: ImageSpec, _model: Model, progress: Progress) -> Render:
        """Return the simulated render of an image."""
        return simulated_render(image, claim.lock, progress)

    def fitting(self) -> Render | None:
        """Return a render that is over at once."""
        return _nothing_to_fit()

    def preview(self, progress: Progress, _fitted: Rendered) -> bytes | None:
        """Return a small gradient."""
        return encode_png(simulated_picture(EDGE, EDGE), "") if progress.step else None

    def keep(self, _claim: Claim, _rendered: Rendered) -> dict[str, float | str]:
        """Keep nothing."""
        return {"stage": "done"}

    def blame(self, _claim: Claim) -> None:
        """Blame nobody."""

    def praise(self, _claim: Claim) -> None:
        """Praise nobody."""

    def infotext(self, claim: Claim, image: ImageSpec) -> str:
        """Return the parameters to write into a picture."""
        return format_infotext(image, claim.lock)

    def counts(self) -> Counts:
        """Return how many checkpoints are served."""
        return Counts(loads=len(self._models))

    def duties(self) -> Sequence[tuple[str, float, Callable[[], None]]]:
        """Have nothing to do beside."""
        return ()
