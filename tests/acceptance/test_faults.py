"""What happens when processes end: nothing lost, nothing twice, nobody left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from latentfarm.farm import DirectFarm
from latentfarm_shared.storage import ObjectStore

from tests.acceptance.conftest import Up, clean_environment, eventually, start_up

pytestmark = pytest.mark.acceptance


def children(up: Up) -> list[psutil.Process]:
    return psutil.Process(up.process.pid).children(recursive=True)


def pictures(store: ObjectStore, job: str) -> int:
    return len(store.keys(f"jobs/{job}/"))


def test_two_workers_share_a_job_and_one_may_leave(tmp_path: Path) -> None:
    up = start_up(tmp_path / "data", "--workers", "2", environ={"LATENTFARM_GRACE_S": "0"})
    try:
        sdk = DirectFarm.from_env(up.data)
        job = sdk.generate("a blue circle on a white background", seed=1, count=40, steps=10)
        eventually(lambda: job.status().counts["succeeded"] >= 4, 120)
        busy = [w for w in sdk.workers() if w.claims]
        assert len(busy) == 2, "both workers should have taken images"
        supervisor = psutil.Process(busy[0].pid).parent()
        assert supervisor is not None
        supervisor.send_signal(signal.SIGTERM)
        status = job.wait(180)

        assert status.counts["succeeded"] == 40
        assert busy[0].name not in [w.name for w in sdk.workers()], "the stopped worker should have signed off"
        logs = "".join(path.read_text() for path in (up.data / "logs").glob("worker-*.log"))
        assert "image handed back" in logs
        assert "lost before" not in logs
        assert pictures(sdk.store, job.id) == 40
        published = [
            json.dumps(line)
            for log in sorted((up.data / "logs").glob("worker-*.log"))
            for line in log.read_text().splitlines()
            if "image published" in line and job.id in line
        ]
        assert len(published) == 40
    finally:
        assert up.stop() == 0


def test_killed_worker_loses_nothing_and_farm_survives_a_restart(tmp_path: Path) -> None:
    up = start_up(tmp_path / "data")
    sdk = DirectFarm.from_env(up.data)
    job = sdk.generate("a girl", seed=1, count=12, steps=15)
    eventually(lambda: job.status().counts["running"] > 0, 60)
    (worker,) = sdk.workers()
    os.kill(worker.pid, signal.SIGKILL)

    assert job.wait(180).counts["succeeded"] == 12
    assert pictures(sdk.store, job.id) == 12

    assert up.stop() == 0
    again = start_up(tmp_path / "data")
    try:
        assert again.json("jobs", "show", job.id)["state"] == "succeeded"
        assert [e["name"] for e in again.json("embeddings", "ls")] == ["16-token-demo-neg", "corneo_dva"]
        assert len(DirectFarm.from_env(again.data).job(job.id).images[0].png()) > 1000
    finally:
        family = children(again)
        again.process.kill()
        again.process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == [], "processes outlived a killed parent"


def test_port_in_use_is_another_port(tmp_path: Path, farm: Up) -> None:
    data = tmp_path / "data"
    data.mkdir()
    taken = json.loads((farm.data / "farm.json").read_text())
    (data / "farm.json").write_text(json.dumps(taken))
    up = start_up(data, "--workers", "0")

    assert up.ready["redis_url"] != farm.ready["redis_url"]
    assert up.stop() == 0


def test_second_farm_in_one_folder_is_refused(farm: Up) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("latentfarm")), "up", "--data", str(farm.data)],
        check=False,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=60,
    )

    assert done.returncode == 3
    assert "already running" in done.stderr
