"""Bring a checkpoint's files to this machine by hash, verify them, and lay them out as a folder."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from latentfarm_shared.errors import UnreadableFile
from latentfarm_shared.records import BlobFile, CheckpointRecord
from latentfarm_shared.registry import Registry


def fetch_checkpoint(record: CheckpointRecord, registry: Registry, cache: Path) -> Path:
    """Return a folder with the checkpoint's files, fetching what is missing.

    Files are kept by hash, so checkpoints that share a file share its copy, and two workers may fetch at once.

    Raises:
        UnreadableFile: a fetched file is not what the record says.
    """
    folder = cache / "checkpoints" / record.hash
    for file in record.files:
        target = folder / file.path
        if target.exists():
            continue
        blob = _fetch_blob(file, registry, cache)
        target.parent.mkdir(parents=True, exist_ok=True)
        link = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        os.link(blob, link)
        os.replace(link, target)
    return folder


def _fetch_blob(file: BlobFile, registry: Registry, cache: Path) -> Path:
    path = cache / "blobs" / file.sha256
    if path.exists():
        return path
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        registry.download_blob(file.sha256, partial)
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
