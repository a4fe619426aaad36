"""Describe checkpoints of any source without loading their weights: folders, single files, hub ids."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from latentfarm_shared.errors import Unavailable, UnreadableFile
from latentfarm_shared.records import BlobFile, CheckpointRecord, Layout, family_of

_REQUIRED = (
    "model_index.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
_WORD_TABLES = (  # of SD1, SD2 and SDXL in the original layout
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "cond_stage_model.model.token_embedding.weight",
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
)
_USED = (
    "tokenizer/", "tokenizer_2/", "text_encoder/", "text_encoder_2/", "unet/", "vae/", "scheduler/", "model_index.json",
)  # fmt: skip
_PIPELINES = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}


def describe_folder(folder: Path, name: str) -> CheckpointRecord:
    """Describe a diffusers folder without loading any weights.

    Raises:
        UnreadableFile: something is missing or malformed.
    """
    return describe_files(folder, name, _files(folder))


def _files(folder: Path) -> tuple[BlobFile, ...]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return tuple(
        BlobFile(path=relative, sha256=_sha256(path), size=path.stat().st_size)
        for path in paths
        if (relative := path.relative_to(folder).as_posix()).startswith(_USED)
    )


def describe_files(
    folder: Path, name: str, files: tuple[BlobFile, ...], source: str = "s3", layout: Layout = "diffusers"
) -> CheckpointRecord:
    """Describe a checkpoint whose configuration lies in `folder` and whose files, weights included, are `files`.

    Raises:
        UnreadableFile: something is missing or malformed.
    """
    for required in _REQUIRED:
        if not (folder / required).is_file():
            raise UnreadableFile(str(folder), f"has no {required}, so it is no diffusers checkpoint")
    index = _read_json(folder / "model_index.json")
    parts = _PIPELINES.get(str(index.get("_class_name")))
    if parts is None:
        raise UnreadableFile(str(folder), f"is a {index.get('_class_name')}; {' and '.join(_PIPELINES)} are supported")
    widths, layers = _encoders(folder, parts)
    prediction = _read_json(folder / "scheduler/scheduler_config.json").get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UnreadableFile(str(folder), f"predicts {prediction}; epsilon and v_prediction are supported")
    for part in ("unet/", "vae/", *(f"{name}/" for name in parts)) if layout == "diffusers" else ():
        if not any(f.path.startswith(part) and f.path.endswith(".safetensors") for f in files):
            raise UnreadableFile(str(folder), f"has no safetensors weights in {part}")
    return CheckpointRecord(
        name=name,
        layout=layout,
        family=family_of(widths, name),
        widths=widths,
        layers=layers,
        prediction_type=prediction,
        source=source,
        files=files,
    )


def _encoders(folder: Path, parts: tuple[str, ...]) -> tuple[dict[str, int], int]:
    """Return the width of every text encoder by its name, and the layers of the first.

    OpenCLIP's encoders are told by their activation, which is not CLIP's own.
    """
    widths: dict[str, int] = {}
    layers = 0
    for part in parts:
        config = _read_json(folder / part / "config.json")
        width, count = config.get("hidden_size"), config.get("num_hidden_layers")
        if not isinstance(width, int) or not isinstance(count, int):
            raise UnreadableFile(str(folder / part / "config.json"), "has no hidden_size or num_hidden_layers")
        openclip = config.get("hidden_act") == "gelu"
        name = "clip_g" if part == "text_encoder_2" else "clip_h" if openclip and len(parts) == 1 else "clip_l"
        widths[name], layers = width, layers or count
    return widths, layers


# ---- single files


def describe_single_file(path: Path, name: str, config: Path | None) -> CheckpointRecord:
    """Describe a checkpoint of one file in the original layout, by its header alone.

    Raises:
        UnreadableFile: it is no such file, or `config` is missing or of another family.
    """
    shapes = _safetensors_shapes(path)
    table = next((shapes[key] for key in _WORD_TABLES if key in shapes), None)
    if table is None or not any(key.startswith("model.diffusion_model.") for key in shapes):
        raise UnreadableFile(str(path), "is no Stable Diffusion checkpoint in the original layout")
    if config is None:
        raise UnreadableFile(str(path), "needs --config, a diffusers folder of the same family (weights not needed)")
    small = tuple(f for f in _files(config) if not f.path.endswith((".safetensors", ".bin")))
    weights = BlobFile(path=SINGLE_FILE, sha256=_sha256(path), size=path.stat().st_size)
    record = describe_files(config, name, (weights, *small), layout="single_file")
    if next(iter(record.widths.values())) != table[1]:
        raise UnreadableFile(str(config), f"is for width {record.widths}, but {path.name} has width {table[1]}")
    return record


def _safetensors_shapes(path: Path) -> dict[str, list[int]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length < MAX_HEADER_BYTES else None
        return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"} if header else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnreadableFile(str(path), f"is no safetensors file ({type(error).__name__})") from error


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
    except Exception as error:
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
