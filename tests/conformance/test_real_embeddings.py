"""Real embedding files: taken or refused as their manifest says, with the tensors that torch and safetensors give, and
encoded with all their vectors by a text encoder of their family.
"""

import csv
import hashlib
import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.sandbox import NotAnEmbedding
from latentfarm_shared.prompts.chunks import chunk_prompt
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.renderer import EmbeddingShelf
from latentfarm_worker.text import EncoderTraits, TextEncoder
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from tests.conftest import REFERENCE, SANDBOX, reference

FOLDER = REFERENCE / "embeddings"
VOCABULARY = 49408


def rows() -> list[dict[str, str]]:
    """Return the manifest, empty where the reference files are not."""
    path = FOLDER / "MANIFEST.tsv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


TAKEN = [row for row in rows() if row["verdict"] != "refuse"]
REFUSED = [row for row in rows() if row["verdict"] == "refuse"]


def by_name(row: dict[str, str]) -> str:
    return row["file"]


def test_the_files_are_here() -> None:
    reference("embeddings", "MANIFEST.tsv")
    assert (len(TAKEN), len(REFUSED)) > (20, 2)


@cache
def taken(name: str) -> EmbeddingFile:
    (found,) = SANDBOX.read(FOLDER / name)
    return found


@pytest.mark.parametrize("row", REFUSED, ids=by_name)
def test_file_is_refused_with_the_manifests_reason(row: dict[str, str]) -> None:
    with pytest.raises(NotAnEmbedding) as refused:
        SANDBOX.read(FOLDER / row["file"])

    assert refused.value.refusal == row["reason_code"]


@pytest.mark.parametrize("row", TAKEN, ids=by_name)
def test_file_is_what_the_manifest_says(row: dict[str, str]) -> None:
    found = taken(row["file"])

    widths = {name: int(width) for name, width in (pair.split("=") for pair in row["widths"].split(";"))}
    assert found.widths == {{"open_clip_h": "clip_h"}.get(name, name): width for name, width in widths.items()}
    assert (found.family, found.vectors) == (row["family"], int(row["vectors"]))
    assert found.file_sha256 == row["sha256"]
    assert found.record().ti_hash == row["ti_hash_sha256_12"]
    assert found.needs_name == (row["verdict"] == "take-with-name")
    if row["legacy_checksum_4hex"] != "-":
        assert found.legacy_checksum == row["legacy_checksum_4hex"]


def digests(tensors: Iterator[Any]) -> list[str]:
    """Return the sha256 of every tensor's rows as float32, in order of width."""
    found = sorted((np.atleast_2d(np.asarray(tensor.detach().float())) for tensor in tensors), key=lambda t: t.shape[1])
    return [hashlib.sha256(np.ascontiguousarray(rows, "<f4").tobytes()).hexdigest() for rows in found]


def _torch_tensors(content: Any) -> Iterator[torch.Tensor]:
    """Yield what a file's own content has for each encoder, read with torch."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, list):
        for key in content[0]:
            yield torch.stack([row[key] for row in content])
    elif "string_to_param" in content:
        parameters = content["string_to_param"]
        held = vars(parameters)["_parameters"] if isinstance(parameters, torch.nn.Module) else parameters
        yield next(iter(held.values()))
    else:
        yield from (value for value in content.values() if isinstance(value, torch.Tensor))


def _hidden_in(path: Path) -> torch.Tensor:
    """Read A1111's image embedding the way its format is described, with Pillow and torch alone."""
    import base64  # noqa: PLC0415 - for this layout alone
    import json  # noqa: PLC0415

    with Image.open(path) as picture:
        content = json.loads(base64.b64decode(picture.text["sd-ti-embedding"]))  # type: ignore[attr-defined]
    return torch.tensor(content["string_to_param"]["*"]["TORCHTENSOR"])


@pytest.mark.parametrize("row", TAKEN, ids=by_name)
def test_tensors_are_those_torch_and_safetensors_give(row: dict[str, str]) -> None:
    path = FOLDER / row["file"]
    if row["container"] == "png":
        expected = digests(iter([_hidden_in(path)]))
    elif row["container"] == "safetensors":
        expected = digests(iter(load_file(path).values()))
    else:
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            expected = digests(_torch_tensors(torch.load(path, weights_only=True, map_location="cpu")))

    assert digests(torch.from_numpy(tensor.copy()) for tensor in taken(row["file"]).tensors.values()) == expected


def test_pixels_of_an_image_embedding_hold_the_same_as_its_text() -> None:
    path = reference("embeddings", "a1111_test_embedding.png")
    bare = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(bare, "PNG")
    from tests.conftest import parse_embedding  # noqa: PLC0415

    found = parse_embedding(bare.getvalue(), "stripped.png")

    assert found.content_id == taken("a1111_test_embedding.png").content_id
    assert found.internal_name == "rick"


@cache
def text_encoder(width: int) -> CLIPTextModel:
    """Return a CLIP text encoder of a family's width and vocabulary, one layer deep, with random weights."""
    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16
    )
    encoder = CLIPTextModel(config)
    encoder.eval()
    return encoder


@pytest.mark.parametrize("row", [row for row in TAKEN if row["family"] in ("sd1", "sd2", "sdxl")], ids=by_name)
def test_prompt_encodes_with_all_vectors(row: dict[str, str], clip_tokenizer: ClipTokenizer) -> None:
    shelf = EmbeddingShelf()
    record = shelf.put(taken(row["file"]), "tried-1")
    chunks = chunk_prompt("a photo of tried-1, sharp", clip_tokenizer, NameMatcher(clip_tokenizer, [record]))

    for encoder, width in record.widths.items():
        applied = _encoded(shelf.bank, encoder, width, chunks)
        placed = sum(placement.rows for chunk in chunks for placement in chunk.placements)

        assert placed == int(row["vectors"])
        assert any(record.content_id in names for names in applied)


@torch.inference_mode()
def _encoded(bank: EmbeddingBank, encoder: str, width: int, chunks: Any) -> tuple[frozenset[str], ...]:
    return TextEncoder(text_encoder(width), encoder, bank, EncoderTraits()).encode(chunks, 1).applied
