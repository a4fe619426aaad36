"""What a picture's proof of application is held against: the job's lock."""

from __future__ import annotations

from latentfarm_shared.errors import EmbeddingNotApplied
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import ImageSpec

from latentfarm_worker.operations import Rendered


def checked(rendered: Rendered, image: ImageSpec, lock: Lock) -> Rendered:
    """Compare what entered the encoder with what the lock promises: all of it, or what one point of a sweep means.

    Raises:
        EmbeddingNotApplied: they differ.
    """
    names = {record.content_id: record.name for record in lock.embeddings}
    wanted = rendered.promised if image.varies else names.keys()
    missing = [names.get(content_id, content_id) for content_id in wanted if content_id not in rendered.applied]
    if missing or not rendered.applied <= names.keys():
        raise EmbeddingNotApplied(f"what entered the encoder is not what was promised: {', '.join(missing) or 'more'}")
    return rendered
