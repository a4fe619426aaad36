"""Commands that submit and follow jobs."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentfarm.cli.completion import (
    complete_embedding,
    complete_job,
    complete_model,
    complete_sampler,
    complete_schedule,
)
from latentfarm.cli.output import Json, describe, show
from latentfarm.cli.reach import Data, reach

if TYPE_CHECKING:
    from latentfarm_shared.infotext import Infotext
    from latentfarm_shared.ledger import JobStatus

    from latentfarm.client.sync import Job
    from latentfarm.jobs import Job as DirectJob
    from latentfarm.planning import Plan

    AnyJob = Job | DirectJob

app = typer.Typer(no_args_is_help=True)

JobId = Annotated[
    str, typer.Argument(help="The job's id, or its beginning.", show_default=False, autocompletion=complete_job)
]
State = Literal["queued", "running", "paused", "succeeded", "failed", "canceled", "expired"]
THUMBNAILS, WATCHED, FOLLOW_S = 4, 10, 2.0
Timeout = Annotated[float | None, typer.Option(help="Give up waiting after so many seconds.", show_default=False)]


def generate(  # noqa: PLR0917 - typer turns each into an option
    prompt: Annotated[str | None, typer.Argument(help="What to draw.", show_default=False)] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative", "-n", help="What not to draw.")] = None,
    embedding: Annotated[
        list[str] | None,
        typer.Option("--embedding", "-e", help="NAME or NAME:neg; may be repeated.", autocompletion=complete_embedding),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="Take everything not given from this picture's parameters.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Checkpoint; demo.", autocompletion=complete_model)
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Sampler, by its A1111 name; Euler.", autocompletion=complete_sampler)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Noise schedule; Automatic.", autocompletion=complete_schedule)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="1 to 150; 20.")] = None,
    cfg: Annotated[float | None, typer.Option("--cfg", help="CFG scale, 0 to 30; 7.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first image; -1, the default, draws one.")] = None,
    size: Annotated[str | None, typer.Option(help="Width x height in pixels, multiples of 8; 128x128.")] = None,
    clip_skip: Annotated[int | None, typer.Option(help="1 is none.")] = None,
    rng: Annotated[str | None, typer.Option(help="CPU, or NV for the noise of an NVIDIA GPU.")] = None,
    variation: Annotated[
        str | None, typer.Option(help="STRENGTH or STRENGTH:SEED, strength 0 to 1: mix in another seed's noise.")
    ] = None,
    hires: Annotated[float | None, typer.Option(help="Hires fix: enlarge so many times and render again.")] = None,
    hires_upscaler: Annotated[str | None, typer.Option(help="Latent, Lanczos … or an upscaler model.")] = None,
    hires_steps: Annotated[int | None, typer.Option(help="As many as the first pass, if not given.")] = None,
    denoising: Annotated[float | None, typer.Option(help="Denoising strength of the hires pass; 0.7.")] = None,
    emphasis: Annotated[str | None, typer.Option(help="Original, No norm, Ignore or None.")] = None,
    tiling: Annotated[bool | None, typer.Option("--tiling/--no-tiling", help="Make pictures that tile.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Sampler setting as NAME=VALUE, such as eta=0.5; may be repeated.")
    ] = None,
    on_missing: Annotated[
        str | None, typer.Option("--on-missing", help="Embeddings that are not there: fail, warn or drop; fail.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-c", help="How many images, seeds counting up.")] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the pictures in this folder.")] = None,
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails/--no-thumbnails", help="Show the first pictures here, if the terminal can.")
    ] = True,
    detach: Annotated[bool, typer.Option("--detach", help="Print the id and do not wait.")] = False,
    timeout: Timeout = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Render images of one prompt, or of a picture made before.

    Examples:

        latentfarm generate "masterpiece, corneo_dva" --seed 43 -c 4 -o out

        latentfarm generate "1girl, blue hair" -e 16-token-demo-neg:neg --steps 30 --hires 2

        latentfarm generate --from out/picture.png --sampler "DPM++ 2M" -o again
    """
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415
    from latentfarm_shared.names import resolve_sampler  # noqa: PLC0415
    from latentfarm_shared.parameters import EmbeddingUse  # noqa: PLC0415
    from latentfarm_shared.specs import JobSpec  # noqa: PLC0415

    given = {
        "prompt": prompt, "negative_prompt": negative_prompt, "model": model, "sampler": sampler, "schedule": schedule,
        "steps": steps, "cfg_scale": cfg, "seed": seed, "clip_skip": clip_skip, "rng": rng, "emphasis": emphasis,
        "tiling": tiling, "on_missing": on_missing, "count": count, "embeddings": [EmbeddingUse.parse(use) for use in embedding or []],
    }  # fmt: skip
    second = {
        "scale": hires, "upscaler": hires_upscaler, "steps": hires_steps, "denoising_strength": denoising,
    }  # fmt: skip
    if source is None and prompt is None:
        raise InvalidField("prompt", "is missing; give one, or a picture with --from")
    values: dict[str, Any] = _from_picture(source) if source else {}
    if sampler is not None and resolve_sampler(sampler)[1]:
        values.pop("schedule", None)  # a legacy name brings its own
    values |= {name: value for name, value in given.items() if value is not None}
    values |= read_size(size) if size else {}
    values |= _variation(variation) if variation else {}
    chosen = {name: value for name, value in second.items() if value is not None}
    if chosen and hires is None and not values.get("hires"):
        raise InvalidField("hires", "is missing; --hires 2 makes the second pass that the other options are for")
    if chosen:
        picture = values.get("hires") or {}
        values["hires"] = picture | ({"width": 0, "height": 0} if hires is not None else {}) | chosen
    values["options"] = (values.get("options") or {}) | _options(option or [])
    spec = JobSpec.check(values)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    job = reach(data).submit(spec)
    if detach:
        _print_ids([job], as_json=as_json)
        return
    for dropped in job.status().dropped:
        typer.echo(f"latentfarm: {dropped.field}: goes on without {dropped.name!r}: {dropped.reason}", err=True)
    _follow(job, timeout)
    if output:
        _save(job, output)
    if thumbnails:
        _show(job)
    show([image.summary() for image in job.iter_images()], as_json=True) if as_json else typer.echo(job.id)
    _exit_code(job.status())


def params(
    file: Annotated[Path, typer.Argument(help="A PNG made here or by A1111.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show the parameters written in a picture; needs no farm.

    Example:

        latentfarm params out/picture.png --json
    """
    found = _read_picture(file)
    if as_json:
        row = {"prompt": found.prompt, "negative_prompt": found.negative_prompt} | found.fields
        typer.echo(json.dumps(row, ensure_ascii=False))
        return
    show(
        [{"Prompt": found.prompt, "Negative prompt": found.negative_prompt} | found.fields], as_json=False, single=True
    )


def _read_picture(path: Path) -> Infotext:
    from latentfarm_shared.errors import UnreadableFile  # noqa: PLC0415
    from latentfarm_shared.infotext import read_png  # noqa: PLC0415

    found = read_png(path.read_bytes())
    if found is None:
        raise UnreadableFile(str(path), "is no PNG with parameters in it")
    return found


def _from_picture(path: Path) -> dict[str, Any]:
    from latentfarm_shared.infotext import spec_values, unread_keys  # noqa: PLC0415

    found = _read_picture(path)
    for key in unread_keys(found):
        typer.echo(f"latentfarm: the picture was made with {key}, which this farm does not do", err=True)
    return spec_values(found)


def _variation(text: str) -> dict[str, str]:
    strength, colon, seed = text.partition(":")
    return {"variation_strength": strength} | ({"variation_seed": seed} if colon else {})


def _options(pairs: list[str]) -> dict[str, str]:
    """Read NAME=VALUE settings of samplers."""
    from latentfarm_shared.errors import InvalidField, nearest  # noqa: PLC0415
    from latentfarm_shared.parameters import SamplingOptions  # noqa: PLC0415

    options = {}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or name not in SamplingOptions.model_fields:
            near = nearest(name, SamplingOptions.model_fields)
            hint = f"; did you mean {near[0]}?" if near else f": one of {', '.join(SamplingOptions.model_fields)}"
            raise InvalidField("set", f"{pair!r} should be NAME=VALUE with the name of a setting{hint}")
        options[name] = value
    return options


def submit(
    file: Annotated[
        Path, typer.Argument(help="A sweep or table; - reads JSONL from standard input.", show_default=False)
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Wait for all of them.")] = False,
    anew: Annotated[bool, typer.Option("--new", help="Make new jobs even if this file was submitted before.")] = False,
    lane: Annotated[str, typer.Option(help="interactive or batch, where the file does not say.")] = "batch",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Checkpoint, where the file does not say.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Submit a sweep (YAML, JSON) or a table (JSONL, CSV); all of it is checked before anything is queued.

    The same file again resumes its job: what is there is kept, what failed or was canceled is rendered.

    Examples:

        latentfarm submit sweep.yaml

        latentfarm submit prompts.jsonl --watch

    A line of JSONL:

        {"prompt": "masterpiece, corneo_dva", "embeddings": ["16-token-demo-neg:neg"], "seed": 43, "count": 4}
    """
    defaults = {"lane": lane} | ({"model": model} if model else {})
    submitted = reach(data).submit_file(file, anew=anew, defaults=defaults)
    _print_ids(submitted, as_json=as_json)
    if watch:
        _follow_all(submitted, None)
        _exit_code(*(job.status() for job in submitted))


@app.command("ls")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    state: Annotated[State | None, typer.Option(help="Only those in this state.", show_default=False)] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List jobs, the newest first."""
    statuses = reach(data).statuses(limit, state)
    rows = [describe(status) for status in statuses]
    if not as_json:
        rows = [{k: row[k] for k in ("id", "state", "total", "counts", "prompt")} for row in rows]
    show(rows, as_json=as_json)


@app.command("show")
def show_job(job: JobId, data: Data = None, as_json: Json = False) -> None:
    """Show where a job stands."""
    show([describe(reach(data).job(job).status())], as_json=as_json, single=True)


@app.command("images")
def images(
    job: JobId,
    thumbnails: Annotated[bool, typer.Option("--thumbnails", help="Show the pictures, if the terminal can.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List a job's images."""
    found = reach(data).job(job)
    rows = [image.summary() for image in found.iter_images()]
    if not as_json:
        rows = [
            {k: row[k] for k in ("index", "state", "seed")} | {"picture": row.get("s3_url") or row.get("url")}
            for row in rows
        ]
    show(rows, as_json=as_json)
    if thumbnails:
        _show(found, most=len(rows))


@app.command("link")
def link(
    job: JobId,
    index: Annotated[int, typer.Argument(min=0, help="Which image of the job, from 0.")] = 0,
    expires_in: Annotated[int, typer.Option("--expires-in", min=1, max=3600, help="Seconds.")] = 300,
    data: Data = None,
) -> None:
    """Print an address of a picture that whoever has it can read for a while."""
    from latentfarm_shared.errors import UnknownName  # noqa: PLC0415

    found = next(iter(reach(data).job(job).iter_images(index, index + 1)), None)
    if found is None:
        raise UnknownName("image", f"{job}/{index}")
    typer.echo(found.link(expires_in))


@app.command("watch")
def watch_jobs(
    job: Annotated[
        list[str] | None,
        typer.Argument(
            help="Ids, or their beginnings; all your recent jobs, if left out.", autocompletion=complete_job
        ),
    ] = None,
    timeout: Timeout = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Follow jobs in a table that moves, to their end; without an id the newest ten, until Ctrl-C.

    Examples:

        latentfarm jobs watch 5f0c1d2e

        latentfarm jobs watch
    """
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    from latentfarm.cli.watching import watch  # noqa: PLC0415 - keeps --help fast

    farm = reach(data)
    if not job:
        if as_json:
            raise InvalidField("json", "needs the ids of jobs, whose end it tells")
        watch(lambda: farm.statuses(WATCHED), is_endless=True, timeout_s=timeout)
        return
    found = [farm.job(name) for name in job]
    if sys.stderr.isatty():
        watch(lambda: [each.status() for each in found], is_endless=False, timeout_s=timeout)
    else:
        _follow_all(found, timeout)
    statuses = [each.status() for each in found]
    if as_json:
        show([describe(status) for status in statuses], as_json=True, single=len(found) == 1)
    _exit_code(*statuses)


def _follow_all(jobs: Sequence[AnyJob], timeout_s: float | None) -> None:
    """Follow jobs one after the other, all within a time."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    for job in jobs:
        _follow(job, None if until is None else max(0.0, until - time.monotonic()))


@app.command("download")
def download(
    job: JobId,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to save in.")] = Path(),
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job is over, or paused.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Save a job's finished pictures, several at a time; prints the files. Again, it goes on where it was.

    Example:

        latentfarm jobs download 5f0c1d2e -o pictures --follow
    """
    from latentfarm.bars import bar  # noqa: PLC0415

    found = reach(data).job(job)
    with bar() as update:
        while True:
            status = found.status()
            files = [str(path) for path in _saved(found, output, partial(update, total=status.total, word="saved"))]
            if not follow or status.is_final or status.state == "paused":
                break
            time.sleep(FOLLOW_S)
    typer.echo(json.dumps(files, ensure_ascii=False) if as_json else "\n".join(files))
    if follow:
        _exit_code(status)


def _saved(job: AnyJob, folder: Path, tell: Callable[[int], None]) -> list[Path]:
    """Save what is finished, telling how many are there."""
    count = itertools.count(1)
    return job.download(folder, lambda _path: tell(next(count)))


@app.command("compare")
def compare(
    job: JobId,
    x: Annotated[
        str, typer.Option("--x", help="What varies across: seed, sampler, cfg_scale, embedding, strength:NAME …")
    ],
    y: Annotated[str | None, typer.Option("--y", help="What varies down.", show_default=False)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Save the grid as this picture.")] = Path(
        "compare.png"
    ),
    thumbnails: Annotated[
        bool, typer.Option("--thumbnails/--no-thumbnails", help="Show it here, if the terminal can.")
    ] = True,
    data: Data = None,
) -> None:
    """Lay a job's pictures out in a grid with labelled axes; prints the file.

    Example:

        latentfarm jobs compare 5f0c1d2e --x cfg_scale --y seed -o grid.png
    """
    from latentfarm.cli.thumbnails import show_thumbnails  # noqa: PLC0415

    sheet = reach(data).job(job).compare(x, y)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)
    if thumbnails:
        show_thumbnails([output.read_bytes()])
    typer.echo(str(output))


@app.command("cancel")
def cancel(job: JobId, data: Data = None, as_json: Json = False) -> None:
    """Cancel what is not rendered yet."""
    found = reach(data).job(job)
    found.cancel()
    if as_json:
        show([describe(found.status())], as_json=True, single=True)


def plan(
    file: Annotated[Path, typer.Argument(help="A sweep or table.", show_default=False)],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Tell what a file would do, without queueing anything: images, embeddings, long prompts, time.

    Example:

        latentfarm plan sweep.yaml
    """
    found = reach(data).plan(file)
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        typer.echo(_plan_text(found))
    if found.missing:
        raise typer.Exit(2)


def _plan_text(found: Plan) -> str:
    """Say a plan in words."""
    time = "no worker has measured this checkpoint yet, so there is no estimate"
    if found.estimate is not None:
        e = found.estimate
        time = (
            f"{e.gpu_seconds:g} GPU-seconds; on {e.workers} workers {e.eta_s:g} s ({e.eta_low_s:g} to {e.eta_high_s:g})"
        )
    some = "" if found.looked_at >= found.images else f" of {found.looked_at} looked at"
    lines = [
        f"images: {found.images} in {found.jobs} jobs; {found.duplicates} duplicates{some}",
        f"prompts over 75 tokens: {found.long_prompts}{some}",
        "embeddings: " + (", ".join(f"{e.name}@{e.version} ({e.vectors} vectors)" for e in found.embeddings) or "none"),
        *(f"missing: {item}" for item in found.missing),
        f"time: {time}",
        *(f"sample: {text}" for text in found.samples),
    ]
    return "\n".join(lines)


@app.command("pause")
def pause(job: JobId, data: Data = None) -> None:
    """Hand out no more images of a job; what is in flight goes on."""
    reach(data).job(job).pause()


@app.command("resume")
def resume(job: JobId, data: Data = None) -> None:
    """Go on with a paused job."""
    reach(data).job(job).resume()


@app.command("approve")
def approve(job: JobId, data: Data = None) -> None:
    """Go on with a job whose first images were to be seen before the rest."""
    reach(data).job(job).approve()


@app.command("retry")
def retry(
    job: JobId,
    missing: Annotated[bool, typer.Option("--missing", help="What was canceled or has expired, too.")] = False,
    data: Data = None,
) -> None:
    """Render again what failed."""
    reach(data).job(job).retry(missing=missing)


@app.command("priority")
def priority(
    job: JobId,
    value: Annotated[int, typer.Argument(help="-100 to 100; your jobs above 0 go first.")],
    data: Data = None,
) -> None:
    """Put a job before or behind your others."""
    reach(data).job(job).prioritise(value)


@app.command("why")
def why(job: JobId, data: Data = None, as_json: Json = False) -> None:
    """Tell why a job's images wait."""
    farm = reach(data)
    rows = [cause.model_dump() for cause in farm.why(farm.job(job).id)]
    if rows or as_json:
        show(rows, as_json=as_json)
    else:
        typer.echo("nothing holds it up")


@app.command("events")
def events(
    job: JobId,
    after: Annotated[int, typer.Option(help="Only what came after this version.")] = 0,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List what happened to a job; of many events the newest thousand."""
    show([event.model_dump() for event in reach(data).job(job).events(after)], as_json=as_json)


@app.command("manifest")
def manifest(
    job: JobId,
    failed: Annotated[bool, typer.Option("--failed", help="What failed, as a table to submit again.")] = False,
    data: Data = None,
) -> None:
    """Print a finished job's manifest, a line of JSON for every image."""
    text = reach(data).job(job).manifest("failed" if failed else "manifest")
    typer.echo(text.decode(), nl=False)


def read_size(text: str) -> dict[str, int]:
    """Read WIDTHxHEIGHT."""
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    width, cross, height = text.lower().partition("x")
    if not cross or not width.strip().isdecimal() or not height.strip().isdecimal():
        raise InvalidField("size", f"{text!r} should be like 128x128")
    return {"width": int(width), "height": int(height)}


def _print_ids(jobs: Sequence[AnyJob], *, as_json: bool) -> None:
    if as_json:
        show([describe(job.status()) for job in jobs], as_json=True)
        return
    for job in jobs:
        typer.echo(job.id)


def _follow(job: AnyJob, timeout_s: float | None) -> None:
    job.wait(timeout_s, progress=True)


def _save(job: AnyJob, folder: Path) -> None:
    for path in job.download(folder):
        typer.echo(str(path), err=True)


def _show(job: AnyJob, most: int = THUMBNAILS) -> None:
    """Show the first pictures in the terminal, if it can."""
    from latentfarm.cli.thumbnails import show_thumbnails, way_of  # noqa: PLC0415

    if way_of(sys.stderr) is not None:
        shown = (image.png() for image in job.iter_images(0, most) if image.state == "succeeded")
        show_thumbnails(shown)


def _exit_code(*statuses: JobStatus) -> None:
    """Say which jobs did not succeed, and end with 1 if there are any."""
    failed = [status for status in statuses if status.state != "succeeded"]
    for status in failed:
        typer.echo(f"job {status.id} {status.state}: {status.counts['failed']} images failed", err=True)
    if failed:
        raise typer.Exit(1)
