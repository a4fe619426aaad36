"""The layouts of embedding files, told by their keys: which encoder each tensor is for, and what the file calls itself.

Layouts and their names follow A1111 v1.10.1 and the trainers that write them: kohya, diffusers, Replicate, OneTrainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from latentfarm_shared.embeddings.containers import BUNDLE
from latentfarm_shared.embeddings.pickles import Array
from latentfarm_shared.embeddings.refusals import Caps, Refusal

_ENCODER_OF_WIDTH = {1024: "clip_h", 1280: "clip_g", 4096: "t5"}
_NAMED = {"clip_l": "clip_l", "clip_g": "clip_g", "clip_h": "clip_h", "t5": "t5", "t5xxl": "t5", "llama": "llama"}


@dataclass(frozen=True)
class Found:
    """One embedding of a file: `tensors` by encoder, each `[vectors, width]` float32.

    `internal_name` is what the file calls it; `own_name` whether that, not the file's stem, is what users know it by.
    """

    layout: str
    tensors: dict[str, Array]
    internal_name: str | None = None
    own_name: bool = False
    needs_name: bool = False


def read_layout(content: Any, caps: Caps) -> list[Found]:
    """Return every embedding in a file's content; more than one only where a LoRA bundles them.

    Raises:
        Refusal: no known layout, or tensors that are no embedding's.
    """
    found = _recognise(content)
    for item in found:
        if len({tensor.shape[0] for tensor in item.tensors.values()}) > 1:
            raise Refusal("BAD_SHAPE", "its encoders have different numbers of vectors")
        for tensor in item.tensors.values():
            _check(tensor, caps)
    return found


def _recognise(content: Any) -> list[Found]:
    if isinstance(content, np.ndarray):
        return [Found("bare tensor", _by_width(content), needs_name=True)]
    if isinstance(content, list):
        return [_rows_of_dicts(content)]
    if not isinstance(content, dict):
        raise Refusal("NOT_AN_EMBEDDING", "it holds no tensors")
    if "string_to_param" in content:
        return [_a1111(content)]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, np.ndarray)}
    if not tensors:
        raise Refusal("EMPTY", "it holds no tensors")
    bundled = {key.removeprefix(BUNDLE): value for key, value in tensors.items() if key.startswith(BUNDLE)}
    if bundled:
        return _bundled(bundled)
    return [_dictionary(tensors)]


def _a1111(content: dict[Any, Any]) -> Found:
    terms = content["string_to_param"]
    if not isinstance(terms, dict) or not terms:
        raise Refusal("EMPTY", "its list of vectors is empty")
    if len(terms) > 1:
        raise Refusal("SEVERAL_TERMS", f"it holds {len(terms)} terms; one is expected")
    name = content.get("name")
    return Found("a1111", _by_width(next(iter(terms.values()))), name if isinstance(name, str) and name else None)


def _rows_of_dicts(rows: list[Any]) -> Found:
    """Read oss-roettger's XL layout: a list of dictionaries, one a vector, with a row for each encoder."""
    if not rows:
        raise Refusal("EMPTY", "its list of vectors is empty")
    if not all(isinstance(row, dict) and row and row.keys() == rows[0].keys() for row in rows):
        raise Refusal("NOT_AN_EMBEDDING", "it holds a list of something else than vectors by encoder")
    tensors: dict[str, Array] = {}
    for key in rows[0]:
        parts = [_rows(row[key]) for row in rows]
        if len({part.shape[1] for part in parts}) > 1:
            raise Refusal("BAD_SHAPE", "its vectors have different widths")
        tensors |= _by_width(np.concatenate(parts))
    if len(tensors) != len(rows[0]):
        raise Refusal("BAD_SHAPE", "two of its tensors are for the same encoder")
    return Found("list of vectors", tensors)


def _bundled(tensors: dict[str, Array]) -> list[Found]:
    names: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors.items():
        name, dot, rest = key.rpartition(".string_to_param.")
        if dot:
            names.setdefault(name, {}).update(_by_width(tensor))
            continue
        name, dot, rest = key.rpartition(".")
        if not dot or rest not in _NAMED:
            raise Refusal("NOT_AN_EMBEDDING", f"a LoRA with an unknown part {key[:80]!r}")
        names.setdefault(name, {})[_NAMED[rest]] = _rows(tensor)
    return [Found("bundled", found, name, own_name=True) for name, found in names.items()]


def _dictionary(tensors: dict[str, Array]) -> Found:
    inputs = {key: value for key, value in tensors.items() if not key.endswith("_out")}
    trained_outputs = len(inputs) < len(tensors)
    named = {_NAMED[key]: _rows(value) for key, value in inputs.items() if key in _NAMED}
    if named:
        layout = "onetrainer" if trained_outputs else "sdxl" if {"clip_l", "clip_g"} <= named.keys() else "by encoder"
        return Found(layout, named)
    if inputs.keys() >= {"text_encoders_0", "text_encoders_1"}:
        pair = {"clip_l": _rows(inputs["text_encoders_0"]), "clip_g": _rows(inputs["text_encoders_1"])}
        return Found("pivotal", pair)
    if inputs.keys() == {"text_encoders_0"}:
        return Found("pivotal", _by_width(inputs["text_encoders_0"]))
    if inputs.keys() == {"emb", "emb2"}:
        return _rows_of_dicts([inputs])
    if len(inputs) != 1:
        raise Refusal("NOT_AN_EMBEDDING", f"it holds {len(inputs)} tensors; one, or clip_l and clip_g, are expected")
    key, tensor = next(iter(inputs.items()))
    if key == "emb_params":
        return Found("onetrainer" if trained_outputs else "kohya", _by_width(tensor))
    return Found("diffusers", _by_width(tensor), key)


def _rows(tensor: Any) -> Array:
    if not isinstance(tensor, np.ndarray) or tensor.ndim not in (1, 2):
        raise Refusal("BAD_SHAPE", "its tensor is not a list of vectors")
    return tensor[None] if tensor.ndim == 1 else tensor


def _by_width(tensor: Any) -> dict[str, Array]:
    rows = _rows(tensor)
    return {_ENCODER_OF_WIDTH.get(rows.shape[1], "clip_l"): rows}


def _check(tensor: Array, caps: Caps) -> None:
    vectors, width = tensor.shape
    if not 1 <= vectors <= caps.vectors or not 1 <= width <= caps.width:
        raise Refusal("BAD_SHAPE", f"{vectors} vectors of width {width}; 1 to {caps.vectors} vectors are an embedding")
    if not np.isfinite(tensor).all():
        raise Refusal("NOT_FINITE", "it holds values that are not finite (NaN or infinity)")
