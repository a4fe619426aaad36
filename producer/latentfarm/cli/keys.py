"""`latentfarm keys`: who may call the HTTP API."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfarm.cli.output import Json, show
from latentfarm.cli.reach import Data, connect

if TYPE_CHECKING:
    from latentfarm.keys import ApiKey

app = typer.Typer(no_args_is_help=True)


@app.command("create")
def create(
    owner: Annotated[str, typer.Argument(help="In whose name the key acts.")],
    scopes: Annotated[
        str, typer.Option(help="Of submit, read, embeddings, admin, with commas.")
    ] = "submit,read,embeddings",
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    images: Annotated[int | None, typer.Option(min=1, help="Images it may submit in all.", show_default=False)] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", min=1, help="Requests it may send.", show_default=False)
    ] = None,
    expires_in: Annotated[
        str | None, typer.Option("--expires-in", help="Such as 30d or 12h.", show_default=False)
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Make an API key; it is printed once. From the first key on every caller needs one.

    Examples:

        latentfarm keys create alice

        latentfarm keys create ops --scopes admin --expires-in 30d
    """
    from latentfarm.jobfiles.values import duration  # noqa: PLC0415 - keeps --help fast
    from latentfarm.keys import ApiKeys  # noqa: PLC0415

    key, word = ApiKeys(connect(data).ledger).create(
        owner,
        scopes=tuple(scope.strip() for scope in scopes.split(",") if scope.strip()),
        name=name,
        images=images,
        requests_per_minute=requests_per_minute,
        expires_in=None if expires_in is None else float(duration("expires_in", expires_in)),
    )
    if as_json:
        show([_row(key) | {"key": word}], as_json=True, single=True)
        return
    typer.echo(word)
    typer.echo(f"key {key.id} of {owner} for {', '.join(key.scopes)}; it is not shown again", err=True)


@app.command("ls")
def list_keys(data: Data = None, as_json: Json = False) -> None:
    """List the keys, without their words."""
    from latentfarm.keys import ApiKeys  # noqa: PLC0415

    show([_row(key) for key in ApiKeys(connect(data).ledger).ls()], as_json=as_json)


@app.command("revoke")
def revoke(key: Annotated[str, typer.Argument(help="The key's id.")], data: Data = None) -> None:
    """Take a key away; it ends within a second."""
    from latentfarm.keys import ApiKeys  # noqa: PLC0415

    found = ApiKeys(connect(data).ledger).revoke(key)
    typer.echo(f"key {found.id} of {found.owner} is revoked", err=True)


def _row(key: ApiKey) -> dict[str, Any]:
    left = None if key.expires is None else max(0, round(key.expires - time.time()))
    return {
        "id": key.id, "owner": key.owner, "name": key.name, "scopes": list(key.scopes), "images": key.images,
        "requests_per_minute": key.requests_per_minute, "expires_in": left,
    }  # fmt: skip
