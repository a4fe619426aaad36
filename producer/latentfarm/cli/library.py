"""Commands on embeddings and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfarm.cli.output import Data, Json, connect, show

if TYPE_CHECKING:
    from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord

embeddings_app = typer.Typer(no_args_is_help=True)
models_app = typer.Typer(no_args_is_help=True)

Name = Annotated[str | None, typer.Option("--name", help="Name to use instead of the file's.", show_default=False)]


@embeddings_app.command("add")
def add_embeddings(
    paths: Annotated[list[Path], typer.Argument(help="Embedding files of any layout.", show_default=False)],
    name: Name = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Add embeddings; every worker can use them at once.

    Example:

        latentfarm embeddings add EasyNegative.safetensors bad-hands-5.pt
    """
    from latentfarm_shared.embeddings.files import read_embedding  # noqa: PLC0415
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    if name is not None and len(paths) > 1:
        raise InvalidField("name", "goes with one file only")
    farm = connect(data)
    files = [read_embedding(path) for path in paths]
    show([_embedding(farm.registry.add_embedding(file, name)) for file in files], as_json=as_json)


@embeddings_app.command("ls")
def list_embeddings(data: Data = None, as_json: Json = False) -> None:
    """List embeddings."""
    show([_embedding(record) for record in connect(data).embeddings.ls()], as_json=as_json)


@embeddings_app.command("show")
def show_embedding(
    name: Annotated[str, typer.Argument(show_default=False)], data: Data = None, as_json: Json = False
) -> None:
    """Show one embedding."""
    show([connect(data).embeddings.show(name).model_dump(mode="json")], as_json=as_json, single=True)


@models_app.command("add")
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


@models_app.command("ls")
def list_models(data: Data = None, as_json: Json = False) -> None:
    """List checkpoints."""
    show([_model(record) for record in connect(data).models.ls()], as_json=as_json)


@models_app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(show_default=False)], data: Data = None, as_json: Json = False
) -> None:
    """Show one checkpoint."""
    record = connect(data).models.show(name)
    show([_model(record) | {"files": [file.path for file in record.files]}], as_json=as_json, single=True)


def _embedding(record: EmbeddingRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "vectors": record.vectors,
        "widths": record.widths,
        "layout": record.layout,
        "content_id": record.content_id,
        "ti_hash": record.ti_hash,
    }


def _model(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "family": record.family,
        "widths": record.widths,
        "prediction_type": record.prediction_type,
        "hash": record.hash,
        "size": sum(file.size for file in record.files),
    }
