"""A farm over two machines, as far as one can play two: an address that listens, a token, a worker that joins."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.conftest import LATENTFARM, clean_environment, eventually, start_up

pytestmark = pytest.mark.acceptance


def test_worker_joins_from_elsewhere_with_a_token(tmp_path: Path) -> None:
    up = start_up(tmp_path / "first", "--workers", "0", "--listen", "127.0.0.1")
    token = (up.data / "join-token").read_text()
    assert up.ready["join"] == token
    assert (up.data / "join-token").stat().st_mode & 0o077 == 0
    command = [
        LATENTFARM,
        "worker",
        "--join",
        f"@{up.data / 'join-token'}",
        "--engine",
        "simulated",
        "--image-seconds",
        "0.05",
    ]
    environ = clean_environment() | {"LATENTFARM_CACHE": str(tmp_path / "second")}
    worker = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL, cwd=tmp_path)
    try:
        eventually(lambda: any(row["checkpoints"] for row in up.json("workers", "ls")), 60)
        images = up.json("generate", "masterpiece, corneo_dva", "-c", "3", "--steps", "3")
        assert [image["state"] for image in images] == ["succeeded"] * 3
    finally:
        worker.terminate()
        assert worker.wait(30) == 0
        assert up.stop() == 0


@pytest.mark.parametrize("arguments", [("up", "--workers", "0", "--listen", "0.0.0.0"), ("worker", "--join")])  # noqa: S104 - to be refused
def test_other_machines_are_refused_without_tls_unless_one_insists(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    from latentfarm_shared.settings import FarmFile  # noqa: PLC0415

    farm = FarmFile(
        redis_url="redis://10.0.0.5:6379/0", redis_password="secret", s3_endpoint="http://10.0.0.5:8333",
        s3_access_key="a", s3_secret_key="b", s3_bucket="latentfarm", pid=0,
    )  # fmt: skip
    more = [farm.token] if arguments[0] == "worker" else ["--data", str(tmp_path)]
    done = subprocess.run(
        [LATENTFARM, *arguments, *more],
        check=False,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=60,
    )

    assert done.returncode == 2
    assert "--insecure" in done.stderr
    assert "secret" not in done.stderr


def test_sweep_goes_through_the_command_line(tmp_path: Path) -> None:
    up = start_up(tmp_path / "farm", "--workers", "2", "--engine", "simulated", "--image-seconds", "0.05")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("name: few\ndefaults: {model: demo, prompt: a cat, steps: 3}\nmatrix: {seed: 1..12, sampler: [Euler, DDIM]}\n"
                     "approve_after: 4\n")  # fmt: skip
    try:
        plan = up.json("plan", str(sweep))
        assert (plan["images"], plan["duplicates"]) == (24, 0)
        (row,) = up.json("submit", str(sweep))
        job = row["id"]
        eventually(lambda: up.json("jobs", "show", job)["state"] == "paused", 30)
        (cause,) = up.json("jobs", "why", job)
        assert (cause["code"], cause["count"]) == ("needs_approval", 20)
        up.run("jobs", "priority", job, "5")
        up.run("jobs", "pause", job)
        up.run("jobs", "resume", job)
        up.run("jobs", "approve", job)
        up.run("jobs", "watch", job)
        eventually(lambda: up.run("jobs", "manifest", job, expect=0).stdout.count("\n") == 24, 20)
        assert [row["id"] for row in up.json("submit", str(sweep))] == [job]
        events = up.json("jobs", "events", job)
        assert [event["version"] for event in events] == list(range(1, len(events) + 1))
        worker = up.json("workers", "ls")[0]["name"]
        up.run("workers", "drain", worker)
        eventually(lambda: up.json("workers", "show", worker)["draining"])
        up.run("workers", "undrain", worker)
        up.run("limits", "set", "ada", "--weight", "2", "--running", "3")
        assert json.loads(up.run("limits", "show", "ada", "--json").stdout)["running"] == 3
        assert "did you mean" in up.run("workers", "drain", worker + "x", expect=2).stderr
    finally:
        assert up.stop() == 0
