"""Which of a job's embeddings stand in the prompts of one image, and where."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict

from latentfarm_shared.records import EmbeddingRecord, Lock
from latentfarm_shared.specs import ImageSpec

_ESCAPED = re.compile(r"\\([()\[\]\\])")


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


@lru_cache(maxsize=4096)
def written(name: str) -> re.Pattern[str]:
    """Match a name as prompts may write it: in any case, with or without spaces between its parts."""
    return re.compile(r"\s*".join(re.escape(c) for c in name if not c.isspace()), re.IGNORECASE)


def applied_embeddings(image: ImageSpec, lock: Lock) -> list[AppliedEmbedding]:
    """Return the embeddings of a job's lock that stand in one image's prompts, in the lock's order.

    A job without a sweep has all of them in every image. Of names that hold one another the longest counts, as in the
    prompt language.
    """
    where: dict[str, list[str]] = {}
    by_length = sorted(lock.embeddings, key=lambda record: -len(record.name))
    for field, prompt in image.job.prompts:
        text = _ESCAPED.sub(r"\1", prompt)
        for record in by_length:
            text, found = written(record.name).subn("\n", text)
            if found:
                where.setdefault(record.content_id + record.name, []).append(field)
    return [
        AppliedEmbedding(record=record, where=tuple(where.get(record.content_id + record.name, ())))
        for record in lock.embeddings
        if record.content_id + record.name in where or not image.point
    ]
