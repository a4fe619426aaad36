"""A real farm started by the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LATENTFARM = str(Path(sys.executable).with_name("latentfarm"))


@dataclass
class Up:
    """A running `latentfarm up` and the terminal beside it."""

    process: subprocess.Popen[str]
    ready: dict[str, str]

    @property
    def data(self) -> Path:
        return Path(self.ready["data"])

    def run(self, *arguments: str, expect: int = 0, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command against this farm and check its exit code."""
        done = subprocess.run(
            [LATENTFARM, *arguments],
            check=False,
            capture_output=True,
            text=True,
            input=stdin,
            env=clean_environment() | {"LATENTFARM_DATA": str(self.data)},
            timeout=240,
        )
        assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str) -> Any:
        """Run a command with --json and return what it prints."""
        return json.loads(self.run(*arguments, "--json").stdout)

    def stop(self) -> int:
        """Stop it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


def clean_environment() -> dict[str, str]:
    """Return the environment without settings of another farm."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LATENTFARM_", "AWS_ACCESS", "AWS_SECRET"))}
    return kept | {"LATENTFARM_CONFIG": os.devnull + "/nowhere"}


def start_up(data: Path, *arguments: str, environ: dict[str, str] | None = None) -> Up:
    """Run `latentfarm up --json` until its ready line."""
    process = subprocess.Popen(
        [LATENTFARM, "up", "--json", "--data", str(data), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=clean_environment() | (environ or {}),
    )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
    assert line, f"'latentfarm up' ended with {process.wait()}"
    return Up(process, json.loads(line))


def eventually(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    up = start_up(tmp_path_factory.mktemp("farm"))
    yield up
    assert up.stop() == 0
