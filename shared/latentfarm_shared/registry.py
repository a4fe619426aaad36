"""Names of checkpoints: files first, then the name, both in S3; an index of names in Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from redis import Redis

from latentfarm_shared.errors import UnknownName
from latentfarm_shared.ledger.ledger import translated
from latentfarm_shared.library import check_name
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.storage import ObjectStore

_CHECKPOINTS = "lf:checkpoints"


def blob_key(sha256: str) -> str:
    """Return where a file of a checkpoint lies."""
    return f"checkpoints/blobs/{sha256}"


class Registry:
    """Reads and writes the farm's checkpoints."""

    def __init__(self, redis: Redis, store: ObjectStore) -> None:
        """Use these two; nothing is sent yet."""
        self._redis: Any = redis  # see Ledger
        self._store = store

    def add_checkpoint(self, record: CheckpointRecord, files: Iterable[tuple[str, Path]] = ()) -> CheckpointRecord:
        """Upload what is missing of a checkpoint's files (sha256, path), then give it its name."""
        check_name(record.name, "checkpoint")
        for sha256, path in files:
            if not self._store.exists(blob_key(sha256)):
                self._store.upload(blob_key(sha256), path)
        key = f"checkpoints/names/{quote(record.name.lower(), safe='')}.json"
        self._store.put(key, record.encode().encode(), "application/json")
        self._index(record)
        return record

    def checkpoints(self) -> dict[str, CheckpointRecord]:
        """Return every checkpoint by its name in lower case."""
        with translated():
            found = self._redis.hgetall(_CHECKPOINTS)
        return {name.decode(): CheckpointRecord.decode(text) for name, text in found.items()}

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

    def read_blob(self, sha256: str, start: int, length: int) -> bytes:
        """Return a part of a file of a checkpoint.

        Raises:
            MissingObject: it is not in the store.
        """
        return self._store.get_part(blob_key(sha256), start, length)

    def reindex(self) -> int:
        """Rebuild the index in Redis from the names in S3; return how many there are."""
        keys = self._store.keys("checkpoints/names/")
        for key in keys:
            record = CheckpointRecord.decode(self._store.get(key))
            self._index(record)
        return len(keys)

    def _index(self, record: CheckpointRecord) -> None:
        with translated():
            self._redis.hset(_CHECKPOINTS, record.name.lower(), record.encode())
