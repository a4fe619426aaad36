"""What a worker renders with: a device, and the checkpoints and embeddings it holds for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from latentfarm_shared.ledger import Claim
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.specs import ImageSpec

from latentfarm_worker.capacity import Capacity
from latentfarm_worker.counts import Counts
from latentfarm_worker.device import Device
from latentfarm_worker.operations import Model, Progress, Render, Rendered


class Backend(Protocol):
    """A device and what is held for it. Safe to share between threads."""

    device: Device
    capacity: Capacity

    def checkpoints(self) -> Sequence[CheckpointRecord]:
        """Return the checkpoints registered on the farm."""
        ...

    def load(self, record: CheckpointRecord) -> None:
        """Make a checkpoint ready, and the embeddings that fit what is ready."""
        ...

    def is_warm(self, checkpoint_hash: str) -> bool:
        """Tell whether a checkpoint is in memory right now."""
        ...

    def holding(self, claim: Claim) -> AbstractContextManager[Model]:
        """Hold what an image needs for as long as the block runs.

        Raises:
            Unavailable: it could not be fetched.
        """
        ...

    def render(self, claim: Claim, image: ImageSpec, model: Model, progress: Progress) -> Render:
        """Return the render of a claimed image.

        Raises:
            RenderError: it cannot be rendered as its job promises.
        """
        ...

    def fitting(self) -> Render | None:
        """Return a render whose result `preview` needs, once for each checkpoint; None if there are no previews."""
        ...

    def preview(self, progress: Progress, fitted: Rendered) -> bytes | None:
        """Return what a render sees now as a small PNG; None before its first step."""
        ...

    def keep(self, claim: Claim, rendered: Rendered) -> dict[str, float | str]:
        """Store what a packing made; return what to tell of it."""
        ...

    def blame(self, claim: Claim) -> None:
        """Take into account that an image failed which used these embeddings."""
        ...

    def praise(self, claim: Claim) -> None:
        """Take into account that an image was published which used these embeddings."""
        ...

    def infotext(self, claim: Claim, image: ImageSpec) -> str:
        """Return the parameters to write into a picture."""
        ...

    def counts(self) -> Counts:
        """Return what is counted."""
        ...

    def duties(self) -> Sequence[tuple[str, float, Callable[[], None]]]:
        """Return what is to be done again and again beside rendering: a name, seconds between, and how."""
        ...
