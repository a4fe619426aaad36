"""The public states of jobs and images, and a job's status as people read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from latentfarm_shared.ledger.queues import LANES
from latentfarm_shared.records import Dropped, Lock
from latentfarm_shared.specs import JobSpec

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
STATUS_FIELDS = (
    "state", "reason", "total", "running", "succeeded", "failed", "canceled", "expired", "starts", "version", "created",
    "finished", "owner", "lane", "priority", "paused", "gated", "progress", "parts",
)  # fmt: skip
STAMP_FIELDS = (*STATUS_FIELDS, "number", "marks")
"""What a status and images' states are made of; `number` tells a job from one that had its id and was deleted."""
Stamp = tuple[bytes | None, ...]
FINAL: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})


class JobStatus(BaseModel):
    """Where a job stands. `version` grows with every change; times are in seconds since 1970.

    `reason` says who holds a paused job (owner, approval) or why one expired. `starts` counts images handed to workers to be rendered.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    state: JobState
    total: int
    counts: dict[ImageState, int]
    version: int
    created: float
    model: str
    prompt: str
    reason: str = ""
    starts: int = 0
    owner: str = ""
    lane: str = "interactive"
    priority: int = 0
    name: str = ""
    tags: tuple[str, ...] = ()
    finished_at: float | None = None
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


@dataclass(frozen=True)
class Submission:
    """What a submission came to: the job's id, which is an earlier one if `is_new` is false."""

    job: str
    is_new: bool


class JobEvent(BaseModel):
    """Something that happened to a job; `version` grows without gaps, `index` names an image if it is about one."""

    model_config = ConfigDict(frozen=True)

    version: int
    what: str
    index: int | None = None
    at: float


class Limits(BaseModel):
    """What an owner may have: a `weight` in the fair share, images `running` at once and `queued`.

    None is what everybody else may, and for everybody no bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float | None = Field(None, gt=0, le=1000, allow_inf_nan=False)
    running: int | None = Field(None, ge=1)
    queued: int | None = Field(None, ge=0)


class WorkerStatus(BaseModel):
    """What a worker says of itself with every beat. `rate` is in pixel-steps a second, `memory_mb` its process's."""

    model_config = ConfigDict(frozen=True)

    name: str
    pid: int
    host: str
    device: str
    checkpoints: tuple[str, ...]
    slots: int
    claims: int
    phase: str
    draining: bool
    loads: int
    embeddings: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    images: int = 0
    rate: float = 0.0
    memory_mb: int = 0
    lanes: tuple[str, ...] = LANES
    queues: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    version: str = ""
    last_error: str = ""

    @property
    def station(self) -> str:
        """The name that stays over restarts of the process."""
        return self.name.rpartition(".")[0] or self.name


def job_status(job: str, fields: dict[str, str], spec: JobSpec, lock: Lock) -> JobStatus:
    """Return a job's status from the fields of its hash."""
    done: dict[ImageState, int] = {
        "running": int(fields["running"]),
        "succeeded": int(fields["succeeded"]),
        "failed": int(fields["failed"]),
        "canceled": int(fields["canceled"]),
        "expired": int(fields["expired"]),
    }
    total = int(fields["total"])
    held = "approval" if fields.get("gated") == "1" else "owner" if fields.get("paused") == "1" else ""
    return JobStatus.model_validate(
        {
            "id": job,
            "state": fields["state"],
            "reason": held if fields["state"] == "paused" else fields.get("reason", ""),
            "total": total,
            "counts": {"queued": total - sum(done.values()), **done},
            "starts": int(fields["starts"]),
            "version": int(fields["version"]),
            "created": int(fields["created"]) / 1000,
            "finished_at": int(fields["finished"]) / 1000 if "finished" in fields else None,
            "owner": fields["owner"],
            "lane": fields["lane"],
            "priority": int(fields["priority"]),
            "name": spec.name,
            "tags": spec.tags,
            "model": spec.model,
            "prompt": spec.prompt,
            "progress": json.loads(fields["progress"]) if "progress" in fields else None,
            "dropped": lock.dropped,
        }
    )


def worker_status(name: str, raw: dict[bytes, bytes], claims: int, embeddings: int) -> WorkerStatus:
    """Return a worker's status from the fields of its hash."""
    fields = {key.decode(): value.decode() for key, value in raw.items()}

    def words(field: str, default: str = "") -> tuple[str, ...]:
        return tuple(filter(None, fields.get(field, default).split(",")))

    return WorkerStatus(
        name=name,
        pid=int(fields.get("pid", 0)),
        host=fields.get("host", ""),
        device=fields.get("device", ""),
        checkpoints=words("checkpoints"),
        slots=int(fields.get("slots", 0)),
        claims=claims,
        phase=fields.get("phase", "starting"),
        draining=fields.get("draining") == "1",
        loads=int(fields.get("loads", 0)),
        embeddings=embeddings,
        cache_hits=int(fields.get("cache_hits", 0)),
        cache_misses=int(fields.get("cache_misses", 0)),
        images=int(fields.get("images", 0)),
        rate=float(fields.get("rate", 0)),
        memory_mb=int(fields.get("memory_mb", 0)),
        lanes=words("lanes", ",".join(LANES)),
        queues=words("queues"),
        tags=words("tags"),
        version=fields.get("version", ""),
        last_error=fields.get("last_error", ""),
    )
