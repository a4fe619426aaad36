"""What the farm's own API answers with."""

from __future__ import annotations

import zlib
from typing import Any, Literal

from fastapi.responses import Response
from latentfarm_shared.ledger import ImageState, JobStatus
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord
from pydantic import BaseModel, Field

from latentfarm.jobs import FarmImage
from latentfarm.waiting import Cause

BASE = "/api/v1"


class JobUrls(BaseModel):
    """Where more about a job is found."""

    self: str
    events: str
    images: str
    cancel: str


class JobAnswer(JobStatus):
    """Where a job stands. `version` grows with every change; times are in seconds since 1970."""

    urls: JobUrls

    @classmethod
    def of(cls, status: JobStatus) -> JobAnswer:
        """Return a job's status with its addresses."""
        own = f"{BASE}/jobs/{status.id}"
        urls = JobUrls(self=own, events=f"{own}/events", images=f"{own}/images", cancel=f"{own}/cancel")
        return cls.model_construct(**dict(status), urls=urls)

    @property
    def etag(self) -> str:
        """What changes with it."""
        return f'W/"{zlib.crc32(self.model_dump_json().encode()):08x}-{self.version}"'


class JobPage(BaseModel):
    """Jobs, the newest first; `next` is the cursor of the page behind, null on the last."""

    items: list[JobAnswer]
    next: str | None = None


class ImageAnswer(BaseModel):
    """One image of a job."""

    id: str = Field(description="JOB/INDEX")
    index: int
    state: ImageState
    seed: int
    url: str | None = Field(None, description="Where the PNG is served, once it is there.")
    parameters: str = Field(description="A1111's infotext, as it stands in the PNG.")
    embeddings: list[dict[str, Any]] = Field([], description="Each embedding that is applied, and in which prompt.")
    point: dict[str, Any] = Field({}, description="Where it lies on the axes of a sweep.")
    error: dict[str, str] | None = None

    @classmethod
    def of(cls, image: FarmImage) -> ImageAnswer:
        """Describe an image."""
        own = f"{BASE}/jobs/{image.job}/images/{image.index}"
        return cls(
            id=f"{image.job}/{image.index}",
            index=image.index,
            state=image.state,
            seed=image.seed,
            url=f"{own}.png" if image.state == "succeeded" else None,
            parameters=image.parameters,
            embeddings=[applied.row() for applied in image.embeddings],
            point=dict(image.point) if image.spec.is_sweep else {},
            error=image.error if image.state == "failed" else None,
        )


class ImagePage(BaseModel):
    """Images in the order of their index; `next` is the cursor of the page behind, null on the last."""

    items: list[ImageAnswer]
    next: str | None = None


class LinkAnswer(BaseModel):
    """An address that whoever has it can read from until it expires."""

    url: str
    expires_in: int


class CausesAnswer(BaseModel):
    """Why images of a job wait or are missing."""

    causes: list[Cause]


class EmbeddingAnswer(BaseModel):
    """An embedding that can be named."""

    name: str
    owner: str
    version: str
    vectors: int
    kind: str
    state: str
    state_reason: str
    content_id: str
    file_sha256: str
    widths: dict[str, int]
    internal_name: str | None

    @classmethod
    def of(cls, record: EmbeddingRecord) -> EmbeddingAnswer:
        """Describe an embedding."""
        shown = record.model_dump(mode="json", exclude={"layout", "allow_word"})
        return cls.model_validate(shown | {"version": record.version})


class CheckpointAnswer(BaseModel):
    """A checkpoint that jobs can ask for."""

    name: str
    hash: str
    family: str
    sha256: str = Field(description="Of the weights, as A1111 and Civitai write it.")

    @classmethod
    def of(cls, record: CheckpointRecord) -> CheckpointAnswer:
        """Describe a checkpoint."""
        return cls(name=record.name, hash=record.hash, family=record.family, sha256=record.weights_hash)


class Healthy(BaseModel):
    """All is well: with the process, or, asked for readiness, with Redis and S3 too."""

    status: Literal["ok"] = "ok"
    version: str


def answer(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a model as JSON, without having it checked again."""
    return Response(model.model_dump_json(), status, headers, "application/json")
