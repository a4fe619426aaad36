"""Which of a job's embeddings stand in the prompts of one image, and where."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from latentfarm_shared.prompts.contract import Contract
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import EmbeddingRecord, Lock
from latentfarm_shared.specs import ImageSpec


class AppliedEmbedding(BaseModel):
    """One embedding that went into an image: `where` are the prompts it stands in."""

    model_config = ConfigDict(frozen=True)

    record: EmbeddingRecord
    where: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """Return what an image's record says of it."""
        record = self.record
        return {
            "name": record.name,
            "version": record.version,
            "content_id": record.content_id,
            "sha256": record.file_sha256,
            "ti_hash": record.ti_hash,
            "vectors": record.vectors,
            "where": list(self.where),
        }


def applied_embeddings(image: ImageSpec, lock: Lock, tokenizer: ClipTokenizer) -> list[AppliedEmbedding]:
    """Return the embeddings of a job's lock that one image's prompts mean, in the lock's order."""
    contract = Contract(lock.checkpoint, {record.name.lower(): record for record in lock.embeddings}, tokenizer)
    where = contract.applied_in(image.job)
    return [
        AppliedEmbedding(record=record, where=tuple(where[record.name.lower()]))
        for record in lock.embeddings
        if record.name.lower() in where
    ]
