"""What the farm tells of images, embeddings and checkpoints, to clients and by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentfarm_shared.ledger import ImageState
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord, family_of
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from latentfarm.jobs import FarmImage

BASE = "/api/v1"


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
    layout: str

    @property
    def family(self) -> str:
        """The family its widths belong to: sd1, sd2, sdxl, t5 or unknown."""
        return family_of(self.widths, "unknown")

    @property
    def ti_hash(self) -> str:
        """First 12 hex digits of the file's sha256, as in A1111's `TI hashes`."""
        return self.file_sha256[:12]

    @classmethod
    def of(cls, record: EmbeddingRecord) -> EmbeddingAnswer:
        """Describe an embedding."""
        shown = record.model_dump(mode="json", exclude={"allow_word"})
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
