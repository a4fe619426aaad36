"""Commands on checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfarm.cli.output import Json, show
from latentfarm.cli.reach import Data, connect, reach

if TYPE_CHECKING:
    from latentfarm_shared.records import CheckpointRecord

app = typer.Typer(no_args_is_help=True)

Name = Annotated[str | None, typer.Option("--name", help="Name to use instead of the file's.", show_default=False)]


@app.command("add")
def add_model(
    source: Annotated[
        str, typer.Argument(help="A diffusers folder, a .safetensors file or a hub id.", show_default=False)
    ],
    name: Name = None,
    config: Annotated[
        Path | None, typer.Option(help="For a single file: a diffusers folder of its family.", show_default=False)
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Record a checkpoint; workers fetch it by hash, verify it and then serve it.

    Example:

        latentfarm models add ./my-checkpoint --name mine

        latentfarm models add model.safetensors --config ./sd15-folder

        latentfarm models add owner/checkpoint@main
    """
    show([_model(connect(data).models.add(source, name, config))], as_json=as_json, single=True)


@app.command("ls")
def list_models(data: Data = None, as_json: Json = False) -> None:
    """List checkpoints."""
    from latentfarm_shared.records import CheckpointRecord  # noqa: PLC0415 - keeps --help fast

    found = reach(data).models.ls()
    rows = [_model(record) if isinstance(record, CheckpointRecord) else record.model_dump() for record in found]
    show(rows, as_json=as_json)


@app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(show_default=False)], data: Data = None, as_json: Json = False
) -> None:
    """Show one checkpoint."""
    record = connect(data).models.show(name)
    show([_model(record) | {"files": [file.path for file in record.files]}], as_json=as_json, single=True)


def samplers(as_json: Json = False) -> None:
    """List samplers with the names they also go by, schedules and upscalers; needs no farm."""
    from latentfarm_shared.names import LATENT_UPSCALERS, PLAIN_UPSCALERS, SAMPLERS, SCHEDULES, TRAITS  # noqa: PLC0415

    rows = [
        {"name": TRAITS[n].name, "aliases": list(TRAITS[n].aliases), "schedule": TRAITS[n].schedule} for n in SAMPLERS
    ]
    others = {"schedules": list(SCHEDULES), "upscalers": [*LATENT_UPSCALERS, *PLAIN_UPSCALERS]}
    if as_json:
        show([{"samplers": rows} | others], as_json=True, single=True)
        return
    show(rows, as_json=False)
    for kind, names in others.items():
        typer.echo(f"{kind}: {', '.join(names)}")


def _model(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "family": record.family,
        "widths": record.widths,
        "prediction_type": record.prediction_type,
        "hash": record.hash,
        "size": sum(file.size for file in record.files),
    }
