"""What a picture's proof of application is held against: the job's lock."""

from __future__ import annotations

from latentfarm_shared.errors import EmbeddingNotApplied
from latentfarm_shared.prompts.mentions import applied_embeddings
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import ImageSpec

from latentfarm_worker.renders import Rendered


def checked(rendered: Rendered, image: ImageSpec, lock: Lock) -> Rendered:
    """Compare what entered the encoder with what the lock promises for this image.

    Raises:
        EmbeddingNotApplied: they differ.
    """
    promised = {found.record.content_id: found.record.name for found in applied_embeddings(image, lock)}
    missing = [name for content_id, name in promised.items() if content_id not in rendered.applied]
    if missing or not rendered.applied <= set(promised):
        raise EmbeddingNotApplied(f"what entered the encoder is not what was promised: {', '.join(missing) or 'more'}")
    return rendered
