"""Commands on embeddings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfarm.bars import bar
from latentfarm.cli.output import Json, show
from latentfarm.cli.reach import Data, connect, reach

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from latentfarm_shared.embeddings.files import EmbeddingFile
    from latentfarm_shared.records import EmbeddingRecord
    from latentfarm_shared.sources import Kind

    from latentfarm.client.calls import Added
    from latentfarm.client.sync import Embeddings as FarEmbeddings
    from latentfarm.library import EmbeddingCard, Embeddings, Taken
    from latentfarm.views import EmbeddingAnswer

    Library = Embeddings | FarEmbeddings
    Shown = EmbeddingRecord | EmbeddingAnswer

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The embedding's name, or NAME@VERSION.", show_default=False)]
NewName = Annotated[str | None, typer.Option("--name", help="Name to use instead of the file's.", show_default=False)]
AllowWord = Annotated[bool, typer.Option("--allow-word", help="Let the name be a word that prompts use.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Checkpoint.")]


@app.command()
def inspect(
    files: Annotated[list[Path], typer.Argument(help="Files of any kind.", show_default=False)],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Say what files hold, by their content. Exit code 1 if one is no embedding.

    Needs no farm; with --data it knows the families of that farm's checkpoints too.

    Example:

        latentfarm embeddings inspect EasyNegative.safetensors download.pt --json
    """
    from latentfarm_shared.embeddings.sandbox import NotAnEmbedding, Sandbox  # noqa: PLC0415 - keeps --help fast
    from latentfarm_shared.settings import environment_caps  # noqa: PLC0415

    farm = connect(data) if data else None
    rows: list[dict[str, Any]] = []
    with Sandbox(environment_caps()) as sandbox:
        for path in files:
            try:
                found = sandbox.read(path)
                rows += [_inspected(path, f, farm.embeddings.family(f) if farm else f.family) for f in found]
            except NotAnEmbedding as error:
                rows.append(_not_taken(path, error.refusal, error.reason))
    if not as_json:
        keys = ("file", "ok", "layout", "family", "vectors", "widths", "reason")
        rows = [{key: row[key] for key in keys} for row in rows]
    show(rows, as_json=as_json)
    if not all(row["ok"] for row in rows):
        raise typer.Exit(1)


def _inspected(path: Path, file: EmbeddingFile, family: str) -> dict[str, Any]:
    return {
        "file": str(path),
        "ok": True,
        "reason": None,
        "reason_code": None,
        "layout": file.layout,
        "family": family,
        "vectors": file.vectors,
        "widths": file.widths,
        "internal_name": file.internal_name,
        "stem": file.stem,
        "sha256": file.file_sha256,
        "autov2": file.file_sha256[:10],
        "ti_hash": file.file_sha256[:12],
        "legacy_checksum": file.legacy_checksum,
        "content_id": file.content_id,
        "needs_name": file.needs_name,
    }


def _not_taken(path: Path, code: str, reason: str) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and path.stat().st_size < 2**26 else None
    empty = dict.fromkeys(("layout", "vectors", "internal_name", "legacy_checksum", "content_id"))
    hashes = {"sha256": digest, "autov2": digest and digest[:10], "ti_hash": digest and digest[:12]}
    told = {"file": str(path), "ok": False, "reason": reason, "reason_code": code, "stem": path.stem}
    return told | empty | hashes | {"family": "unknown", "widths": {}, "needs_name": False}


@app.command("add")
def add_embeddings(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, https:// addresses, civitai:VERSION, pages on Civitai.", show_default=False
        ),
    ],
    name: NewName = None,
    allow_word: AllowWord = False,
    kind: Annotated[str | None, typer.Option(help="model or negative; told by the source if not given.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Add embeddings; every worker can use them at once. A name that is taken gets a new version.

    Examples:

        latentfarm embeddings add EasyNegative.safetensors bad-hands-5.pt

        latentfarm embeddings add ./embeddings https://example.com/style.safetensors

        latentfarm embeddings add civitai:9208 --name easyneg
    """
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    if name is not None and len(sources) > 1:
        raise InvalidField("name", "goes with one source only")
    kinds: dict[str | None, Kind | None] = {
        None: None, "model": "Model", "negative": "Negative",
    }  # fmt: skip
    if kind not in kinds:
        raise InvalidField("kind", f"{kind!r} should be model or negative")
    embeddings = reach(data).embeddings
    taken = [t for s in sources for t in embeddings.add_all(s, name, allow_word=allow_word, kind=kinds[kind])]
    _show_taken(embeddings, taken, as_json=as_json)


@app.command("import-a1111")
def import_a1111(
    folder: Annotated[Path, typer.Argument(help="A1111's embeddings folder.", show_default=False)],
    allow_word: AllowWord = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Take over a folder of A1111's, with previews and what `.civitai.info`, `.json` and `.txt` files say.

    Example:

        latentfarm embeddings import-a1111 ~/stable-diffusion-webui/embeddings
    """
    embeddings = connect(data).embeddings
    _show_taken(embeddings, embeddings.import_a1111(folder, allow_word=allow_word), as_json=as_json)


def _show_taken(embeddings: Library, taken: Sequence[Taken | Added], *, as_json: bool) -> None:
    rows = _rows(embeddings, [record for one in taken for record in one.records], as_json=as_json)
    if as_json:
        refused = [{"source": one.source, "error": str(one.error)} for one in taken if one.error]
        typer.echo(json.dumps(rows + refused, ensure_ascii=False))
    elif rows:
        show(rows, as_json=False)
    failed = [one for one in taken if one.error is not None]
    for one in failed:
        typer.echo(f"latentfarm: not taken: {one.error}", err=True)
    if failed:
        raise typer.Exit(failed[0].error.exit_code if failed[0].error else 2)


@app.command("ls")
def list_embeddings(
    everything: Annotated[bool, typer.Option("--all", help="Those disabled or removed too.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List embeddings."""
    embeddings = reach(data).embeddings
    show(_rows(embeddings, embeddings.ls(everything=everything), as_json=as_json), as_json=as_json)


@app.command("show")
def show_embedding(name: Name, data: Data = None, as_json: Json = False) -> None:
    """Show one embedding: versions, sources, norms of its vectors, nearest words, where it is used."""
    from latentfarm_shared.records import EmbeddingRecord  # noqa: PLC0415

    from latentfarm.farm import DirectFarm  # noqa: PLC0415

    farm = reach(data)
    record = farm.embeddings.show(name)
    if not isinstance(farm, DirectFarm) or not isinstance(record, EmbeddingRecord):
        _show_one(farm.embeddings, record, as_json=as_json)  # the rest is told where the farm is
        return
    holding = sum(record.content_id in farm.ledger.residents(worker.name) for worker in farm.workers())
    card = farm.embeddings.card(name, holding)
    words = farm.nearest_words(record)
    family = farm.embeddings.family(record)
    show([_card(card, family, words, as_json=as_json)], as_json=as_json, single=True)


def _card(card: EmbeddingCard, family: str, words: dict[str, list[list[str]]], *, as_json: bool) -> dict[str, Any]:
    full = _row(card.record, family) | {
        "internal_name": card.record.internal_name,
        "allow_word": card.record.allow_word,
        "versions": card.versions,
        "aliases": card.aliases,
        "jobs": card.used_by,
        "unfinished_jobs": card.pinned_by,
        "resident_on_workers": card.resident_on,
        "preview": card.has_preview,
    }
    sources = [s.model_dump(mode="json") | {"autov2": s.autov2, "ti_hash": s.ti_hash} for s in card.sources]
    if as_json:
        return full | {
            "norms": card.norms,
            "nearest_words": words,
            "near_duplicates": card.duplicates,
            "sources": sources,
        }
    for encoder, norms in card.norms.items():
        full[f"norms {encoder}"] = " ".join(f"{norm:.2f}" for norm in norms)
    for model, vectors in words.items():
        full[f"nearest words ({model})"] = "; ".join(" ".join(near) for near in vectors)
    full["near_duplicates"] = ", ".join(f"{name} {score:.3f}" for name, score in card.duplicates)
    for number, source in enumerate(sources, 1):
        told = ("file_name", "origin", "base_model", "licence", "link", "added")
        full[f"source {number}"] = ", ".join(str(source[key]) for key in told if source[key])
        full[f"trained words {number}"] = ", ".join(source["trained_words"])
    return {key: value for key, value in full.items() if value not in ("", [], None)}


@app.command()
def alias(
    name: Name,
    new: Annotated[str, typer.Argument(metavar="ALIAS", help="Its second name.", show_default=False)],
    allow_word: AllowWord = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Give an embedding a second name."""
    embeddings = reach(data).embeddings
    _show_one(embeddings, embeddings.alias(name, new, allow_word=allow_word), as_json=as_json)


@app.command()
def rename(
    name: Name,
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    allow_word: AllowWord = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Give an embedding another name; the old one is refused from then on, saying the new."""
    embeddings = connect(data).embeddings
    _show_one(embeddings, embeddings.rename(name, new, allow_word=allow_word), as_json=as_json)


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(help="Names.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Even if unfinished jobs use it; they keep it.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Remove embeddings; refused while an unfinished job uses them."""
    embeddings = reach(data).embeddings
    for name in names:
        embeddings.rm(name, force=force)
    if as_json:
        typer.echo(json.dumps(names, ensure_ascii=False))


@app.command()
def disable(
    name: Name,
    reason: Annotated[str, typer.Option(help="What to tell those who ask for it.")] = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Refuse an embedding to new jobs."""
    embeddings = connect(data).embeddings
    _show_one(embeddings, embeddings.disable(name, reason), as_json=as_json)


@app.command()
def enable(name: Name, data: Data = None, as_json: Json = False) -> None:
    """Let new jobs have a disabled embedding again."""
    embeddings = connect(data).embeddings
    _show_one(embeddings, embeddings.enable(name), as_json=as_json)


@app.command()
def export(
    names: Annotated[list[str], typer.Argument(help="Names.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path(),
    form: Annotated[
        str, typer.Option("--format", "-f", help="safetensors, a1111, diffusers or original.")
    ] = "safetensors",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Write embeddings as files for other programs.

    Example:

        latentfarm embeddings export corneo_dva --format a1111 -o ~/stable-diffusion-webui/embeddings
    """
    embeddings = connect(data).embeddings
    files = [str(embeddings.export(name, output, form)) for name in names]
    typer.echo(json.dumps(files, ensure_ascii=False) if as_json else "\n".join(files))


@app.command()
def merge(
    formula: Annotated[str, typer.Argument(help="Such as 'a + 0.5*b - c'.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="What to call the result.", show_default=False)],
    allow_word: AllowWord = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Add, subtract and weigh embeddings to make another.

    Example:

        latentfarm embeddings merge "corneo_dva + 0.5*watercolour" --name soft-dva
    """
    embeddings = connect(data).embeddings
    _show_one(embeddings, embeddings.merge(formula, name, allow_word=allow_word), as_json=as_json)


@app.command()
def diff(
    left: Annotated[str, typer.Argument(help="A name, or NAME@VERSION.", show_default=False)],
    right: Annotated[str, typer.Argument(help="Another.", show_default=False)],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Compare two embeddings vector by vector."""
    show([connect(data).embeddings.diff(left, right)], as_json=as_json, single=True)


@app.command()
def duplicates(
    least: Annotated[float, typer.Option("--least", min=0, max=1, help="How alike; 1 is the same.")] = 0.98,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List pairs of embeddings that are nearly the same."""
    rows = connect(data).embeddings.duplicates(least)
    show([{"name": a, "other": b, "likeness": likeness} for a, b, likeness in rows], as_json=as_json)


@app.command()
def reindex(data: Data = None, as_json: Json = False) -> None:
    """Rebuild the index of names in Redis from S3, after Redis was lost."""
    farm = connect(data)
    counts = {"embeddings": farm.embeddings.reindex(), "models": farm.registry.reindex()}
    show([counts], as_json=as_json, single=True)


def _show_one(embeddings: Library, record: Shown, *, as_json: bool) -> None:
    show(_rows(embeddings, [record], as_json=as_json), as_json=as_json, single=True)


def _families(embeddings: Library) -> Callable[[Any], str]:
    """Return what tells an embedding's family: the farm's checkpoints where they are at hand, else its widths."""
    from latentfarm.library import Embeddings  # noqa: PLC0415

    return embeddings.family if isinstance(embeddings, Embeddings) else lambda record: str(record.family)


SHORT = ("name", "vectors", "family", "kind", "version", "state", "owner")


def _rows(embeddings: Library, records: Sequence[Shown], *, as_json: bool) -> list[dict[str, Any]]:
    """Return embeddings as the command line prints them, in full as JSON."""
    family = _families(embeddings)
    rows = [_row(record, family(record)) for record in records]
    if as_json:
        return rows
    owned = any(row["owner"] for row in rows)
    return [{key: row[key] for key in SHORT if key != "owner" or owned} for row in rows]


def _row(record: Shown, family: str) -> dict[str, Any]:
    return {
        "name": record.name,
        "vectors": record.vectors,
        "family": family,
        "kind": record.kind,
        "widths": record.widths,
        "layout": record.layout,
        "version": record.version,
        "state": record.state,
        "owner": record.owner,
        "content_id": record.content_id,
        "sha256": record.file_sha256,
        "ti_hash": record.ti_hash,
    }


@app.command()
def preview(
    name: Name,
    model: Model = "demo",
    prompt: Annotated[str, typer.Option(help="What to draw with and without it.")] = "masterpiece, high quality",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the sheet as this PNG.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Draw with and without an embedding at fixed seeds; says how far it moves the picture and keeps one for its card.

    Example:

        latentfarm embeddings preview corneo_dva -o corneo.png
    """
    found = connect(data).preview(name, model=model, prompt=prompt)
    if output is not None:
        found.sheet.save(output)
    told = {"name": found.record.name, "effect": round(found.effect, 4), "dead": found.is_dead}
    show([told | {"sheet": str(output) if output else None}], as_json=as_json, single=True)


@app.command()
def sweep(
    name: Name,
    strength: Annotated[str, typer.Option(help="FROM:TO:STEP, or numbers with commas.")] = "0:1.5:0.25",
    seeds: Annotated[int, typer.Option(min=1, max=64, help="How many seeds.")] = 4,
    model: Model = "demo",
    prompt: Annotated[str, typer.Option(help="What to draw besides.")] = "masterpiece, high quality",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the labelled sheet as this PNG.")] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Draw an embedding at several strengths and seeds, on a sheet with labelled axes.

    Example:

        latentfarm embeddings sweep corneo_dva --strength 0:1.5:0.25 --seeds 4 -o strengths.png
    """
    from latentfarm.library import parse_strengths  # noqa: PLC0415
    from latentfarm.studies import sheet_of  # noqa: PLC0415

    job = connect(data).sweep_strength(name, parse_strengths(strength), seeds=seeds, model=model, prompt=prompt)
    status = job.wait(progress=True)
    if output is not None:
        sheet_of(job).save(output)
    told = {"job": job.id, "state": status.state, "images": status.total, "sheet": str(output) if output else None}
    show([told], as_json=as_json, single=True)
    if status.state != "succeeded":
        raise typer.Exit(1)


@app.command()
def pack(  # noqa: PLR0917 - typer turns each into an option
    prompt: Annotated[str, typer.Argument(help="The long prompt.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="What to call the embedding.", show_default=False)],
    vectors: Annotated[int, typer.Option(min=1, max=64, help="How many tokens it takes.")] = 8,
    negative: Annotated[bool, typer.Option("--negative", help="The prompt says what not to draw.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of gradient descent.")] = 600,
    size: Annotated[str, typer.Option(help="Size of the pictures it learns from.")] = "128x128",
    seed: Annotated[int, typer.Option(min=0, help="Seed of its noise.")] = 0,
    model: Model = "demo",
    allow_word: AllowWord = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the comparison as this PNG.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and do not wait.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Pack a long prompt into an embedding: a worker finds vectors that guide the model as the prompt does.

    Cancel it as any job. The comparison shows, at held-out seeds, a row without it, one with it, one with the long prompt.

    Examples:

        latentfarm embeddings pack "1girl, brown hair, pink headphones, white scarf" --name corneo --vectors 8

        latentfarm embeddings pack "blurry, low quality, deformed" --name my-neg --negative --vectors 4
    """
    from latentfarm.cli.jobs import read_size  # noqa: PLC0415

    width, height = read_size(size).values()
    farm = connect(data)
    job = farm.pack(
        prompt, name, vectors=vectors, negative=negative, steps=steps, model=model, size=(width, height), seed=seed,
        allow_word=allow_word,
    )  # fmt: skip
    if detach:
        typer.echo(json.dumps({"job": job.id}) if as_json else job.id)
        return
    with bar() as update:
        status = job.follow(lambda story: update(int(story.get("step", 0)), steps, str(story.get("stage", ""))))
    if status.state != "succeeded":
        typer.echo(
            f"latentfarm: job {job.id} {status.state}: {(job.images[0].error or {}).get('message', '')}", err=True
        )
        raise typer.Exit(1)
    if output is not None:
        job.images[0].save(output)
    told = status.progress or {}
    row_ = {"name": name, "quality": told.get("quality"), "version": told.get("version"), "job": job.id}
    show([row_ | {"sheet": str(output) if output else None}], as_json=as_json, single=True)
