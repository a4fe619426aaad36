"""Composition root of the worker process, started by the supervisor: a Celery worker around one engine.

Orders come on standard input, a line each. When standard input ends, the supervisor is gone and so is this process,
at once: its leases run out and its images run elsewhere within seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from celery.signals import setup_logging, worker_ready
from latentfarm_shared.errors import FarmError
from latentfarm_shared.housekeeping import Housekeeper
from latentfarm_shared.ledger import Ledger
from latentfarm_shared.ledger.queues import LANES
from latentfarm_shared.logs import configure_logs, log
from latentfarm_shared.settings import Settings
from latentfarm_shared.storage import NoStore, ObjectStore, Store
from latentfarm_shared.wakeups import TASK, celery_queue, make_celery, ring

from latentfarm_worker.backend import Backend
from latentfarm_worker.vitals import RESERVE, Vitals
from latentfarm_worker.worker import Worker

LOOK_EVERY_S = 2.0
SWEEP_EVERY_S = 1.0
RETRY_LOAD_S = 30.0
PASS_ON_S = 0.02  # before a wake-up that found no room here is passed on
HURRY_S = 0.8
PR_SET_PDEATHSIG = 1

MakeBackend = Callable[[str, Settings, Ledger, ObjectStore, Callable[[], None]], Backend]


def make_backend(
    name: str, settings: Settings, ledger: Ledger, store: ObjectStore, on_progress: Callable[[], None]
) -> Backend:
    """Return the backend the settings ask for; only the real one needs torch."""
    if settings.engine == "simulated":
        from latentfarm_worker.simulated import SimulatedBackend  # noqa: PLC0415 - one or the other

        return SimulatedBackend(name, settings, ledger, store, on_progress)
    from latentfarm_worker.torch_backend import TorchBackend  # noqa: PLC0415 - the same

    return TorchBackend(name, settings, ledger, store, on_progress)


class WorkerProcess:
    """Ties a `Worker` to Celery, to the supervisor's orders and to the sweeper."""

    def __init__(
        self, settings: Settings, name: str, vitals: Vitals, models: frozenset[str], make: MakeBackend = make_backend
    ) -> None:
        """Wire everything; `models` are the checkpoints to serve, none for all."""
        self._settings, self._name, self._models = settings, name, models
        self._ledger = Ledger.connect(settings)
        self._celery = make_celery(settings)
        store = ObjectStore(settings)
        pictures: Store = NoStore() if settings.engine == "simulated" and not settings.simulate_s3 else store
        self._backend = make(name, settings, self._ledger, store, vitals.progress)
        self._worker = Worker(name, settings, self._ledger, pictures, vitals, self._backend)
        self._housekeeper = Housekeeper(self._ledger, store)
        self._vitals = vitals
        self._node = f"latentfarm@{name}"
        self._consumed: set[str] = set()
        self._retry_at: dict[str, float] = {}
        self._register_task()

    def run(self) -> None:
        """Load what is there, then serve until told to stop."""
        threading.Thread(target=self._obey, name="orders", daemon=True).start()
        self._vitals.beat("loading")
        self._load_new()
        queues = self._worker.advertise()
        self._consumed = set(queues)
        self._worker.start()
        self._begin()
        setup_logging.connect(lambda **_: None, weak=False)
        worker_ready.connect(self._on_ready, weak=False)
        self._celery.worker_main(
            [
                "--quiet", "worker", "-P", "threads", "-c", str(self._settings.slots + RESERVE), "-n", self._node, "-l", "WARNING",
                "-Q", ",".join(map(celery_queue, queues)) or "lf.none",
                "--without-gossip", "--without-mingle", "--without-heartbeat",
            ]
        )  # fmt: skip

    def _register_task(self) -> None:
        @self._celery.task(name=TASK, shared=False)
        def wake(queue: str, ticket: str) -> None:
            self._ledger.answered(queue, ticket)
            if not self._worker.serve(lambda: self._ring(queue), urgent=queue.startswith(LANES[0])):
                time.sleep(PASS_ON_S)
                self._ring(queue)

    def _begin(self) -> None:
        """Serve what waits already, while Celery is still coming up: a slot each, as wake-ups would."""
        for number in range(self._settings.slots):
            serve = threading.Thread(target=self._serve_early, name=f"early {number}", daemon=True)
            serve.start()

    def _serve_early(self) -> None:
        try:
            self._worker.serve(lambda: None, urgent=False)
        except FarmError as error:
            log.warning("wake-ups will find what is left", error=str(error))

    def _ring(self, queue: str) -> None:
        ring(self._celery, queue, self._ledger.ring(queue))

    def _load_new(self) -> None:
        """Load checkpoints that are registered, wanted and not loaded.

        One that cannot be loaded is tried again later and keeps none of the others from being served.
        """
        for record in self._backend.checkpoints():
            wanted = not self._models or record.name.lower() in self._models
            if not wanted or self._worker.has(record) or time.monotonic() < self._retry_at.get(record.hash, 0.0):
                continue
            try:
                self._worker.load(record)
            except Exception as error:  # noqa: BLE001 - files of any origin fail in any way
                log.error("checkpoint cannot be loaded", checkpoint=record.name, error=str(error), worker=self._name)
                self._vitals.note_error(f"checkpoint {record.name}: {error}")
                self._retry_at[record.hash] = time.monotonic() + RETRY_LOAD_S

    def _on_ready(self, **_: object) -> None:
        log.info("worker ready", worker=self._name)
        duties = [("sweeper", SWEEP_EVERY_S, self._sweep), ("look", LOOK_EVERY_S, self._look)]
        duties += [("closed", 0.0, self._hear_of_closed), ("housekeeper", SWEEP_EVERY_S, self._housekeeper.keep)]
        for name, seconds, action in [*duties, *self._backend.duties()]:
            threading.Thread(target=self._every, args=(seconds, action), name=name, daemon=True).start()

    @staticmethod
    def _every(seconds: float, action: Callable[[], None]) -> None:
        """Do something again and again; an error is logged and the next turn comes all the same."""
        while True:
            time.sleep(seconds)
            try:
                action()
            except FarmError as error:
                log.warning("will try again", error=str(error))
                time.sleep(1)
            except Exception:  # noqa: BLE001 - a background thread must not end in silence
                log.exception("will try again")
                time.sleep(1)

    def _sweep(self) -> None:
        for queue, ticket in self._ledger.sweep():
            ring(self._celery, queue, [ticket])
        self._worker.reconcile()

    def _look(self) -> None:
        """Serve checkpoints and queues that are new: consume them, then advertise them."""
        self._load_new()
        queues = self._worker.advertise()
        for queue in set(queues) - self._consumed:
            self._celery.control.add_consumer(celery_queue(queue), destination=[self._node])
            self._consumed.add(queue)

    def _hear_of_closed(self) -> None:
        """Drop images of jobs that are closed, as soon as that is said; the beat tells of those not heard of."""
        for job in self._ledger.closed_jobs():
            self._worker.cancel_job(job)

    def _obey(self) -> None:
        for line in sys.stdin:
            order, _, rest = line.strip().partition(" ")
            if order == "cancel":
                self._worker.cancel(rest)
            elif order == "hold":
                self._worker.stop_claiming()
            elif order == "go":
                self._worker.go_on_claiming()
            elif order == "drain":
                threading.Thread(target=self._drain, args=(float(rest),), daemon=True).start()
        os._exit(1)

    def _drain(self, grace_s: float) -> None:
        """Finish what fits in `grace_s` seconds, hand the rest back, and end."""
        self._worker.stop_claiming()
        deadline = time.monotonic() + grace_s
        while self._worker.in_flight and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._worker.in_flight:
            self._worker.hand_back(HURRY_S)
        log.info("worker drained", worker=self._name, left=self._worker.in_flight)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(HURRY_S)
        os._exit(0)


def main(make: MakeBackend = make_backend) -> None:
    """Parse what the supervisor passes and run."""
    parser = argparse.ArgumentParser(prog="latentfarm_worker.process")
    parser.add_argument("--name", required=True)
    parser.add_argument("--vitals", type=Path, required=True)
    parser.add_argument("--models", default="")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # a process stuck in its device hears no end of input; the kernel ends it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        settings = Settings.load(arguments.data)
        configure_logs(settings.log_level, settings.log_format)
        vitals = Vitals(arguments.vitals)
        models = frozenset(filter(None, arguments.models.lower().split(",")))
        WorkerProcess(settings, arguments.name, vitals, models, make).run()
    except FarmError as error:
        log.error("worker cannot start", error=str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
