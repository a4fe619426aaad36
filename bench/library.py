"""Four workers under load while a hundred embeddings are added and replaced; and how soon idle workers have one."""

from __future__ import annotations

import io
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from latentfarm.embedded.local import LocalFarm
from latentfarm.farm import DirectFarm
from latentfarm.jobs import Job
from latentfarm_shared.infotext import read_png
from safetensors.numpy import save

from bench.rivals import job

WORKERS, CHANGES, NAMES, IDLE_CHANGES = 4, 100, 25, 20
VECTORS, WIDTH = 8, 128
STEPS = 4


def write(folder: Path, name: str, seed: int) -> Path:
    """Write an embedding of random vectors."""
    rows = np.random.default_rng(seed).standard_normal((VECTORS, WIDTH)).astype(np.float32) * np.float32(0.03)
    path = folder / f"{name}.safetensors"
    path.write_bytes(save({"emb_params": rows}))
    return path


def everywhere_s(farm: DirectFarm, content_id: str, began: float) -> float:
    """Wait until every worker has an embedding; return the seconds since `began`."""
    names = [worker.name for worker in farm.workers()]
    while not all(content_id in farm.ledger.residents(name) for name in names):
        if time.perf_counter() - began > 60:
            raise RuntimeError("an embedding does not arrive")
        time.sleep(0.005)
    return time.perf_counter() - began


def has_what_it_pinned(done: Job) -> bool:
    """Tell whether every picture of a job names the hashes that the job was frozen to, and the record says the same."""
    pinned = {record.name: record.ti_hash for record in done.lock.embeddings}
    for image in done.iter_images():
        text = read_png(io.BytesIO(image.png()).getvalue())
        written = dict(
            part.split(": ") for part in (text.fields.get("TI hashes", "") if text else "").split(", ") if part
        )
        recorded = {applied.record.name: applied.record.ti_hash for applied in image.embeddings}
        if not written == recorded == pinned:
            return False
    return True


def keep_busy(farm: DirectFarm, stop: threading.Event, jobs: list[Job]) -> None:
    """Keep batch work waiting, with embeddings that are being replaced meanwhile."""
    while not stop.is_set():
        if sum(worker.claims for worker in farm.workers()) < WORKERS * 4:
            known = [record.name for record in farm.embeddings.ls() if record.name.startswith("bench-")]
            names = ", ".join(known[-2:])
            jobs.append(
                farm.submit(job(prompt=f"masterpiece, {names}", steps=STEPS, count=16, lane="batch", seed=len(jobs)))
            )
        time.sleep(0.2)


def figures(values: list[float]) -> dict[str, float]:
    """Return median and worst in seconds."""
    return {"median": round(statistics.median(values), 3), "worst": round(max(values), 3)}


def measure() -> dict[str, Any]:
    """Return the times from `add` to use and to residency, and whether anything restarted or strayed."""
    with tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as data, LocalFarm(Path(data), WORKERS) as local:
        local.await_workers()
        farm, folder = local.farm, Path(data)
        idle = []
        for number in range(IDLE_CHANGES):
            path = write(folder, f"idle-{number % 5}x", 10_000 + number)
            record = farm.embeddings.add(path)
            idle.append(everywhere_s(farm, record.content_id, time.perf_counter()))
        before = sorted(worker.pid for worker in farm.workers())
        stop, load = threading.Event(), list[Job]()
        busy = threading.Thread(target=keep_busy, args=(DirectFarm(farm.settings), stop, load))
        busy.start()
        adding, first_use, asked = [], [], list[Job]()
        for number in range(CHANGES):
            name = f"bench-{number % NAMES}x"
            path = write(folder, name, number)
            began = time.perf_counter()
            record = farm.embeddings.add(path)
            adding.append(time.perf_counter() - began)
            done = farm.submit(job(prompt=f"masterpiece, {name}", steps=STEPS, seed=number))
            if done.lock.embeddings[0].content_id != record.content_id:
                raise RuntimeError("a job did not get what was just added")
            done.wait(60)
            first_use.append(time.perf_counter() - began)
            asked.append(done)
        stop.set()
        busy.join()
        states = [done.wait(300).state for done in (*load, *asked)]
        return {
            "workers": WORKERS,
            "adds and replaces under load": CHANGES,
            "adding, s": figures(adding),
            "from add to the first picture made with it, s": figures(first_use),
            "idle workers: from add's return to residency on all, s, at most 1": figures(idle),
            "images rendered meanwhile": sum(done.spec.total for done in load),
            "jobs that did not succeed": sum(state != "succeeded" for state in states),
            "jobs whose pictures name other hashes than were pinned": sum(
                not has_what_it_pinned(done) for done in (*load, *asked)
            ),
            "workers restarted": sum(pid not in before for pid in (worker.pid for worker in farm.workers())),
        }
