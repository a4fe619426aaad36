"""Memory of a running farm on the demo checkpoint, after work, and what rendering costs in CPU time.

Memory is the proportional set size (shared pages counted in parts) and the resident set size of each process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from latentfarm.embedded.local import LocalFarm
from latentfarm.embedded.processes import free_ports

IMAGES = 64
LIMITS_MB = {"worker": 900, "api": 200, "servers": 400}


def memory_mb(processes: list[psutil.Process]) -> dict[str, float]:
    """Return the summed proportional and resident set sizes in MB."""
    full = [process.memory_full_info() for process in processes]
    return {
        "pss": round(sum(item.pss for item in full) / 2**20, 1),
        "rss": round(sum(item.rss for item in full) / 2**20, 1),
    }


def start_api(data: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Serve the API of the farm in `data`; return its process and port once it answers."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "latentfarm.cli.main", "serve", "--port", str(port), "--data", str(data)]
    process = subprocess.Popen(command)
    for _ in range(200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2).close()
        except OSError:
            time.sleep(0.1)
        else:
            return process, port
    raise TimeoutError("the API did not answer")


def measure() -> dict[str, Any]:
    """Run a farm, give it work, and read what it takes."""
    with tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as folder, LocalFarm(Path(folder)) as local:
        local.await_workers()
        (status,) = local.farm.workers()
        worker = psutil.Process(status.pid)
        api, port = start_api(Path(folder))
        try:
            cpu, wall = sum(worker.cpu_times()[:2]), time.monotonic()
            job = local.farm.generate("masterpiece, corneo_dva", seed=1, count=IMAGES)
            job.wait(600)
            wall, cpu = time.monotonic() - wall, sum(worker.cpu_times()[:2]) - cpu
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/jobs/{job.id}/images").close()
            children = psutil.Process().children(recursive=True)
            servers = [child for child in children if child.name() in ("valkey-server", "weed")]
            return {
                "worker process, MB": memory_mb([worker]),
                "worker supervisor, MB": memory_mb([parent for parent in [worker.parent()] if parent]),
                "api, MB": memory_mb([psutil.Process(api.pid)]),
                "servers, MB": {child.name(): memory_mb([child]) for child in servers},
                f"{IMAGES} images, 20 steps, 128x128": {
                    "wall s per image": round(wall / IMAGES, 3),
                    "worker CPU s per image": round(cpu / IMAGES, 3),
                },
                "limits, MB": LIMITS_MB,
            }
        finally:
            api.terminate()
            api.wait()
