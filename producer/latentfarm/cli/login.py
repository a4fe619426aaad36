"""`latentfarm login`: farms over HTTP, by name."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from latentfarm.cli.output import Json, show

app = typer.Typer(no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The profile's name.", show_default=False)]


def login(
    url: Annotated[
        str, typer.Argument(help="The farm's address, such as https://farm.example.com.", show_default=False)
    ],
    name: Annotated[str, typer.Option("--name", help="What to call it, for --farm NAME.")] = "default",
    key_stdin: Annotated[bool, typer.Option("--key-stdin", help="Read the API key from standard input.")] = False,
    no_key: Annotated[bool, typer.Option("--no-key", help="The farm needs none.")] = False,
) -> None:
    """Remember a farm and its API key; commands are for it from then on. The key is asked for and tried.

    Examples:

        latentfarm login https://farm.example.com

        latentfarm login http://127.0.0.1:8000 --no-key --name here
    """
    from latentfarm.client.profiles import (  # noqa: PLC0415 - keeps --help fast
        Profile,
        checked,
        profiles_file,
        read_profiles,
        write_profiles,
    )
    from latentfarm.client.sync import Farm  # noqa: PLC0415

    url = checked(url)
    key = None if no_key else _key(from_stdin=key_stdin)
    with Farm(url, key or "") as farm:
        owner = farm.whoami()
    found = read_profiles()
    profiles = found.profiles | {name: Profile(url=url, api_key=key)}
    write_profiles(found.model_copy(update={"current": name, "profiles": profiles}))
    typer.echo(f"logged in to {url}" + (f" as {owner}" if owner else "") + f"; kept in {profiles_file()}", err=True)


def logout(name: Annotated[str | None, typer.Argument(help="A profile; the current one, if left out.")] = None) -> None:
    """Forget a farm and its key."""
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    from latentfarm.client.profiles import read_profiles, write_profiles  # noqa: PLC0415

    found = read_profiles()
    gone = name or found.current
    if gone is None:
        raise InvalidField("name", "nobody is logged in")
    found.of(gone)
    rest = {key: value for key, value in found.profiles.items() if key != gone}
    current = None if found.current == gone else found.current
    write_profiles(found.model_copy(update={"current": current, "profiles": rest}))
    typer.echo(f"forgot {gone}", err=True)


@app.command("ls")
def list_profiles(as_json: Json = False) -> None:
    """List the farms somebody logged in to; keys are not shown."""
    from latentfarm.client.profiles import read_profiles  # noqa: PLC0415

    found = read_profiles()
    rows: list[dict[str, Any]] = [
        {"name": name, "url": profile.url, "current": name == found.current, "has_key": profile.api_key is not None}
        for name, profile in sorted(found.profiles.items())
    ]
    show(rows, as_json=as_json)


@app.command("use")
def use(name: Name) -> None:
    """Make a farm the one that commands are for."""
    from latentfarm.client.profiles import read_profiles, write_profiles  # noqa: PLC0415

    found = read_profiles()
    found.of(name)
    write_profiles(found.model_copy(update={"current": name}))


def _key(*, from_stdin: bool) -> str:
    """Return the key that somebody types or pipes in.

    Raises:
        InvalidField: there is none.
    """
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    given = sys.stdin.readline() if from_stdin else str(typer.prompt("API key", hide_input=True))
    if not given.strip() or not given.strip().isascii() or not given.strip().isprintable():
        raise InvalidField(
            "key", "is missing, or no key; a farm's administrator makes one with 'latentfarm keys create'"
        )
    return given.strip()
