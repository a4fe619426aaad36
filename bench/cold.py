"""A cold start: from starting the worker process to its first picture, against importing and loading alone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from latentfarm.embedded.local import LocalFarm
from latentfarm_worker.vitals import Vitals

from bench.pairs import interleaved, ratio
from bench.rivals import job

LOAD = """
import sys
from pathlib import Path
import latentfarm_worker.process
from latentfarm_shared.records import CheckpointRecord
from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.loading import load_checkpoint
from latentfarm_worker.runtime import Runtime
record = CheckpointRecord.decode(Path(sys.argv[1]).read_bytes())
load_checkpoint(record, Path(sys.argv[2]), EmbeddingBank(None), Runtime())
"""


def load_s(record: Path, folder: Path) -> float:
    """Import what a worker imports and load the checkpoint, in a fresh process; return the seconds it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOAD, str(record), str(folder)], check=True)
    return time.perf_counter() - began


def first_image_s(local: LocalFarm, data: Path) -> float:
    """Queue one image, start a worker process, and return the seconds until the picture is published."""
    submitted = local.farm.submit(job(steps=1))
    vitals = data / "vitals"
    Vitals(vitals, create=True)
    name = f"cold-{time.monotonic_ns()}"
    began = time.perf_counter()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "latentfarm_worker.process", "--name", name, "--vitals", str(vitals),
            "--data", str(data),
        ],
        stdin=subprocess.PIPE,
    )  # fmt: skip
    try:
        while submitted.status().state != "succeeded":
            local.farm.ledger.beat(name, {"pid": process.pid, "slots": 8})
            time.sleep(0.02)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def measure() -> dict[str, Any]:
    """Return the ratio of both."""
    from latentfarm_demo import CHECKPOINT  # noqa: PLC0415 - the only one that needs it

    with tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as folder:
        data = Path(folder)
        with LocalFarm(data, workers=0) as local:
            record = data / "record.json"
            record.write_text(local.farm.models.ls()[0].encode())
            found = interleaved(
                {
                    "worker to first image": lambda: first_image_s(local, data),
                    "imports and load": lambda: load_s(record, CHECKPOINT),
                }
            )
    return {
        "seconds": {name: [round(value, 2) for value in values] for name, values in found.items()},
        "first image over imports and load, at most 1.1": ratio(
            found["worker to first image"], found["imports and load"]
        ).row(),
    }
