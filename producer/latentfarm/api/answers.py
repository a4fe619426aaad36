"""What the farm's own API answers with."""

from __future__ import annotations

import zlib
from typing import Literal

from fastapi.responses import Response
from latentfarm_shared.ledger import JobStatus
from pydantic import BaseModel

from latentfarm.views import BASE, ImageAnswer
from latentfarm.waiting import Cause


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


class Healthy(BaseModel):
    """All is well: with the process, or, asked for readiness, with Redis and S3 too."""

    status: Literal["ok"] = "ok"
    version: str


def answer(model: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a model as JSON, without having it checked again."""
    return Response(model.model_dump_json(), status, headers, "application/json")
