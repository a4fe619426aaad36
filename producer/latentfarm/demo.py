"""`latentfarm demo`: a farm of one worker, one comparison with and without embeddings, pictures to look at."""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from latentfarm_shared.ledger import JobStatus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from latentfarm.contact_sheet import contact_sheet
from latentfarm.embedded.local import LocalFarm
from latentfarm.farm import DirectFarm
from latentfarm.jobs import Job

SEED, PER_ROW = 43, 4
SHORT = "masterpiece, high quality"
POSITIVE, NEGATIVE = "corneo_dva", "16-token-demo-neg"
TIMEOUT_S = 300.0


def run_demo(output: Path) -> None:
    """Start a farm, render eight images, four with and four without the embeddings, and leave them in `output`."""
    console = Console(stderr=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="latentfarm-demo-") as data, LocalFarm(Path(data)) as local:
        console.print("starting a farm: Valkey, SeaweedFS, one worker …")
        local.await_workers()
        console.print(f"farm ready after {time.monotonic() - started:.1f} s")
        jobs = _submit(local.farm)
        _follow(jobs, console)
        output.mkdir(parents=True, exist_ok=True)
        rows = [(_heading(job), _save(job, output, name)) for name, job in jobs.items()]
        sheet = contact_sheet("latentfarm demo: one word in place of a long prompt", rows)
        sheet.save(output / "contact-sheet.png")
        for job in jobs.values():
            for image in job.iter_images():
                print(image.s3_url)  # noqa: T201 - data goes to stdout
    console.print(f"pictures and contact-sheet.png are in {output}/ ({time.monotonic() - started:.1f} s)")


def _submit(farm: DirectFarm) -> dict[str, Job]:
    return {
        "without": farm.generate(SHORT, seed=SEED, count=PER_ROW),
        "with": farm.generate(SHORT, seed=SEED, count=PER_ROW, embeddings=[POSITIVE, f"{NEGATIVE}:neg"]),
    }


def _heading(job: Job) -> str:
    spec = job.spec
    return spec.prompt + (f"   |   negative: {spec.negative_prompt}" if spec.negative_prompt else "")


def _follow(jobs: dict[str, Job], console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        for name, job in jobs.items():
            task = bar.add_task(f"{name} embeddings", total=PER_ROW)
            status = job.wait(TIMEOUT_S, partial(_show, bar, task))
            if status.state != "succeeded":
                sys.exit(f"latentfarm: job {job.id} {status.state}")


def _show(bar: Progress, task: TaskID, status: JobStatus) -> None:
    bar.update(task, completed=status.finished)


def _save(job: Job, output: Path, name: str) -> list[tuple[str, bytes]]:
    pictures = []
    for image in job.iter_images():
        png = image.png()
        (output / f"{name}-{image.seed}.png").write_bytes(png)
        pictures.append((f"seed {image.seed}", png))
    return pictures
