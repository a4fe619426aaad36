"""`latentfarm`: the commands put together, and errors turned into one sentence and an exit code.

Exit codes: 0 done, 1 an image failed, 2 the request is wrong, 3 the farm does not answer, 4 timeout, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from latentfarm_shared import __version__
from latentfarm_shared.errors import FarmError

from latentfarm.cli import embeddings, jobs, keys, local, login, models, webhooks, workers
from latentfarm.cli.reach import name_farm

app = typer.Typer(
    name="latentfarm",
    help="Render Stable Diffusion jobs with textual-inversion embeddings on a farm of warm workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(local.up)
app.command()(local.demo)
app.command()(jobs.generate)
app.command()(jobs.submit)
app.command()(jobs.plan)
app.command()(jobs.params)
app.command()(local.worker)
app.command()(local.serve)
app.command()(local.doctor)
app.command()(models.samplers)
app.command()(login.login)
app.command()(login.logout)
app.add_typer(jobs.app, name="jobs", help="List, watch and download jobs.")
app.add_typer(embeddings.app, name="embeddings", help="Inspect, add, name, compare and make embeddings.")
app.add_typer(models.app, name="models", help="Add and list checkpoints.")
app.add_typer(workers.app, name="workers", help="List, drain and release workers.")
app.add_typer(keys.app, name="keys", help="Make, list and revoke API keys.")
app.add_typer(workers.limits_app, name="limits", help="What owners may have.")
app.add_typer(webhooks.app, name="webhooks", help="Addresses that are told what happens.")
app.add_typer(login.app, name="profiles", help="Farms that you are logged in to.")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    farm: Annotated[
        str | None, typer.Option("--farm", help="The profile of 'latentfarm login' that this is for.")
    ] = None,
) -> None:
    name_farm(farm)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except FarmError as error:
        print(f"latentfarm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"latentfarm: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("latentfarm: interrupted; submitted jobs go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
