"""Read an embedding file of any known layout, by content; normalise; name it by its tensors.

Layouts and their names follow A1111 v1.10.1 and the trainers that write them (kohya, diffusers, SDXL).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from latentfarm_shared.embeddings.pickles import (
    MAX_FILE_BYTES,
    Array,
    RefusedPickle,
    read_torch_zip,
    widen_bfloat16,
)
from latentfarm_shared.embeddings.pictures import read_picture
from latentfarm_shared.errors import UnreadableFile
from latentfarm_shared.png import SIGNATURE
from latentfarm_shared.records import EmbeddingRecord

MAX_VECTORS = 512
_ENCODER_OF_WIDTH = {1024: "clip_h", 1280: "clip_g", 4096: "t5"}
_NAMED = ("clip_l", "clip_g", "t5")


@dataclass(frozen=True)
class EmbeddingFile:
    """What a file holds: `tensors` by encoder, each `[vectors, width]` float32."""

    stem: str
    layout: str
    internal_name: str | None
    file_sha256: str
    tensors: dict[str, Array]

    @property
    def widths(self) -> dict[str, int]:
        """Width by encoder."""
        return {encoder: tensor.shape[1] for encoder, tensor in self.tensors.items()}

    @property
    def vectors(self) -> int:
        """How many tokens it stands for."""
        return int(next(iter(self.tensors.values())).shape[0])

    @property
    def content_id(self) -> str:
        """sha256 of the normalised tensors: the same in every container."""
        digest = hashlib.sha256()
        for encoder, tensor in sorted(self.tensors.items()):
            digest.update(f"{encoder} {tensor.shape[0]} {tensor.shape[1]}\n".encode())
            digest.update(np.ascontiguousarray(tensor, "<f4").tobytes())
        return digest.hexdigest()

    def normalised(self) -> bytes:
        """Return the farm's own safetensors: float32, keys by encoder."""
        return save_safetensors(dict(sorted(self.tensors.items())))

    def record(self, name: str | None = None) -> EmbeddingRecord:
        """Describe the file under `name`, by default its stem as in A1111."""
        return EmbeddingRecord(
            name=name or self.stem,
            content_id=self.content_id,
            file_sha256=self.file_sha256,
            vectors=self.vectors,
            widths=self.widths,
            internal_name=self.internal_name,
            layout=self.layout,
        )


def read_embedding(path: Path) -> EmbeddingFile:
    """Read an embedding file.

    Raises:
        UnreadableFile: the file cannot be opened, or is no embedding; says what it is.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableFile(str(path), f"cannot be opened ({error.strerror})") from error
    return parse_embedding(data, path.name)


def parse_embedding(data: bytes, file_name: str) -> EmbeddingFile:
    """Read the bytes of an embedding file; `file_name` gives the name and appears in errors.

    Raises:
        UnreadableFile: not an embedding; says what it is.
    """
    try:
        content = _read_container(data)
        layout, internal, tensors = _read_layout(content)
        checked = {encoder: _check(tensor) for encoder, tensor in tensors.items()}
        if len({tensor.shape[0] for tensor in checked.values()}) > 1:
            raise RefusedPickle("its encoders have different numbers of vectors")
    except RefusedPickle as error:
        raise UnreadableFile(file_name, str(error)) from error
    digest = hashlib.sha256(data).hexdigest()
    return EmbeddingFile(Path(file_name).stem, layout, internal, digest, checked)


def _read_container(data: bytes) -> Any:
    if not data:
        raise RefusedPickle("the file is empty")
    if len(data) > MAX_FILE_BYTES:
        raise RefusedPickle(f"larger than {MAX_FILE_BYTES} bytes, so no embedding")
    start = data[:64].lstrip()
    for prefix, what in (
        (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
        (b"<", "a web page saved in place of the file"),
        (b"{", "JSON, probably an error message saved in place of the file"),
        (b"\xff\xd8", "a picture"),
    ):
        if start.startswith(prefix):
            raise RefusedPickle(what)
    if data.startswith(SIGNATURE):
        return read_picture(data)
    if data[:2] == b"PK":
        return read_torch_zip(data)
    return _read_safetensors(data)


def _read_safetensors(data: bytes) -> dict[str, Array]:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]) if 0 < length <= len(data) - 8 else None
        if not isinstance(header, dict):
            raise RefusedPickle("neither a safetensors file nor a PyTorch zip file")
        if any(isinstance(e, dict) and e.get("dtype") == "BF16" for e in header.values()):
            return _read_bfloat16(data[8 + length :], header)
        return {key: np.asarray(value, dtype=np.float32) for key, value in load_safetensors(data).items()}
    except RefusedPickle:
        raise
    except Exception as error:
        raise RefusedPickle(f"a damaged safetensors file ({type(error).__name__})") from error


def _read_bfloat16(body: bytes, header: dict[str, Any]) -> dict[str, Array]:
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] != "BF16" or not 0 <= begin <= end <= len(body):
            raise RefusedPickle("a safetensors file of mixed or damaged tensors")
        tensors[key] = widen_bfloat16(body[begin:end]).reshape(entry["shape"])
    return tensors


def _read_layout(content: Any) -> tuple[str, str | None, dict[str, Array]]:
    """Tell the layout of a file's content and return (layout, internal name, tensors by encoder)."""
    if not isinstance(content, dict) or not content:
        raise RefusedPickle("it holds no named tensors")
    if "string_to_param" in content:
        terms = content["string_to_param"]
        if not isinstance(terms, dict) or len(terms) != 1:
            raise RefusedPickle("it holds several terms; one is expected")
        name = content.get("name")
        tensor = next(iter(terms.values()))
        return "a1111", name if isinstance(name, str) else None, _by_width(tensor)
    tensors = {key: value for key, value in content.items() if isinstance(value, np.ndarray)}
    named = {key: _rows(value) for key, value in tensors.items() if key in _NAMED}
    if named:
        return ("sdxl" if "clip_g" in named else "clip_l"), None, named
    if set(tensors) >= {"text_encoders_0", "text_encoders_1"}:
        pair = {"clip_l": _rows(tensors["text_encoders_0"]), "clip_g": _rows(tensors["text_encoders_1"])}
        return "pivotal", None, pair
    tensors = {key: value for key, value in tensors.items() if not str(key).endswith("_out")}
    if len(tensors) != 1:
        raise RefusedPickle(f"it holds {len(tensors)} tensors; one, or clip_l and clip_g, are expected")
    key, tensor = next(iter(tensors.items()))
    if key == "emb_params":
        return "kohya", None, _by_width(tensor)
    return "diffusers", str(key), _by_width(tensor)


def _rows(tensor: Any) -> Array:
    if not isinstance(tensor, np.ndarray) or tensor.ndim not in (1, 2):
        raise RefusedPickle("its tensor is not a list of vectors")
    return tensor[None] if tensor.ndim == 1 else tensor


def _by_width(tensor: Any) -> dict[str, Array]:
    rows = _rows(tensor)
    return {_ENCODER_OF_WIDTH.get(rows.shape[1], "clip_l"): rows}


def _check(tensor: Array) -> Array:
    vectors, width = tensor.shape
    if not 1 <= vectors <= MAX_VECTORS or not 1 <= width <= 8192:
        raise RefusedPickle(f"{vectors} vectors of width {width} are not an embedding")
    if not np.isfinite(tensor).all():
        raise RefusedPickle("it holds values that are not finite")
    return np.ascontiguousarray(tensor, np.float32)
