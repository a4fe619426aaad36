"""Fixtures for all floors: reference data, real servers, small records."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from latentfarm.embedded.local import LocalFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.sandbox import Sandbox
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import BlobFile, CheckpointRecord, EmbeddingRecord

# Not a setting of the product, so no process under test may see it.
REFERENCE = Path(os.environ.pop("LATENTFARM_VECTORS", Path(__file__).parents[2] / "shared"))


os.environ["LATENTFARM_CONFIG"] = tempfile.mkdtemp(prefix="latentfarm-config-")  # nobody is logged in


def reference(*parts: str) -> Path:
    """Return a reference file; without it the test skips on a laptop and fails in CI."""
    path = REFERENCE.joinpath(*parts)
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"reference data {'/'.join(parts)} is missing")
        pytest.skip("reference data is not here")
    return path


def vectors(name: str) -> Any:
    """Return one of the reference tables."""
    return json.loads(reference("vectors", "a1111", name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def clip_tokenizer() -> ClipTokenizer:
    return ClipTokenizer(reference("clip_tokenizer", "vocab.json"), reference("clip_tokenizer", "merges.txt"))


@pytest.fixture(scope="session")
def demo_tokenizer() -> ClipTokenizer:
    return ClipTokenizer(CHECKPOINT / "tokenizer" / "vocab.json", CHECKPOINT / "tokenizer" / "merges.txt")


settings.register_profile("soak", max_examples=2000, stateful_step_count=80)
SANDBOX = Sandbox()


def parse_embedding(data: bytes, file_name: str) -> EmbeddingFile:
    """Read the bytes of an embedding file as the farm reads files."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        (found,) = SANDBOX.read_open(file, file_name, hashlib.sha256(data).hexdigest())
    return found


def embedding(name: str, vectors: int = 2, width: int = 128, encoder: str = "clip_l") -> EmbeddingRecord:
    """Return a record of an embedding that exists in name only."""
    return EmbeddingRecord(
        name=name,
        content_id=f"content-{name}",
        file_sha256="0123456789abcdef" * 4,
        vectors=vectors,
        widths={encoder: width},
        layout="a1111",
    )


def checkpoint(name: str = "demo", width: int = 128) -> CheckpointRecord:
    """Return a record of a checkpoint that exists in name only."""
    return CheckpointRecord(
        name=name,
        family=name,
        widths={"clip_l": width},
        prediction_type="epsilon",
        files=(BlobFile(path="unet/diffusion_pytorch_model.safetensors", sha256="f" * 64, size=1),),
    )


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A farm of real servers and no workers."""
    with LocalFarm(tmp_path_factory.mktemp("servers"), workers=0) as local:
        yield local.farm
