"""The words of a vocabulary nearest to an embedding's vectors, read from the checkpoint's files without loading it."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import numpy as np
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.pickles import Array, widen_bfloat16
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.registry import Registry
from latentfarm_shared.storage import MissingObject

TABLE = "token_embedding.weight"
_FORMATS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


def nearest_words(
    file: EmbeddingFile, checkpoint: CheckpointRecord, registry: Registry, tokenizer: ClipTokenizer, count: int
) -> list[list[str]]:
    """Return for each vector the `count` words whose input embeddings have the highest cosine with it.

    Of several encoders the first is asked. Nothing is returned if the weights lie at a hub, not in the store.
    """
    weights = [f for f in checkpoint.files if f.path.startswith("text_encoder/") and f.path.endswith(".safetensors")]
    weights = weights or [f for f in checkpoint.files if f.path.endswith(".safetensors")]
    encoder = next(iter(checkpoint.widths))
    try:
        table = _word_table(registry, weights[0].sha256, checkpoint.widths[encoder])
    except (MissingObject, IndexError):
        return []
    rows = file.tensors[encoder]
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    best = np.argsort(-(unit @ table.T), axis=1)[:, :count]
    return [[tokenizer.word(int(token)) for token in row] for row in best]


@lru_cache(maxsize=2)
def _word_table(registry: Registry, sha256: str, width: int) -> Array:
    """Return the vocabulary's input embeddings, `[tokens, width]`, each of length 1; only they are fetched.

    Raises:
        MissingObject: the file is not in the store.
        IndexError: it holds no such table.
    """
    length = int.from_bytes(registry.read_blob(sha256, 0, 8), "little")
    header = json.loads(registry.read_blob(sha256, 8, length))
    tables = [entry for key, entry in header.items() if key.endswith(TABLE) and entry["shape"][1:] == [width]]
    entry = tables[0]
    begin, end = entry["data_offsets"]
    data = registry.read_blob(sha256, 8 + length + begin, end - begin)
    flat = widen_bfloat16(data) if entry["dtype"] == "BF16" else np.frombuffer(data, _FORMATS[entry["dtype"]])
    table = flat.astype(np.float32).reshape(math.prod(entry["shape"]) // width, width)
    unit: Array = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return unit
