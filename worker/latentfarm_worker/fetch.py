"""Bring a checkpoint's files to this machine by hash, verify them, and lay them out as a folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from latentfarm_shared.errors import UnreadableFile
from latentfarm_shared.records import BlobFile, CheckpointRecord
from latentfarm_shared.registry import Registry
from latentfarm_shared.storage import MissingObject


def fetch_checkpoint(
    record: CheckpointRecord,
    registry: Registry,
    cache: Path,
    hub_endpoint: str | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> Path:
    """Return a folder with the checkpoint's files, fetching what is missing from the store or the record's hub.

    Files are kept by hash, so checkpoints that share a file share its copy; two workers on a machine wait for each
    other instead of fetching twice. `on_progress` is called now and then while bytes arrive.

    Raises:
        UnreadableFile: a fetched file is not what the record says.
    """
    folder = cache / "checkpoints" / record.hash
    source = _Source(record.source, registry, hub_endpoint, on_progress)
    for file in record.files:
        target = folder / file.path
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UnreadableFile(file.path, "points outside the checkpoint's folder")
        if not target.exists():
            blob = _fetch_blob(file, source, cache / "blobs")
            target.parent.mkdir(parents=True, exist_ok=True)
            link = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
            os.link(blob, link)
            os.replace(link, target)
    return folder


@dataclass(frozen=True)
class _Source:
    """Where a checkpoint's files come from."""

    name: str
    registry: Registry
    hub_endpoint: str | None
    on_progress: Callable[[], None]

    def download(self, file: BlobFile, path: Path) -> None:
        """Bring one file, from the store or else from the hub at its commit."""
        try:
            self.registry.download_blob(file.sha256, path, self.on_progress)
        except MissingObject:
            repository, at, commit = self.name.removeprefix("hub:").partition("@")
            if not at:
                raise
            found = hf_hub_download(repository, file.path, revision=commit, endpoint=self.hub_endpoint)
            shutil.copyfile(found, path)


def _fetch_blob(file: BlobFile, source: _Source, blobs: Path) -> Path:
    path, partial = blobs / file.sha256, blobs / f"{file.sha256}.partial"
    blobs.mkdir(parents=True, exist_ok=True)
    with (blobs / f"{file.sha256}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        try:
            source.download(file, partial)
            found = _sha256(partial)
            if found != file.sha256:
                raise UnreadableFile(file.path, f"its sha256 is {found[:12]}…, the record says {file.sha256[:12]}…")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
