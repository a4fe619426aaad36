"""The supervisor: keeps one worker process alive, beats its leases, brings it orders. Knows no torch.

It beats every second for the process it watches, as long as that process is alive and its phase moves on; so a long
hold of Python's lock loses nothing, and a hung device keeps nothing.
"""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from latentfarm_shared.errors import FarmError
from latentfarm_shared.ledger import Ledger
from latentfarm_shared.logs import log
from latentfarm_shared.settings import Settings
from latentfarm_shared.storage import ObjectStore

from latentfarm_worker.vitals import RESERVE, Signs, StallWatch, Vitals

BEAT_S = 1.0
BACK_OFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
HEALTHY_AFTER_S = 60.0
FATAL_EXITS = (2,)


class Supervisor:
    """Runs one worker until it is told to stop."""

    def __init__(
        self,
        settings: Settings,
        models: tuple[str, ...] = (),
        data: Path | None = None,
        process: str = "latentfarm_worker.process",
    ) -> None:
        """Name the worker; nothing is started yet. `process` is the module that is run and watched."""
        self.name = f"{socket.gethostname()}-{secrets.token_hex(3)}"
        self._settings, self._models, self._data, self._process = settings, models, data, process
        self._ledger = Ledger.connect(settings)
        self._stop_at: float | None = None

    def run(self) -> int:
        """Keep the process running; return the exit code once it ended for good.

        Raises:
            Unavailable: Redis or S3 does not answer or refuses us, at the start.
        """
        self._ledger.check()
        ObjectStore(self._settings).check()
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        failures = 0
        while True:
            started = time.monotonic()
            code = self._run_once()
            if self._stop_at is not None or code in FATAL_EXITS:
                self._leave()
                return 0 if self._stop_at is not None else code
            failures = 0 if time.monotonic() - started > HEALTHY_AFTER_S else failures + 1
            pause = BACK_OFF_S[min(failures, len(BACK_OFF_S) - 1)]
            log.warning("worker process died", worker=self.name, code=code, again_in_s=pause)
            self._sleep(pause)

    def _on_signal(self, *_: object) -> None:
        """First signal: drain within the grace period; second: hurry."""
        grace = self._settings.grace_s if self._stop_at is None else 0.0
        self._stop_at = time.monotonic() + grace

    def _run_once(self) -> int:
        """Start the process under a fresh name and watch it to its end."""
        self.name = f"{socket.gethostname()}-{secrets.token_hex(3)}"
        with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
            path = Path(folder) / "vitals"
            vitals = Vitals(path, create=True)
            command = [sys.executable, "-m", self._process, "--name", self.name, "--vitals", str(path)]
            command += ["--models", ",".join(self._models)] + (["--data", str(self._data)] if self._data else [])
            process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, text=True)
            try:
                return self._watch(process, vitals)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()

    def _watch(self, process: subprocess.Popen[str], vitals: Vitals) -> int:
        watch, drained_for = StallWatch(), None
        while process.poll() is None:
            if self._stop_at is not None and drained_for != self._stop_at:
                drained_for = self._stop_at
                self._order(process, f"drain {max(0.0, self._stop_at - time.monotonic()):.2f}")
            signs = vitals.read()
            if watch.is_stalled(signs):
                log.error("worker process hangs; killing it", worker=self.name, phase=signs.phase)
                process.kill()
                break
            for member in self._beat(process, signs):
                self._order(process, f"cancel {member}")
            self._pause(process)
        return process.wait()

    def _pause(self, process: subprocess.Popen[str]) -> None:
        """Wait one beat, or less when the process ends or a signal comes."""
        before = self._stop_at
        until = time.monotonic() + BEAT_S
        while time.monotonic() < until and process.poll() is None and self._stop_at == before:
            time.sleep(0.05)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._stop_at is None:
            time.sleep(0.05)

    def _beat(self, process: subprocess.Popen[str], signs: Signs) -> list[str]:
        fields: dict[str, str | int] = {
            "pid": process.pid,
            "host": socket.gethostname(),
            "device": self._settings.device,
            "checkpoints": ",".join(signs.checkpoints),
            "slots": signs.slots,
            "reserve": RESERVE,
            "loads": signs.loads,
            "cache_hits": signs.cache_hits,
            "cache_misses": signs.cache_misses,
            "phase": signs.phase,
            "draining": int(self._stop_at is not None),
        }
        try:
            return self._ledger.beat(self.name, fields)
        except FarmError as error:
            log.warning("no beat", worker=self.name, error=str(error))
            return []

    @staticmethod
    def _order(process: subprocess.Popen[str], line: str) -> None:
        if process.stdin is None:
            return
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            log.debug("worker process is gone", order=line)

    def _leave(self) -> None:
        try:
            self._ledger.leave(self.name)
        except FarmError as error:
            log.warning("could not sign off", worker=self.name, error=str(error))
