"""A1111's image embeddings: a PNG whose `sd-ti-embedding` text holds the dictionary of a `.pt` file."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from latentfarm_shared.embeddings.pickles import RefusedPickle
from latentfarm_shared.png import png_texts

KEYWORD = "sd-ti-embedding"


def read_picture(data: bytes) -> dict[str, Any]:
    """Return what an image embedding holds.

    Raises:
        RefusedPickle: an ordinary picture, or a damaged one.
    """
    text = next((value for key, value in png_texts(data) if key == KEYWORD), None)
    if text is None:
        raise RefusedPickle("a picture that holds no embedding")
    try:
        content = json.loads(base64.b64decode(text), object_hook=_tensor)
    except (ValueError, RecursionError) as error:
        raise RefusedPickle("a picture whose embedding is damaged") from error
    if not isinstance(content, dict):
        raise RefusedPickle("a picture whose embedding is damaged")
    return content


def _tensor(item: dict[str, Any]) -> Any:
    return np.asarray(item["TORCHTENSOR"], dtype=np.float32) if "TORCHTENSOR" in item else item
