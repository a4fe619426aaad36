"""A farm of simulated devices whose every process can be killed, stopped and cut off, and a recount of what it did."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from latentfarm.embedded.local import LocalFarm
from latentfarm.embedded.servers import start_valkey
from latentfarm.farm import DirectFarm
from latentfarm.jobs import Job
from latentfarm_shared.errors import FarmError
from latentfarm_shared.ledger import WorkerStatus
from latentfarm_shared.settings import FarmFile
from latentfarm_shared.specs import JobSpec

from tests.acceptance.conftest import clean_environment, eventually
from tests.faulty_s3 import FaultyS3

CUT_S = 1.0


class Yard:
    """Real servers, and supervisors of simulated workers; S3 lies behind a server that fails on demand."""

    def __init__(self, local: LocalFarm, s3: FaultyS3) -> None:
        self.local, self.s3 = local, s3
        self.farm = DirectFarm(local.farm.settings)
        self.supervisors: list[subprocess.Popen[bytes]] = []
        self.in_flight_at_kills = 0
        self.kills = 0
        self._sizes: deque[tuple[float, Path, int]] = deque()

    def start(
        self, workers: int, image_s: float, *, process: str | None = None, apart: bool = False, logs: str = "",
        **settings: str,
    ) -> None:  # fmt: skip
        """Start so many workers under one supervisor, or each under its own, and wait until they are ready."""
        before = len(self.ready())
        environ = clean_environment() | {
            "LATENTFARM_ENGINE": "simulated",
            "LATENTFARM_IMAGE_SECONDS": str(image_s),
            "LATENTFARM_S3_ENDPOINT": self.s3.url,
            "AWS_ACCESS_KEY_ID": self.farm.settings.s3_access_key or "",
            "AWS_SECRET_ACCESS_KEY": self.farm.settings.s3_secret_key or "",
            **settings,
        }
        module = ["-m", "latentfarm_worker"] if process is None else ["-c", _watching(process)]
        for _ in range(workers if apart else 1):
            count = ["--workers", "1" if apart else str(workers)]
            command = [sys.executable, *module, "--data", str(self.local.data), *count]
            with Path(logs or self.local.data / "logs" / "yard.log").open("ab") as log:
                child = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
            self.supervisors.append(child)
        eventually(lambda: len(self.ready()) >= before + workers, 120)

    def stop(self) -> None:
        """End every worker at once."""
        for supervisor in self.supervisors:
            with suppress(psutil.NoSuchProcess):
                family = psutil.Process(supervisor.pid).children(recursive=True)
                supervisor.kill()
                for process in family:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            supervisor.wait()

    def workers(self) -> list[WorkerStatus]:
        """Return the workers that beat."""
        return self.farm.workers()

    def ready(self) -> list[WorkerStatus]:
        """Return the workers that serve queues and whose processes live."""
        return [worker for worker in self.workers() if worker.queues and psutil.pid_exists(worker.pid)]

    def submit(self, count: int = 1, **values: object) -> Job:
        """Submit a job whose pictures nobody has."""
        given = {"prompt": "a cat", "seed": 1, "count": count, "steps": 4, "width": 64, "height": 64, "lane": "batch",
                 "reuse": False}  # fmt: skip
        return self.farm.submit(JobSpec.check(given | values))

    # ---- faults

    def pids(self) -> list[int]:
        """Return the worker processes that run now, whether they beat or not."""
        found = []
        for supervisor in self.supervisors:
            with suppress(psutil.NoSuchProcess):
                found += [process.pid for process in psutil.Process(supervisor.pid).children()]
        return found

    def kill_one(self) -> None:
        """Kill a worker process that is chosen at random, and note how many images it held."""
        pids = self.pids()
        if not pids:
            return
        pid = random.choice(pids)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)  # so that it claims nothing while its claims are counted
            self.in_flight_at_kills += self._held({pid})
            os.kill(pid, signal.SIGKILL)
            self.kills += 1

    def _held(self, pids: set[int]) -> int:
        """Return how many images are claimed by the workers with these processes."""
        with suppress(FarmError):
            return sum(len(self.farm.ledger.claims(worker.name)) for worker in self.workers() if worker.pid in pids)
        return 0

    def freeze_one(self, seconds: float) -> None:
        """Stop a worker and its supervisor for a while, as a host that is suspended."""
        supervisor = random.choice(self.supervisors)
        with suppress(psutil.NoSuchProcess):
            family = [psutil.Process(supervisor.pid), *psutil.Process(supervisor.pid).children()]
            for process in family:
                process.suspend()
            self.in_flight_at_kills += self._held({process.pid for process in family})
            time.sleep(seconds)
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    @property
    def _log_files(self) -> list[Path]:
        return sorted((self.local.data / "valkey" / "appendonlydir").glob("*.incr.aof"))

    def watch_log(self, stop: threading.Event) -> None:
        """Note how long the server's log is, again and again, so that its last second can be cut off."""
        while not stop.wait(0.1):
            for path in self._log_files:
                with suppress(FileNotFoundError):
                    self._sizes.append((time.monotonic(), path, path.stat().st_size))
            while self._sizes and self._sizes[0][0] < time.monotonic() - 10:
                self._sizes.popleft()

    def restart_redis(self, *, away_s: float = 2.0, cut: bool = False) -> None:
        """Kill the server and start it again from its log, of which the last second may be lost."""
        (valkey,) = [child for child in self.local._servers if child.name == "valkey"]
        for worker in self.workers():
            self.in_flight_at_kills += worker.claims
        killed = time.monotonic()
        valkey.process.kill()
        valkey.process.wait()
        if cut:
            sizes = {path: size for at, path, size in self._sizes if at < killed - CUT_S}
            for path, size in sizes.items():
                if path.exists() and path.stat().st_size > size:
                    os.truncate(path, size)
        time.sleep(away_s)
        farm = FarmFile.read(self.local.data)
        assert farm is not None
        self.local._servers[self.local._servers.index(valkey)] = start_valkey(self.local.data, farm)

    # ---- what came of it

    def recount(self, job: Job) -> Counter[str]:
        """Count a job's images by state."""
        return Counter(self.farm.ledger.image_states(job.id, 0, job.spec.total))

    def published(self) -> int:
        """Count the pictures that workers say they published, whoever else did."""
        log = self.local.data / "logs" / "yard.log"
        return log.read_text().count("image published") if log.exists() else 0

    def check(self, job: Job) -> None:
        """Make sure that counters are what the states say, and that every success is one picture."""
        status = job.status()
        counts = {state: count for state, count in status.counts.items() if count}
        assert self.recount(job) == Counter(counts)
        indexes = [i for i, s in enumerate(self.farm.ledger.image_states(job.id, 0, status.total)) if s == "succeeded"]
        keys = self.farm.store.keys(f"jobs/{job.id}/")
        assert set(keys) >= {f"jobs/{job.id}/{index:06d}.png" for index in indexes}
        assert len(keys) == len(set(keys))


def _watching(process: str) -> str:
    """Return a program that supervises workers of another module."""
    return (
        "import os, sys; from pathlib import Path; from latentfarm_shared.settings import Settings;"
        "from latentfarm_worker.supervisor import Supervisor, supervise;"
        "data = Path(sys.argv[sys.argv.index('--data') + 1]);"
        "count = int(sys.argv[sys.argv.index('--workers') + 1]);"
        f"sys.exit(supervise([Supervisor(Settings.load(data), (), data, process={process!r}, back_off_s=(0.2, 0.5)) for _ in range(count)]))"
    )


@contextmanager
def yard(data: Path) -> Iterator[Yard]:
    """Run the servers of a yard."""
    with LocalFarm(data, workers=0) as local, FaultyS3(local.farm.settings.s3_endpoint or "") as s3:
        here = Yard(local, s3)
        try:
            yield here
        finally:
            here.stop()


def sweeping(farm: DirectFarm, stop: threading.Event) -> None:
    """Sweep as `latentfarm up` does."""
    while not stop.wait(0.5):
        with suppress(FarmError):
            farm.sweep()


@contextmanager
def beside(*actions: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run actions in threads for as long as the block runs."""
    stop = threading.Event()
    threads = [threading.Thread(target=action, args=(stop,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
