"""A packed prompt becomes an embedding of the library like any other."""

from __future__ import annotations

import hashlib

from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.library import EmbeddingLibrary
from latentfarm_shared.records import EmbeddingRecord
from latentfarm_shared.sources import About, Details
from latentfarm_shared.specs import JobSpec, Pack

from latentfarm_worker.packing import Packed


class PackKeeper:
    """Stores packed prompts under the names their jobs gave."""

    def __init__(self, library: EmbeddingLibrary) -> None:
        self._library = library

    def keep(self, spec: JobSpec, pack: Pack, owner: str, packed: Packed, job: str) -> EmbeddingRecord:
        """Store one; the same job again stores nothing new."""
        tensors = {encoder: vectors.cpu().float().numpy() for encoder, vectors in packed.vectors.items()}
        bare = EmbeddingFile(pack.name, "packed", None, "", tensors, f"{pack.name}.safetensors")
        data = bare.normalised()
        digest = hashlib.sha256(data).hexdigest()
        file = EmbeddingFile(pack.name, "packed", None, digest, tensors, f"{pack.name}.safetensors")
        details = Details(
            data=data,
            origin=f"packed by job {job} on model {spec.model}",
            kind="Negative" if pack.negative else "Model",
            allow_word=pack.allow_word,
            about=About(description=f"quality {packed.quality:.3f}; {spec.prompt}", base_model=spec.model),
        )
        return self._library.add(file, pack.name, details, owner=owner, by=job)
