"""Commands that submit and follow jobs."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentfarm.cli.output import Data, Json, connect, describe, progress, show

if TYPE_CHECKING:
    from latentfarm_shared.ledger import JobStatus

    from latentfarm.jobs import Job

app = typer.Typer(no_args_is_help=True)
workers_app = typer.Typer(no_args_is_help=True)

JobId = Annotated[str, typer.Argument(help="The job's id, or its beginning.", show_default=False)]
Timeout = Annotated[float | None, typer.Option(help="Give up waiting after so many seconds.", show_default=False)]


def generate(  # noqa: PLR0917 - typer turns each into an option
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    negative_prompt: Annotated[str, typer.Option("--negative", "-n", help="What not to draw.")] = "",
    embedding: Annotated[
        list[str] | None, typer.Option("--embedding", "-e", help="NAME or NAME:neg; may be repeated.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint.")] = "demo",
    sampler: Annotated[str, typer.Option(help="Sampler, by its A1111 name.")] = "Euler",
    schedule: Annotated[str, typer.Option(help="Noise schedule.")] = "Automatic",
    steps: Annotated[int, typer.Option(help="1 to 150.")] = 20,
    cfg: Annotated[float, typer.Option("--cfg", help="CFG scale, 1 to 30.")] = 7.0,
    seed: Annotated[int, typer.Option(help="Seed of the first image; -1 draws one.")] = -1,
    size: Annotated[str, typer.Option(help="Width x height in pixels, multiples of 8.")] = "128x128",
    clip_skip: Annotated[int, typer.Option(help="1 is none.")] = 1,
    count: Annotated[int, typer.Option("--count", "-c", help="How many images, seeds counting up.")] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the pictures in this folder.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the id and do not wait.")] = False,
    timeout: Timeout = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Render images of one prompt.

    Examples:

        latentfarm generate "masterpiece, corneo_dva" --seed 43 -c 4 -o out

        latentfarm generate "1girl, blue hair" -e 16-token-demo-neg:neg --steps 30
    """
    width, height = _size(size)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    farm = connect(data)
    job = farm.generate(
        prompt,
        negative_prompt=negative_prompt,
        embeddings=embedding or [],
        model=model,
        sampler=sampler,
        schedule=schedule,
        steps=steps,
        cfg_scale=cfg,
        seed=seed,
        width=width,
        height=height,
        clip_skip=clip_skip,
        count=count,
    )
    if detach:
        _print_ids([job], as_json=as_json)
        return
    _follow(job, timeout)
    if output:
        _save(job, output)
    show([image.summary() for image in job.iter_images()], as_json=True) if as_json else typer.echo(job.id)
    _exit_code(job.status())


def submit(
    file: Annotated[Path, typer.Argument(help="One JSON object a line; - reads standard input.", show_default=False)],
    watch: Annotated[bool, typer.Option("--watch", help="Wait for all of them.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Submit every job of a JSONL file; the whole file is checked before anything is queued.

    Example line:

        {"prompt": "masterpiece, corneo_dva", "embeddings": ["16-token-demo-neg:neg"], "seed": 43, "count": 4}
    """
    from latentfarm_shared.errors import UnreadableFile  # noqa: PLC0415
    from latentfarm_shared.specs import read_jsonl  # noqa: PLC0415

    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(str(file), f"cannot be read as UTF-8 text ({error})") from error
    specs = read_jsonl(text)
    submitted = connect(data).submit_all(specs)
    _print_ids(submitted, as_json=as_json)
    if watch:
        for job in submitted:
            _follow(job, None)
        for job in submitted:
            _exit_code(job.status())


@app.command("ls")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List jobs, the newest first."""
    statuses = connect(data).ledger.jobs(limit)
    rows = [describe(status) for status in statuses]
    if not as_json:
        rows = [{k: row[k] for k in ("id", "state", "total", "counts", "prompt")} for row in rows]
    show(rows, as_json=as_json)


@app.command("show")
def show_job(job: JobId, data: Data = None, as_json: Json = False) -> None:
    """Show where a job stands."""
    show([describe(connect(data).job(job).status())], as_json=as_json, single=True)


@app.command("images")
def images(job: JobId, data: Data = None, as_json: Json = False) -> None:
    """List a job's images."""
    rows = [image.summary() for image in connect(data).job(job).iter_images()]
    if not as_json:
        rows = [{k: row[k] for k in ("index", "state", "seed", "s3_url")} for row in rows]
    show(rows, as_json=as_json)


@app.command("watch")
def watch_job(job: JobId, timeout: Timeout = None, data: Data = None, as_json: Json = False) -> None:
    """Follow a job to its end."""
    found = connect(data).job(job)
    _follow(found, timeout)
    if as_json:
        show([describe(found.status())], as_json=True, single=True)
    _exit_code(found.status())


@app.command("download")
def download(
    job: JobId,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to save in.")] = Path(),
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Save a job's finished pictures; prints the files."""
    files = [str(path) for path in connect(data).job(job).download(output)]
    typer.echo(json.dumps(files, ensure_ascii=False) if as_json else "\n".join(files))


@app.command("cancel")
def cancel(job: JobId, data: Data = None, as_json: Json = False) -> None:
    """Cancel what is not rendered yet."""
    found = connect(data).job(job)
    found.cancel()
    if as_json:
        show([describe(found.status())], as_json=True, single=True)


@workers_app.command("ls")
def list_workers(
    here: Annotated[bool, typer.Option("--here", help="Only this machine's; exit 1 if none is ready.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List the workers that are alive."""
    farm = connect(data)
    names = {record.hash: record.name for record in farm.models.ls()}
    workers = [w for w in farm.workers() if not here or w.host == socket.gethostname()]
    rows = []
    for worker in workers:
        row = worker.model_dump(mode="json")
        row["checkpoints"] = [names.get(checkpoint, checkpoint[:12]) for checkpoint in worker.checkpoints]
        rows.append(row)
    show(rows, as_json=as_json)
    if here and not any(worker.checkpoints for worker in workers):
        raise typer.Exit(1)


def _size(text: str) -> tuple[int, int]:
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    width, cross, height = text.lower().partition("x")
    if not cross or not width.strip().isdecimal() or not height.strip().isdecimal():
        raise InvalidField("size", f"{text!r} should be like 128x128")
    return int(width), int(height)


def _print_ids(jobs: list[Job], *, as_json: bool) -> None:
    if as_json:
        show([describe(job.status()) for job in jobs], as_json=True)
        return
    for job in jobs:
        typer.echo(job.id)


def _follow(job: Job, timeout_s: float | None) -> None:
    with progress(job.status().total) as update:
        job.wait(timeout_s, lambda status: update(status.finished, status.state))


def _save(job: Job, folder: Path) -> None:
    for path in job.download(folder):
        typer.echo(str(path), err=True)


def _exit_code(status: JobStatus) -> None:
    if status.state != "succeeded":
        typer.echo(f"job {status.id} {status.state}: {status.counts['failed']} images failed", err=True)
        raise typer.Exit(1)
