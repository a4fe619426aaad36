"""The farm's embeddings and checkpoints, as users add and list them."""

from __future__ import annotations

from pathlib import Path

from latentfarm_shared.checkpoints import (
    SINGLE_FILE,
    describe_folder,
    describe_hub,
    describe_single_file,
    is_hub_id,
)
from latentfarm_shared.embeddings.files import read_embedding
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord
from latentfarm_shared.registry import Registry


class Embeddings:
    """Embeddings by name."""

    def __init__(self, registry: Registry) -> None:
        """Work on this registry."""
        self._registry = registry

    def add(self, path: str | Path, name: str | None = None) -> EmbeddingRecord:
        """Read an embedding file of any known layout and store it under `name`, by default the file's stem.

        Raises:
            UnreadableFile: it is no embedding; says what it is.
            InvalidField: the name cannot be used.
        """
        return self._registry.add_embedding(read_embedding(Path(path)), name)

    def ls(self) -> list[EmbeddingRecord]:
        """Return all, by name."""
        return [record for _, record in sorted(self._registry.embeddings().items())]

    def show(self, name: str) -> EmbeddingRecord:
        """Return one.

        Raises:
            UnknownName: there is none; names the nearest.
        """
        return self._registry.embedding(name)


class Models:
    """Checkpoints by name."""

    def __init__(self, registry: Registry, hub_endpoint: str | None = None) -> None:
        """Work on this registry; `hub_endpoint` is another hub than the usual one."""
        self._registry, self._hub_endpoint = registry, hub_endpoint

    def add(self, source: str | Path, name: str | None = None, config: str | Path | None = None) -> CheckpointRecord:
        """Record a checkpoint: a diffusers folder, a `.safetensors` file, or a hub id (`owner/name[@revision]`).

        A single file in the original layout needs `config`, a diffusers folder of its family, of which configuration
        and tokenizer are used. Files are uploaded where the farm lacks them; of a hub's only the small ones.

        Raises:
            UnreadableFile: it is no such checkpoint; says what is missing.
            Unavailable: the hub does not answer.
        """
        folder = Path(source)
        if not folder.exists() and is_hub_id(str(source)):
            record, small = describe_hub(str(source), name, self._hub_endpoint)
            return self._registry.add_checkpoint(record, small)
        if folder.is_file():
            record = describe_single_file(folder, name or folder.stem, Path(config) if config else None)
            places = {f.path: (Path(config or "") / f.path, folder)[f.path == SINGLE_FILE] for f in record.files}
            return self._registry.add_checkpoint(record, [(f.sha256, places[f.path]) for f in record.files])
        record = describe_folder(folder, name or folder.absolute().name)
        return self._registry.add_checkpoint(record, [(f.sha256, folder / f.path) for f in record.files])

    def ls(self) -> list[CheckpointRecord]:
        """Return all, by name."""
        return [record for _, record in sorted(self._registry.checkpoints().items())]

    def show(self, name: str) -> CheckpointRecord:
        """Return one.

        Raises:
            UnknownName: there is none; names the nearest.
        """
        return self._registry.checkpoint(name)
