"""The farm's embeddings and checkpoints, as users add and list them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from latentfarm_shared.embeddings.files import read_embedding
from latentfarm_shared.errors import UnreadableFile
from latentfarm_shared.records import BlobFile, CheckpointRecord, EmbeddingRecord, family_of
from latentfarm_shared.registry import Registry

_REQUIRED = (
    "model_index.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
_USED = ("tokenizer/", "text_encoder/", "unet/", "vae/", "scheduler/", "model_index.json")


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

    def __init__(self, registry: Registry) -> None:
        """Work on this registry."""
        self._registry = registry

    def add(self, source: str | Path, name: str | None = None) -> CheckpointRecord:
        """Record a checkpoint in diffusers folder layout and upload what the farm does not have of it.

        Raises:
            UnreadableFile: it is no such folder; says what is missing.
        """
        folder = Path(source)
        record = describe_folder(folder, name or folder.name)
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


def describe_folder(folder: Path, name: str) -> CheckpointRecord:
    """Describe a diffusers folder without loading any weights.

    Raises:
        UnreadableFile: something is missing or malformed.
    """
    for required in _REQUIRED:
        if not (folder / required).is_file():
            raise UnreadableFile(str(folder), f"has no {required}, so it is no diffusers checkpoint")
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise UnreadableFile(str(folder), f"is a {index.get('_class_name')}; StableDiffusionPipeline is supported")
    width = _read_json(folder / "text_encoder/config.json").get("hidden_size")
    if not isinstance(width, int):
        raise UnreadableFile(str(folder / "text_encoder/config.json"), "has no hidden_size")
    prediction = _read_json(folder / "scheduler/scheduler_config.json").get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UnreadableFile(str(folder), f"predicts {prediction}; epsilon and v_prediction are supported")
    widths = {"clip_h" if width == 1024 else "clip_l": width}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = tuple(
        BlobFile(path=relative, sha256=_sha256(path), size=path.stat().st_size)
        for path in paths
        if (relative := path.relative_to(folder).as_posix()).startswith(_USED) and not path.name.startswith(".")
    )
    if not any(f.path.startswith("unet/") and f.path.endswith(".safetensors") for f in files):
        raise UnreadableFile(str(folder), "has no safetensors weights in unet/")
    return CheckpointRecord(
        name=name, family=family_of(widths, name), widths=widths, prediction_type=prediction, files=files
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableFile(str(path), f"cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UnreadableFile(str(path), "is not a JSON object")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
