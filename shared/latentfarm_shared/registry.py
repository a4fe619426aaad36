"""Names of checkpoints and embeddings: content first, then the name, both in S3; an index of names in Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from redis import Redis

from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.errors import InvalidField, UnknownName
from latentfarm_shared.ledger.ledger import translated
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord
from latentfarm_shared.storage import ObjectStore

_CHECKPOINTS, _EMBEDDINGS = "lf:checkpoints", "lf:embeddings"


def embedding_key(content_id: str) -> str:
    """Return where an embedding's tensors lie."""
    return f"embeddings/objects/{content_id}.safetensors"


def blob_key(sha256: str) -> str:
    """Return where a file of a checkpoint lies."""
    return f"checkpoints/blobs/{sha256}"


def check_name(name: str, kind: str) -> str:
    """Return a usable name, stripped.

    Raises:
        InvalidField: empty, too long, or holding characters that prompts or keys cannot.
    """
    name = name.strip()
    if not 1 <= len(name) <= 120 or not name.isprintable() or any(c in name for c in "/\\:<>"):
        raise InvalidField(f"{kind} name", f"{name[:40]!r} should be 1 to 120 printable characters without / \\ : < >")
    return name


class Registry:
    """Reads and writes the farm's checkpoints and embeddings."""

    def __init__(self, redis: Redis, store: ObjectStore) -> None:
        """Use these two; nothing is sent yet."""
        self._redis: Any = redis  # see Ledger
        self._store = store

    def add_embedding(self, file: EmbeddingFile, name: str | None = None) -> EmbeddingRecord:
        """Store an embedding under a name, by default its file's stem; the same name again replaces it."""
        record = file.record(check_name(name or file.stem, "embedding"))
        key = embedding_key(record.content_id)
        self._store.put_once(key, file.normalised(), "application/octet-stream", record.content_id)
        self._put_name(_EMBEDDINGS, "embeddings", record.name, record.encode())
        return record

    def embeddings(self) -> dict[str, EmbeddingRecord]:
        """Return every embedding by its name in lower case."""
        return {name: EmbeddingRecord.decode(text) for name, text in self._names(_EMBEDDINGS).items()}

    def embedding(self, name: str) -> EmbeddingRecord:
        """Return one embedding.

        Raises:
            UnknownName: names the nearest.
        """
        known = self.embeddings()
        if name.lower() not in known:
            raise UnknownName.among("embedding", name, (record.name for record in known.values()))
        return known[name.lower()]

    def embedding_tensors(self, record: EmbeddingRecord) -> bytes:
        """Return the normalised safetensors of an embedding."""
        return self._store.get(embedding_key(record.content_id))

    def add_checkpoint(self, record: CheckpointRecord, files: Iterable[tuple[str, Path]] = ()) -> CheckpointRecord:
        """Upload what is missing of a checkpoint's files (sha256, path), then give it its name."""
        check_name(record.name, "checkpoint")
        for sha256, path in files:
            if not self._store.exists(blob_key(sha256)):
                self._store.upload(blob_key(sha256), path)
        self._put_name(_CHECKPOINTS, "checkpoints", record.name, record.encode())
        return record

    def checkpoints(self) -> dict[str, CheckpointRecord]:
        """Return every checkpoint by its name in lower case."""
        return {name: CheckpointRecord.decode(text) for name, text in self._names(_CHECKPOINTS).items()}

    def checkpoint(self, name: str) -> CheckpointRecord:
        """Return one checkpoint.

        Raises:
            UnknownName: names the nearest.
        """
        known = self.checkpoints()
        if name.lower() not in known:
            raise UnknownName.among("model", name, (record.name for record in known.values()))
        return known[name.lower()]

    def download_blob(self, sha256: str, path: Path, on_progress: Callable[[], None] = lambda: None) -> None:
        """Fetch a file of a checkpoint."""
        self._store.download(blob_key(sha256), path, on_progress)

    def reindex(self) -> None:
        """Rebuild the index in Redis from the names in S3."""
        for index, folder in ((_EMBEDDINGS, "embeddings"), (_CHECKPOINTS, "checkpoints")):
            for key in self._store.keys(f"{folder}/names/"):
                text = self._store.get(key).decode()
                record = (EmbeddingRecord if folder == "embeddings" else CheckpointRecord).decode(text)
                with translated():
                    self._redis.hset(index, record.name.lower(), text)

    def _put_name(self, index: str, folder: str, name: str, text: str) -> None:
        key = f"{folder}/names/{quote(name.lower(), safe='')}.json"
        self._store.put(key, text.encode(), "application/json")
        with translated():
            self._redis.hset(index, name.lower(), text)

    def _names(self, index: str) -> dict[str, str]:
        with translated():
            return {key.decode(): value.decode() for key, value in self._redis.hgetall(index).items()}
