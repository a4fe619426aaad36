"""The farm's embeddings and checkpoints, as users add and list them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from latentfarm_shared.embeddings.files import read_embedding
from latentfarm_shared.errors import Unavailable, UnreadableFile
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

    def __init__(self, registry: Registry, hub_endpoint: str | None = None) -> None:
        """Work on this registry; `hub_endpoint` is another hub than the usual one."""
        self._registry, self._hub_endpoint = registry, hub_endpoint

    def add(self, source: str | Path, name: str | None = None) -> CheckpointRecord:
        """Record a checkpoint: a folder in diffusers layout, or a hub id (`owner/name` or `owner/name@revision`).

        A folder's files are uploaded where the farm lacks them; of a hub's only the small ones.

        Raises:
            UnreadableFile: it is no such checkpoint; says what is missing.
            Unavailable: the hub does not answer.
        """
        folder = Path(source)
        if not folder.exists() and is_hub_id(str(source)):
            record, small = describe_hub(str(source), name, self._hub_endpoint)
            return self._registry.add_checkpoint(record, small)
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


def describe_folder(folder: Path, name: str) -> CheckpointRecord:
    """Describe a diffusers folder without loading any weights.

    Raises:
        UnreadableFile: something is missing or malformed.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = tuple(
        BlobFile(path=relative, sha256=_sha256(path), size=path.stat().st_size)
        for path in paths
        if (relative := path.relative_to(folder).as_posix()).startswith(_USED)
    )
    return describe_files(folder, name, files)


def describe_files(folder: Path, name: str, files: tuple[BlobFile, ...], source: str = "s3") -> CheckpointRecord:
    """Describe a checkpoint whose configuration lies in `folder` and whose files, weights included, are `files`.

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
    for part in ("unet/", "vae/", "text_encoder/"):
        if not any(f.path.startswith(part) and f.path.endswith(".safetensors") for f in files):
            raise UnreadableFile(str(folder), f"has no safetensors weights in {part}")
    return CheckpointRecord(
        name=name,
        family=family_of(widths, name),
        widths=widths,
        prediction_type=prediction,
        source=source,
        files=files,
    )


# ---- hub ids


def is_hub_id(source: str) -> bool:
    """Tell whether a text has the form of a hub id, `owner/name` or `owner/name@revision`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None and not source.startswith((".", "/"))


def describe_hub(
    source: str, name: str | None, endpoint: str | None = None
) -> tuple[CheckpointRecord, list[tuple[str, Path]]]:
    """Describe a hub's checkpoint at its present commit; return the record and its small files as (sha256, path).

    Weights are not downloaded: the hub tells their hashes.

    Raises:
        UnreadableFile: it is no such checkpoint, or is not there.
        Unavailable: the hub does not answer.
    """
    from huggingface_hub import HfApi, hf_hub_download  # noqa: PLC0415 - slow to import and seldom needed
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError  # noqa: PLC0415

    repository, _, revision = source.partition("@")
    try:
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision or None, files_metadata=True)
        files: list[BlobFile] = []
        small: list[tuple[str, Path]] = []
        folder = Path()
        for item in info.siblings or []:
            if not _is_wanted(item.rfilename):
                continue
            if item.lfs is not None:
                files.append(BlobFile(path=item.rfilename, sha256=item.lfs.sha256, size=item.lfs.size))
                continue
            path = Path(hf_hub_download(repository, item.rfilename, revision=info.sha, endpoint=endpoint))
            folder = path.parents[item.rfilename.count("/")]
            files.append(BlobFile(path=item.rfilename, sha256=_sha256(path), size=path.stat().st_size))
            small.append((files[-1].sha256, path))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UnreadableFile(source, "is neither a folder here nor a checkpoint the hub shows us") from error
    except Exception as error:  # noqa: BLE001 - which HTTP library the hub's client uses changes with its version
        if not isinstance(error, HfHubHTTPError | OSError) and not type(error).__module__.startswith("httpx"):
            raise
        raise Unavailable("hub", f"no answer ({type(error).__name__})", "try again, or give a folder") from error
    named = name or repository.rpartition("/")[2]
    record = describe_files(folder, named, tuple(files), f"hub:{repository}@{info.sha}")
    return record, small


def _is_wanted(path: str) -> bool:
    """Tell whether a file of a hub's checkpoint is one we use: configuration, tokenizer, full-precision weights."""
    if not path.startswith(_USED):
        return False
    return path.endswith((".json", ".txt")) or (path.endswith(".safetensors") and path.count(".") == 1)


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
