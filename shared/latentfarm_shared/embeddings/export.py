"""Embeddings as files for other programs: A1111's `.pt`, diffusers' concept, plain safetensors."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
from safetensors.numpy import save as save_safetensors

from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.pickles import Array
from latentfarm_shared.errors import InvalidField

FORMATS = ("safetensors", "a1111", "diffusers")


def exported(file: EmbeddingFile, name: str, form: str) -> tuple[bytes, str]:
    """Return an embedding's bytes in a form, and the extension of the file.

    `safetensors` is kohya's layout for one encoder, A1111's (`clip_l`, `clip_g`) for two.

    Raises:
        InvalidField: the form has no place for several encoders.
    """
    if form == "safetensors" and len(file.tensors) > 1:
        return save_safetensors(dict(sorted(file.tensors.items()))), ".safetensors"
    if len(file.tensors) > 1:
        raise InvalidField(
            "format", f"{form} files hold one encoder, {name!r} has {len(file.tensors)}; use safetensors"
        )
    (tensor,) = file.tensors.values()
    if form == "safetensors":
        return save_safetensors({"emb_params": tensor}), ".safetensors"
    if form == "diffusers":
        return save_safetensors({f"<{name}>": tensor}), ".safetensors"
    return torch_zip(name, tensor), ".pt"


def torch_zip(name: str, tensor: Array) -> bytes:
    """Return A1111's dictionary as `torch.save` would write it (zip, pickle protocol 2), written without torch.

    `tensor: [vectors, width]`, float32.
    """
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for member, data in (
            ("data.pkl", _pickle(name, tensor)),
            ("byteorder", b"little"),
            ("data/0", np.ascontiguousarray(tensor, "<f4").tobytes()),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{member}"), data)
    return target.getvalue()


def _pickle(name: str, tensor: Array) -> bytes:
    """Return the pickle of `{"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "name": name, ...}`."""
    rows, width = tensor.shape
    storage = (
        b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + _int(rows * width) + b"tQ"
    )
    size, stride = _int(rows) + _int(width) + b"\x86", _int(width) + _int(1) + b"\x86"
    hooks = b"ccollections\nOrderedDict\n)R"
    built = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _int(0) + size + stride + b"\x89" + hooks + b"tR"
    items = [
        _text("string_to_token") + b"}" + _text("*") + _int(265) + b"s",
        _text("string_to_param") + b"}" + _text("*") + built + b"s",
        _text("name") + _text(name),
        _text("step") + b"N",
        _text("sd_checkpoint") + b"N",
        _text("sd_checkpoint_name") + b"N",
    ]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)
