"""`python -m latentfarm_worker`: supervise one worker a device. `latentfarm worker` is the same with a nicer face."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from latentfarm_shared.errors import FarmError
from latentfarm_shared.logs import configure_logs
from latentfarm_shared.settings import Settings, without_secrets_of_producers

from latentfarm_worker.supervisor import Supervisor, supervise


def main() -> int:
    """Run supervised workers until SIGTERM or Ctrl-C; a second signal hurries."""
    parser = argparse.ArgumentParser(prog="latentfarm worker", description=main.__doc__)
    parser.add_argument("--models", default="", help="checkpoints to serve, separated by commas (default: all)")
    parser.add_argument("--devices", default="", help="devices, separated by commas; a worker on each")
    parser.add_argument("--workers", type=int, default=1, help="workers on each device")
    parser.add_argument("--data", type=Path, help="data folder of the farm started by 'latentfarm up'")
    arguments = parser.parse_args()
    models = tuple(filter(None, arguments.models.split(",")))
    try:
        settings = Settings.load(arguments.data)
        configure_logs(settings.log_level, settings.log_format)
        devices = list(filter(None, arguments.devices.split(","))) or [settings.device]
        supervisors = []
        for device in devices * arguments.workers:
            environ = without_secrets_of_producers() | {"LATENTFARM_DEVICE": device}
            its = Settings.load(arguments.data, environ)
            supervisors.append(Supervisor(its, models, arguments.data, environ=environ))
        return supervise(supervisors)
    except FarmError as error:
        print(f"latentfarm: {error}", file=sys.stderr)  # noqa: T201 - the one line a terminal user needs
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
