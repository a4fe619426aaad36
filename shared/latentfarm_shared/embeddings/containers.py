"""What kind of file it is, told by its content alone, and the tensors in it."""

from __future__ import annotations

import json
import math
import os
from typing import Any, BinaryIO

import numpy as np

from latentfarm_shared.embeddings.pickles import Array, read_torch, widen_bfloat16
from latentfarm_shared.embeddings.pictures import is_picture, read_picture
from latentfarm_shared.embeddings.refusals import Caps, Code, Refusal

MAX_HEADER_BYTES = 16 * 2**20
BUNDLE = "bundle_emb."
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bf16"}
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_JUNK: tuple[tuple[bytes, Code, str], ...] = (
    (b"version https://git-lfs", "LFS_POINTER", "a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'"),
    (b"<", "WEB_PAGE", "a web page saved in place of the file"),
    (b"{", "ERROR_MESSAGE", "JSON, probably an error message saved in place of the file"),
)


def read_container(file: BinaryIO, caps: Caps) -> Any:
    """Return what a file holds: plain containers with float32 arrays.

    Of a safetensors file with embeddings bundled in a LoRA only those are read, so its size does not matter.

    Raises:
        Refusal: it is none of the files that hold embeddings; says what it is.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise Refusal("EMPTY", "the file is empty (0 bytes)")
    start = file.read(512)
    header = _safetensors_header(file, start, size)
    if header is not None:
        return _read_safetensors(file, header, size, caps)
    if size > caps.file_bytes:
        raise Refusal("TOO_LARGE", f"{size / 2**20:.0f} MB; embeddings are small, {caps.file_mb} MB at most")
    file.seek(0)
    data = file.read()
    if is_picture(start):
        return read_picture(data, caps)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return read_torch(data, caps)
    raise _junk(data)


def _junk(data: bytes) -> Refusal:
    text = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    for prefix, code, what in _JUNK:
        if text.startswith(prefix):
            return Refusal(code, what)
    if text and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text):
        return Refusal("TEXT", "a text file")
    if b"\xef\xbf\xbd" in data[:4096]:
        return Refusal("CORRUPT", "a file that was damaged when something treated it as text")
    return Refusal("NOT_AN_EMBEDDING", "neither a safetensors nor a PyTorch file")


def _safetensors_header(file: BinaryIO, start: bytes, size: int) -> dict[str, Any] | None:
    """Return a safetensors file's header, None if it has none."""
    length = int.from_bytes(start[:8], "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES) or start[8:9] != b"{":
        return None
    file.seek(8)
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise Refusal("CORRUPT", f"a damaged safetensors file ({type(error).__name__})") from error
    return header if isinstance(header, dict) else None


def _read_safetensors(file: BinaryIO, header: dict[str, Any], size: int, caps: Caps) -> dict[str, Any]:
    metadata = header.pop("__metadata__", None)
    bundled = {key: entry for key, entry in header.items() if key.startswith(BUNDLE)}
    wanted = bundled or header
    if not wanted:
        raise Refusal("EMPTY", "a safetensors file without a tensor")
    if len(header) > caps.tensors and not bundled:
        raise Refusal("NOT_AN_EMBEDDING", f"it holds {len(header)} tensors, so it is no embedding")
    begin = file.tell()
    if not bundled and size > caps.file_bytes:
        raise Refusal("TOO_LARGE", f"{size / 2**20:.0f} MB; embeddings are small, {caps.file_mb} MB at most")
    left = caps.file_bytes
    content: dict[str, Any] = {}
    for key, entry in wanted.items():
        content[key] = _read_entry(file, begin, size, entry, left)
        left -= content[key].nbytes
    return content | ({"__metadata__": metadata} if isinstance(metadata, dict) else {})


def _read_entry(file: BinaryIO, begin: int, size: int, entry: Any, left: int) -> Array:
    try:
        dtype, shape = entry["dtype"], [int(n) for n in entry["shape"]]
        first, last = (int(n) for n in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise Refusal("CORRUPT", "a damaged safetensors file (header)") from error
    if dtype not in _FLOATS:
        raise Refusal("NOT_AN_EMBEDDING", f"a tensor of the number format {str(dtype)[:20]}")
    count = math.prod(shape)
    if len(shape) > 4 or min((*shape, 0)) < 0 or not 0 <= first <= last <= size - begin:
        raise Refusal("BAD_SHAPE", "a tensor whose shape makes no sense")
    if count * _ITEM_BYTES[dtype] != last - first:
        raise Refusal("BAD_SHAPE", "a tensor that claims more values than the file holds")
    if count * 4 > left:
        raise Refusal("TOO_LARGE", f"a tensor of shape {shape} is no embedding")
    file.seek(begin + first)
    data = file.read(last - first)
    flat = widen_bfloat16(data) if dtype == "BF16" else np.frombuffer(data, _FLOATS[dtype])
    with np.errstate(over="ignore"):
        return np.array(flat, dtype=np.float32).reshape(shape)
