"""Bring a checkpoint's files to this machine by hash, verify them, and lay them out as a folder."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path

from huggingface_hub import hf_hub_download
from latentfarm_shared.errors import UnreadableFile
from latentfarm_shared.records import BlobFile, CheckpointRecord
from latentfarm_shared.registry import Registry
from latentfarm_shared.storage import MissingObject


def fetch_checkpoint(
    record: CheckpointRecord, registry: Registry, cache: Path, hub_endpoint: str | None = None
) -> Path:
    """Return a folder with the checkpoint's files, fetching what is missing from the store or the record's hub.

    Files are kept by hash, so checkpoints that share a file share its copy, and two workers may fetch at once.

    Raises:
        UnreadableFile: a fetched file is not what the record says.
    """
    folder = cache / "checkpoints" / record.hash
    for file in record.files:
        target = folder / file.path
        if target.exists():
            continue
        blob = _fetch_blob(file, record, registry, cache, hub_endpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        link = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        os.link(blob, link)
        os.replace(link, target)
    return folder


def _fetch_blob(
    file: BlobFile, record: CheckpointRecord, registry: Registry, cache: Path, hub_endpoint: str | None
) -> Path:
    path = cache / "blobs" / file.sha256
    if path.exists():
        return path
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        _download(file, record, registry, partial, hub_endpoint)
        found = _sha256(partial)
        if found != file.sha256:
            raise UnreadableFile(file.path, f"its sha256 is {found[:12]}…, the record says {file.sha256[:12]}…")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _download(
    file: BlobFile, record: CheckpointRecord, registry: Registry, path: Path, hub_endpoint: str | None
) -> None:
    try:
        registry.download_blob(file.sha256, path)
    except MissingObject:
        repository, at, commit = record.source.removeprefix("hub:").partition("@")
        if not at:
            raise
        found = hf_hub_download(repository, file.path, revision=commit, endpoint=hub_endpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
