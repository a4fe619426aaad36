"""The public states of jobs and images, and a job's status as people read it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from latentfarm_shared.records import Dropped

ImageState = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
JobState = Literal["queued", "running", "paused", "succeeded", "failed", "canceled", "expired"]

STATE_OF_BYTE: dict[int, ImageState] = {
    0: "queued",
    ord("r"): "running",
    ord("s"): "succeeded",
    ord("f"): "failed",
    ord("c"): "canceled",
    ord("e"): "expired",
}
FINAL: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})


class JobStatus(BaseModel):
    """Where a job stands. `version` grows with every change; `created` is in seconds since 1970."""

    model_config = ConfigDict(frozen=True)

    id: str
    state: JobState
    total: int
    counts: dict[ImageState, int]
    version: int
    created: float
    model: str
    prompt: str
    progress: dict[str, float | str] | None = None
    dropped: tuple[Dropped, ...] = ()

    @property
    def is_final(self) -> bool:
        """Tell whether nothing will change any more."""
        return self.state in FINAL and self.counts["running"] == 0

    @property
    def finished(self) -> int:
        """How many images are in a final state."""
        return sum(self.counts[state] for state in ("succeeded", "failed", "canceled", "expired"))
