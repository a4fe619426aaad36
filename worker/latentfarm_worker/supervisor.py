"""The supervisor: keeps worker processes alive, one a device, beats their leases, brings them orders. Knows no torch.

It beats every second for a process it watches, as long as that process is alive and its phase moves on; so a long
hold of Python's lock loses nothing, and a hung device keeps nothing.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from latentfarm_shared import __version__
from latentfarm_shared.errors import FarmError
from latentfarm_shared.ledger import Ledger
from latentfarm_shared.logs import log
from latentfarm_shared.settings import Settings
from latentfarm_shared.storage import ObjectStore

from latentfarm_worker.vitals import RESERVE, Signs, StallWatch, Vitals

BEAT_S = 1.0
BACK_OFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
HEALTHY_AFTER_S = 60.0
FATAL_EXITS = (2,)
FRUITLESS_LIVES = 6
RATE_WINDOW_S = 10.0
PROCESS = "latentfarm_worker.process"


class RateWatch:
    """Measures how many pixel-steps a second a process does while it is never idle."""

    def __init__(self) -> None:
        self._since, self._done = time.monotonic(), -1
        self.rate = 0.0

    def note(self, signs: Signs) -> bool:
        """Take a reading into account; tell whether there is a new rate."""
        now = time.monotonic()
        if signs.phase in ("importing", "loading", "idle") or self._done < 0:
            self._since, self._done = now, signs.pixel_steps
            return False
        if now - self._since < RATE_WINDOW_S or signs.pixel_steps == self._done:
            return False
        self.rate = (signs.pixel_steps - self._done) / (now - self._since)
        self._since, self._done = now, signs.pixel_steps
        return True


class Supervisor:
    """Runs one worker until it is told to stop."""

    def __init__(
        self,
        settings: Settings,
        models: tuple[str, ...] = (),
        data: Path | None = None,
        *,
        process: str = PROCESS,
        environ: Mapping[str, str] | None = None,
        back_off_s: Sequence[float] = BACK_OFF_S,
    ) -> None:
        """Name the worker; nothing is started yet. `process` is the module that is run and watched, in `environ`.

        After its n-th death in a row it is started again after `back_off_s[n]` seconds.
        """
        self.station = f"{socket.gethostname()}-{secrets.token_hex(3)}"
        self.name = f"{self.station}.0"
        self._settings, self._models, self._data, self._process = settings, models, data, process
        self._environ = dict(os.environ if environ is None else environ)
        self._back_off_s = back_off_s
        self._ledger = Ledger.connect(settings)
        self._stop_at: float | None = None
        self._lives, self._fruitless, self._images, self._hung = 0, 0, 0, False
        self._told: set[str] = set()

    def check(self) -> None:
        """Make sure Redis and S3 answer.

        Raises:
            Unavailable: one does not, or refuses us.
        """
        self._ledger.check()
        ObjectStore(self._settings).check()

    def stop(self) -> None:
        """Drain within the grace period; called again, hurry."""
        grace = self._settings.grace_s if self._stop_at is None else 0.0
        self._stop_at = time.monotonic() + grace

    def run(self) -> int:
        """Keep the process running; return the exit code once it ended for good."""
        failures = 0
        while self._stop_at is None:
            if self._is_aside():
                self._sleep(BEAT_S)
                continue
            started = time.monotonic()
            code = self._run_once()
            if self._stop_at is not None:
                break
            if code in FATAL_EXITS:
                self._leave()
                return code
            self._note_death(code)
            failures = 0 if time.monotonic() - started > HEALTHY_AFTER_S or self._images else failures + 1
            pause = self._back_off_s[min(failures, len(self._back_off_s) - 1)]
            log.warning("worker process died", worker=self.name, code=code, again_in_s=pause)
            self._sleep(pause)
        self._leave()
        return 0

    def _note_death(self, code: int) -> None:
        """Take back what the process held; set the worker aside when life after life takes images and finishes none.

        A process that somebody killed did not die of itself, unless we did because it hung; what kills it for the memory
        an image takes is found at the image, which is run alone.
        """
        is_own = code != -signal.SIGKILL or self._hung
        try:
            held = self._ledger.bury(self.name, killed=not is_own)
            if self._images:
                self._fruitless = 0
            elif held and is_own:
                self._fruitless += 1
            if self._fruitless >= FRUITLESS_LIVES:
                story = (
                    f"died {self._fruitless} times in a row holding images and finishing none, last with code {code}"
                )
                log.error("worker set aside", worker=self.station, story=story)
                self._ledger.set_aside(self.station, story)
                self._fruitless = 0
        except FarmError as error:
            log.warning("leases will run out", worker=self.name, error=str(error))

    def _is_aside(self) -> bool:
        try:
            return self._ledger.is_aside(self.station)
        except FarmError:
            return False

    def _run_once(self) -> int:
        """Start the process under a fresh name and watch it to its end."""
        self._lives += 1
        self._hung = False
        self.name = f"{self.station}.{self._lives}"
        with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
            path = Path(folder) / "vitals"
            vitals = Vitals(path, create=True)
            command = [sys.executable, "-m", self._process, "--name", self.name, "--vitals", str(path)]
            command += ["--models", ",".join(self._models)] + (["--data", str(self._data)] if self._data else [])
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0, env=self._environ
            )
            self._told.clear()
            if process.stdin is not None:
                os.set_blocking(process.stdin.fileno(), False)  # one that does not listen must not hold us up
            try:
                return self._watch(process, vitals)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
                self._images = vitals.read().images

    def _watch(self, process: subprocess.Popen[bytes], vitals: Vitals) -> int:
        watch, rates, drained_for, is_held = StallWatch(self._settings.stall_s), RateWatch(), None, False
        while process.poll() is None:
            if self._stop_at is not None and drained_for != self._stop_at:
                drained_for = self._stop_at
                self._order(process, f"drain {max(0.0, self._stop_at - time.monotonic()):.2f}")
            signs = vitals.read()
            if watch.is_stalled(signs):
                log.error("worker process hangs; killing it", worker=self.name, phase=signs.phase)
                self._hung = True
                process.kill()
                break
            with suppress(FarmError):
                if rates.note(signs):
                    self._ledger.note_rate(signs.checkpoints, rates.rate)
            is_held = self._beat(process, signs, rates.rate, is_held=is_held)
            self._pause(process)
        return process.wait()

    def _pause(self, process: subprocess.Popen[bytes]) -> None:
        """Wait one beat, or less when the process ends or a stop is asked for."""
        before = self._stop_at
        until = time.monotonic() + BEAT_S
        while self._stop_at == before and (left := until - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(left, 0.25))
                return

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._stop_at is None:
            time.sleep(0.05)

    def _beat(self, process: subprocess.Popen[bytes], signs: Signs, rate: float, *, is_held: bool) -> bool:
        """Beat once and pass on what it brings; tell whether the worker is held now."""
        fields: dict[str, str | int | float] = {
            "pid": process.pid,
            "host": socket.gethostname(),
            "device": self._settings.device if self._settings.engine == "torch" else "simulated",
            "checkpoints": ",".join(signs.checkpoints),
            "queues": ",".join(signs.queues),
            "lanes": ",".join(self._settings.lanes),
            "tags": ",".join(self._settings.tags),
            "slots": signs.slots,
            "reserve": RESERVE,
            "loads": signs.loads,
            "embeddings": signs.embeddings,
            "cache_hits": signs.cache_hits,
            "cache_misses": signs.cache_misses,
            "images": signs.images,
            "rate": round(rate, 1),
            "memory_mb": _memory_mb(process.pid),
            "phase": signs.phase,
            "version": __version__,
            "last_error": signs.last_error,
            "draining": int(self._stop_at is not None or is_held),
        }
        try:
            orders = self._ledger.beat(self.name, fields)
        except FarmError as error:
            log.warning("no beat", worker=self.name, error=str(error))
            return is_held
        for member in set(orders.closed) - self._told:
            self._order(process, f"cancel {member}")
        self._told = set(orders.closed)
        if orders.drained != is_held and self._stop_at is None:
            self._order(process, "hold" if orders.drained else "go")
        return orders.drained

    @staticmethod
    def _order(process: subprocess.Popen[bytes], line: str) -> None:
        if process.stdin is None:
            return
        try:
            process.stdin.write(f"{line}\n".encode())
        except BlockingIOError:
            log.warning("worker process does not listen", order=line)
        except BrokenPipeError:
            log.debug("worker process is gone", order=line)

    def _leave(self) -> None:
        try:
            self._ledger.leave(self.name)
        except FarmError as error:
            log.warning("could not sign off", worker=self.name, error=str(error))


def _memory_mb(pid: int) -> int:
    """Return how much memory a process has resident, where the system tells."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def supervise(supervisors: Sequence[Supervisor]) -> int:
    """Run several workers until SIGTERM or Ctrl-C; a second signal hurries. Returns the worst exit code.

    Raises:
        Unavailable: Redis or S3 does not answer or refuses us, at the start.
    """
    supervisors[0].check()

    def on_signal(*_: object) -> None:
        for supervisor in supervisors:
            supervisor.stop()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    if len(supervisors) == 1:
        return supervisors[0].run()
    codes: list[int] = []

    def run(supervisor: Supervisor) -> None:
        try:
            codes.append(supervisor.run())
        except Exception:  # noqa: BLE001 - the others go on; the exit code tells
            log.exception("supervisor ended", worker=supervisor.station)
            codes.append(1)

    threads = [threading.Thread(target=run, args=(supervisor,)) for supervisor in supervisors]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.1)
    return max(codes, default=0)
