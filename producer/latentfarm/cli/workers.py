"""Commands on workers, and on what owners may have."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from latentfarm.cli.output import Json, show
from latentfarm.cli.reach import Data, reach

app = typer.Typer(no_args_is_help=True)
limits_app = typer.Typer(no_args_is_help=True)

HIDDEN = {"name", "cache_hits", "cache_misses", "queues", "lanes", "version", "loads", "embeddings"}
WorkerName = Annotated[str, typer.Argument(help="The worker's name, as 'workers ls' tells.", show_default=False)]


@app.command("show")
def show_worker(name: WorkerName, data: Data = None, as_json: Json = False) -> None:
    """Show what a worker says of itself."""
    from latentfarm_shared.errors import UnknownName  # noqa: PLC0415

    workers = {worker.station: worker for worker in reach(data).workers()}
    if name not in workers:
        raise UnknownName.among("worker", name, workers)
    show([workers[name].model_dump(mode="json")], as_json=as_json, single=True)


@app.command("drain")
def drain(name: WorkerName, data: Data = None) -> None:
    """Let a worker claim nothing more; what it has is finished. It stays so over restarts."""
    reach(data).drain(name)


@app.command("undrain")
def undrain(name: WorkerName, data: Data = None) -> None:
    """Let a drained worker go on."""
    reach(data).drain(name, on=False)


@app.command("release")
def release(name: WorkerName, data: Data = None) -> None:
    """Let a worker work again that was set aside because it kept dying."""
    reach(data).release(name)


@limits_app.command("set")
def set_limits(
    owner: Annotated[str | None, typer.Argument(help="Whose; everybody's who has none, if left out.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Share of the farm, beside others' 1.", show_default=False)
    ] = None,
    running: Annotated[int | None, typer.Option(help="Images at once.", show_default=False)] = None,
    queued: Annotated[int | None, typer.Option(help="Images waiting.", show_default=False)] = None,
    data: Data = None,
) -> None:
    """Set what an owner may have; what is not given is unbounded."""
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415
    from latentfarm_shared.ledger import Limits  # noqa: PLC0415
    from pydantic import ValidationError  # noqa: PLC0415

    try:
        limits = Limits(weight=weight, running=running, queued=queued)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidField(str(first["loc"][0]), f"{first['msg'].lower()}, got {first['input']}") from error
    reach(data).set_limits(owner, limits)


@limits_app.command("show")
def show_limits(
    owner: Annotated[str | None, typer.Argument(help="Whose; your own, if left out.")] = "",
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show what an owner may have, and has."""
    from latentfarm.client.sync import Farm  # noqa: PLC0415 - keeps --help fast

    farm = reach(data)
    if isinstance(farm, Farm):
        owner = owner or farm.whoami() or None
    own, others = farm.limits(owner).model_dump(), farm.limits(None).model_dump()
    row = {name: value if value is not None else others[name] for name, value in own.items()}
    has = {f"{name}_now": value for name, value in farm.usage(owner).items()}
    show([row | has], as_json=as_json, single=True)


@app.command("ls")
def list_workers(
    here: Annotated[bool, typer.Option("--here", help="Only this machine's; exit 1 if none is ready.")] = False,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List the workers that are alive."""
    farm = reach(data)
    names = {record.hash: record.name for record in farm.models.ls()}
    workers = [w for w in farm.workers() if not here or w.host == socket.gethostname()]
    rows = []
    for worker in workers:
        row = {"name": worker.station} | worker.model_dump(mode="json", exclude={"name"} if as_json else HIDDEN)
        row["checkpoints"] = [names.get(checkpoint, checkpoint[:12]) for checkpoint in worker.checkpoints]
        rows.append(row)
    show(rows, as_json=as_json)
    for station, story in farm.aside().items():
        typer.echo(
            f"set aside: {station}: {story}; 'latentfarm workers release {station}' lets it work again", err=True
        )
    if here and not any(worker.checkpoints for worker in workers):
        raise typer.Exit(1)
