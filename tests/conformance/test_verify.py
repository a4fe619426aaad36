"""A1111's pictures by numbers: the committed subset always, the full set where it is at hand."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REFERENCE

HERE = Path(__file__).parent
SUBSET = HERE / "subset"
KINDS = ("encode", "noise", "brownian", "sigmas", "sample", "hires", "job")


def command(cases: Path, embeddings: Path, tokenizer: Path) -> list[str]:
    """Return how the cases are verified; on one thread, as they were made."""
    return [
        "env", "OMP_NUM_THREADS=1", sys.executable, str(SUBSET / "verify.py"), "--adapter", str(HERE / "adapter.py"),
        "--set", str(cases), "--embeddings", str(embeddings), "--tokenizer", str(tokenizer), "--strict", "--quiet",
    ]  # fmt: skip


def write_vocabulary(folder: Path) -> Path:
    """Write CLIP's vocabulary, which follows from its merges: bytes, bytes at a word's end, merges, two marks."""
    merges = gzip.decompress((SUBSET / "merges.txt.gz").read_bytes()).decode("utf-8")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pairs = [line.split(" ") for line in merges.splitlines() if not line.startswith("#version") and " " in line]
    words = symbols + [f"{symbol}</w>" for symbol in symbols] + ["".join(pair) for pair in pairs]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    return folder


def run_cases(cases: Path, embeddings: Path, tokenizer: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run all cases in one process; return what became of those that are required, by kind."""
    report = folder / "report.json"
    done = subprocess.run(
        [*command(cases, embeddings, tokenizer), "--report", str(report)], capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stderr[-4000:]
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for case in json.loads(report.read_text())["cases"]:
        if not case["quirk"]:
            by_kind[case["kind"]].append(case)
    return by_kind


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = write_vocabulary(tmp_path_factory.mktemp("subset"))
    return run_cases(SUBSET / "cases", folder, folder, folder)


@pytest.fixture(scope="module")
def full_set(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    cases = REFERENCE / "vectors" / "conformance" / "public"
    if not cases.is_dir():
        if os.environ.get("CI"):
            pytest.fail("the full set of cases is missing")
        pytest.skip("the full set of cases is not here; LATENTFARM_VECTORS says where it is")
    folder = tmp_path_factory.mktemp("full")
    return run_cases(cases, REFERENCE / "embeddings", REFERENCE / "clip_tokenizer", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_committed_subset_passes(subset: dict[str, list[dict[str, Any]]], kind: str) -> None:
    assert subset[kind]
    assert [case for case in subset[kind] if case["status"] != "pass"] == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_full_set_passes(full_set: dict[str, list[dict[str, Any]]], kind: str) -> None:
    assert full_set[kind]
    assert [case for case in full_set[kind] if case["status"] != "pass"] == []
