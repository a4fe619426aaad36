"""`latentfarm webhooks`: addresses that are told what happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentfarm.cli.output import Json, show
from latentfarm.cli.reach import Data, connect

if TYPE_CHECKING:
    from latentfarm.api.webhooks.hooks import Hook, Hooks
    from latentfarm.farm import DirectFarm

app = typer.Typer(no_args_is_help=True)
HookId = Annotated[str, typer.Argument(help="The webhook's id, as 'webhooks ls' tells.", show_default=False)]


@app.command("add")
def add(
    url: Annotated[str, typer.Argument(help="A public https address.", show_default=False)],
    event: Annotated[list[str] | None, typer.Option("--event", help="Such as job.completed; all, if left out.")] = None,
    throttle: Annotated[float, typer.Option(help="Seconds between two job.image events of a job.")] = 0.5,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Have an address told of your jobs' events; each is signed as Standard Webhooks has it.

    Example:

        latentfarm webhooks add https://example.com/hook --event job.started --event job.completed
    """
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415 - keeps --help fast
    from pydantic import ValidationError  # noqa: PLC0415

    farm, hooks = _hooks(data)
    from latentfarm.api.webhooks.hooks import HookRequest  # noqa: PLC0415

    try:
        asked = HookRequest.model_validate({"url": url, "events": tuple(event or ()), "throttle_s": throttle})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidField(str(first["loc"][0]), f"{first['msg']}, got {first['input']!r}") from error
    show([_row(hooks.create(farm.owner, asked))], as_json=as_json, single=True)


@app.command("ls")
def list_hooks(data: Data = None, as_json: Json = False) -> None:
    """List the addresses, and which were given up."""
    farm, hooks = _hooks(data)
    show([_row(hook) for hook in hooks.ls(farm.owner)], as_json=as_json)


@app.command("rm")
def remove(webhook: HookId, data: Data = None) -> None:
    """Tell an address nothing more."""
    farm, hooks = _hooks(data)
    hooks.delete(hooks.get(farm.owner, webhook))


@app.command("deliveries")
def deliveries(webhook: HookId, data: Data = None, as_json: Json = False) -> None:
    """List what was sent to an address, with every try."""
    farm, hooks = _hooks(data)
    from latentfarm.api.webhooks import Outbox  # noqa: PLC0415

    found = Outbox(farm).log(hooks.get(farm.owner, webhook).id)
    show([delivery.model_dump(mode="json") for delivery in found], as_json=as_json)


@app.command("redeliver")
def redeliver(
    webhook: HookId,
    delivery: Annotated[str, typer.Argument(help="The delivery's id.", show_default=False)],
    data: Data = None,
) -> None:
    """Send something again, whatever became of it; a server of the API does so."""
    farm, hooks = _hooks(data)
    from latentfarm.api.webhooks import Outbox  # noqa: PLC0415

    Outbox(farm).send_again(hooks.get(farm.owner, webhook).id, delivery)


@app.command("secret")
def secret(
    rotate: Annotated[bool, typer.Option("--rotate", help="Make another, for what is sent from now on.")] = False,
    data: Data = None,
) -> None:
    """Print the secret that signs what is sent to you."""
    farm, hooks = _hooks(data)
    typer.echo(hooks.rotate(farm.owner) if rotate else hooks.secret(farm.owner))


def _hooks(data: Data) -> tuple[DirectFarm, Hooks]:
    from importlib.util import find_spec  # noqa: PLC0415

    from latentfarm_shared.errors import MissingExtra  # noqa: PLC0415

    if find_spec("cryptography") is None:
        raise MissingExtra("api", "keeping webhooks' secrets")
    from latentfarm.api.webhooks.hooks import Hooks  # noqa: PLC0415

    farm = connect(data)
    return farm, Hooks(farm)


def _row(hook: Hook) -> dict[str, Any]:
    return hook.model_dump(mode="json", exclude={"owner", "job"})
