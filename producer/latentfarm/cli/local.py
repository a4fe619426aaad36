"""Commands that run parts of a farm on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from latentfarm.cli.output import Data, Json


def up(
    data: Data = None,
    workers: Annotated[int, typer.Option("--workers", "-w", min=0, max=64, help="Workers to start.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a farm on this machine: Redis-protocol server, S3 server and workers. Ctrl-C stops it; data is kept.

    Examples:

        latentfarm up --workers 2

        latentfarm up --json --data /srv/latentfarm
    """
    from latentfarm_shared.logs import configure_logs  # noqa: PLC0415
    from latentfarm_shared.settings import data_folder, environment_data  # noqa: PLC0415

    from latentfarm.embedded.local import LocalFarm  # noqa: PLC0415

    configure_logs("INFO", "console")
    folder = data_folder(data, environment_data())
    stop = _StopRequest()
    farm = LocalFarm(folder, workers)
    typer.echo(f"starting a farm in {folder} …", err=True)
    with farm as local:
        local.await_workers(lambda: stop.requested)
        settings = local.farm.settings
        ready = {"redis_url": settings.redis_url, "s3_endpoint": settings.s3_endpoint, "data": str(folder)}
        if as_json:
            typer.echo(json.dumps(ready))
        else:
            typer.echo(f"farm ready: {settings.redis_url}, {settings.s3_endpoint}, data in {folder}")
            typer.echo(f"in another terminal: latentfarm generate 'masterpiece, corneo_dva' --data {folder}", err=True)
        while not stop.requested:
            local.watch()
            time.sleep(0.5)


class _StopRequest:
    """Becomes true at the first SIGTERM or Ctrl-C, so that the farm stops in order."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self.requested = True


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the pictures go.")] = Path("latentfarm-demo"),
) -> None:
    """From nothing to pictures: a farm of one worker, a job with and without embeddings, a contact sheet."""
    from latentfarm.embedded.local import require_extras  # noqa: PLC0415

    require_extras()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a polite kill leaves nothing behind
    from latentfarm.demo import run_demo  # noqa: PLC0415 - needs the extra

    run_demo(output)


def worker(
    models: Annotated[
        str, typer.Option("--models", help="Checkpoints to serve, separated by commas; all if empty.")
    ] = "",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps.", show_default=False)] = None,
    slots: Annotated[int | None, typer.Option(min=1, max=256, help="Images in flight.", show_default=False)] = None,
    embeddings_dir: Annotated[
        Path | None,
        typer.Option("--embeddings-dir", help="Folder like A1111's to watch for embeddings.", show_default=False),
    ] = None,
    data: Data = None,
) -> None:
    """Run one worker until SIGTERM or Ctrl-C; a second signal hurries. It restarts itself when its device dies.

    Example:

        latentfarm worker --device cuda:0 --models demo

        latentfarm worker --embeddings-dir ~/stable-diffusion-webui/embeddings
    """
    from latentfarm_shared.errors import MissingExtra  # noqa: PLC0415

    if find_spec("torch") is None or find_spec("diffusers") is None:
        raise MissingExtra("worker", "a worker")
    command = [sys.executable, "-m", "latentfarm_worker", "--models", models]
    command += ["--data", str(data)] if data else []
    folder = str(embeddings_dir.absolute()) if embeddings_dir else None
    chosen = {
        "LATENTFARM_EMBEDDINGS_DIR": folder,
        "LATENTFARM_DEVICE": device,
        "LATENTFARM_SLOTS": str(slots) if slots else None,
    }
    os.execve(sys.executable, command, os.environ | {k: v for k, v in chosen.items() if v})


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default=False)] = None,
    data: Data = None,
) -> None:
    """Serve the HTTP API: status of jobs, images and workers, and health."""
    from latentfarm_shared.errors import MissingExtra  # noqa: PLC0415

    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise MissingExtra("api", "the HTTP API")
    import uvicorn  # noqa: PLC0415 - only in the extra

    from latentfarm.api import create_app  # noqa: PLC0415
    from latentfarm.farm import Farm  # noqa: PLC0415

    farm = Farm.from_env(data)
    settings = farm.settings
    uvicorn.run(create_app(farm), host=host or settings.api_host, port=port or settings.api_port, log_level="warning")
