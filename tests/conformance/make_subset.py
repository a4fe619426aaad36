"""Cut the committed subset of the conformance cases out of the full set: `python -m tests.conformance.make_subset SHARED`.

It keeps every kind, uses the synthetic embeddings alone, and takes of the large encodings what fits. A case that does
not pass without the real embedding files is left out, for its prompt names one of them.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.conformance.test_verify import SUBSET, command, write_vocabulary

KEEP_BYTES = {"encode": 1_500_000, "hires": 200_000}
MAX_BYTES = 3_000_000


def main(shared: Path) -> None:
    """Write the subset and check its size."""
    full = shared / "vectors" / "conformance" / "public"
    index = json.loads((full / "cases.json").read_text())
    index["embedding_files"] = [item for item in index["embedding_files"] if item["synthetic"]]
    merges = (shared / "clip_tokenizer" / "merges.txt").read_bytes()
    (SUBSET / "merges.txt.gz").write_bytes(gzip.compress(merges, 9, mtime=0))
    passing = _passing(index, full)
    sizes = _sizes(full)
    taken: dict[str, int] = {}
    kept = set()
    for case in sorted(index["cases"], key=lambda case: sizes.get(case["id"], 0)):
        kind, size = case["kind"], sizes.get(case["id"], 0)
        if case["quirk"] or case["id"] not in passing or taken.get(kind, 0) + size > KEEP_BYTES.get(kind, 10**9):
            continue
        taken[kind] = taken.get(kind, 0) + size
        kept.add(case["id"])
    cases = [case for case in index["cases"] if case["id"] in kept]
    _write(SUBSET / "cases", full, index | {"cases": cases})
    size = sum(path.stat().st_size for path in SUBSET.rglob("*") if path.is_file())
    kinds = {kind: sum(case["kind"] == kind for case in cases) for kind in taken}
    print(f"{len(cases)} cases, {kinds}, {size} bytes")  # noqa: T201
    if size > MAX_BYTES:
        sys.exit("too large")


def _passing(index: dict[str, Any], full: Path) -> set[str]:
    """Return the cases that pass with the synthetic embeddings alone."""
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / "cut"
        shutil.copytree(full, cut)
        (cut / "cases.json").chmod(0o644)
        (cut / "cases.json").write_text(json.dumps(index))
        vocabulary = write_vocabulary(Path(folder))
        report = Path(folder) / "report.json"
        subprocess.run([*command(cut, vocabulary, vocabulary), "--report", str(report)], check=False)
        return {case["id"] for case in json.loads(report.read_text())["cases"] if case["status"] == "pass"}


def _sizes(full: Path) -> dict[str, int]:
    """Return how many bytes of arrays each case has, before compression."""
    sizes: dict[str, int] = {}
    for path in full.glob("*.npz"):
        arrays = np.load(path)
        for key in arrays.files:
            name = key.split("/")[0]
            sizes[name] = sizes.get(name, 0) + arrays[key].nbytes
    return sizes


def _write(target: Path, full: Path, index: dict[str, Any]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    (target / "png").mkdir(parents=True)
    (target / "cases.json").write_text(json.dumps(index, separators=(",", ":")))
    ids = {case["id"] for case in index["cases"]}
    for path in sorted(full.glob("*.npz")):
        arrays = np.load(path)
        kept = {key: arrays[key] for key in arrays.files if key.split("/")[0] in ids}
        np.savez_compressed(target / path.name, **kept)
    for case in index["cases"]:
        for name in case["expect"].get("images", ()) if case["kind"] == "job" else ():
            shutil.copyfile(full / "png" / name, target / "png" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
