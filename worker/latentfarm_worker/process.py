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

import torch
from celery.signals import setup_logging, worker_ready
from latentfarm_shared.errors import FarmError, InvalidField
from latentfarm_shared.ledger import Ledger
from latentfarm_shared.ledger.ledger import LANES
from latentfarm_shared.logs import configure_logs, log
from latentfarm_shared.settings import Settings
from latentfarm_shared.storage import ObjectStore
from latentfarm_shared.wakeups import TASK, celery_queue, make_celery, ring

from latentfarm_worker.folder import FolderWatch
from latentfarm_worker.vitals import RESERVE, Vitals
from latentfarm_worker.worker import Worker

LOOK_EVERY_S = 2.0
LOOK_AT_FOLDER_S = 1.0
SWEEP_EVERY_S = 1.0
RETRY_LOAD_S = 30.0
PR_SET_PDEATHSIG = 1


class WorkerProcess:
    """Ties a `Worker` to Celery, to the supervisor's orders and to the sweeper."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        vitals: Vitals,
        models: frozenset[str],
        make_worker: Callable[[str, Settings, Ledger, ObjectStore, Vitals], Worker] = Worker,
    ) -> None:
        """Wire everything; `models` are the checkpoints to serve, none for all."""
        self._settings, self._name, self._models = settings, name, models
        self._ledger = Ledger.connect(settings)
        self._celery = make_celery(settings)
        self._worker = make_worker(name, settings, self._ledger, ObjectStore(settings), vitals)
        self._vitals = vitals
        self._node = f"latentfarm@{name}"
        self._retry_at: dict[str, float] = {}
        self._register_task()

    def run(self) -> None:
        """Load what is there, then serve until told to stop."""
        threading.Thread(target=self._obey, name="orders", daemon=True).start()
        self._vitals.beat("loading")
        queues = self._load_new()
        self._worker.advertise()
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
            self._worker.serve(lambda: self._ring(queue), urgent=queue.startswith(LANES[0]))

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

    def _load_new(self) -> list[str]:
        """Load checkpoints that are registered, wanted and not loaded; return their queues.

        One that cannot be loaded is tried again later and keeps none of the others from being served.
        """
        queues: list[str] = []
        for record in self._worker.registry.checkpoints().values():
            wanted = not self._models or record.name.lower() in self._models
            if not wanted or self._worker.has(record) or time.monotonic() < self._retry_at.get(record.hash, 0.0):
                continue
            try:
                queues += self._worker.load(record)
            except Exception as error:  # noqa: BLE001 - files of any origin fail in any way
                log.error("checkpoint cannot be loaded", checkpoint=record.name, error=str(error), worker=self._name)
                self._retry_at[record.hash] = time.monotonic() + RETRY_LOAD_S
        return queues

    def _on_ready(self, **_: object) -> None:
        log.info("worker ready", worker=self._name)
        threading.Thread(target=self._every, args=(SWEEP_EVERY_S, self._sweep), name="sweeper", daemon=True).start()
        threading.Thread(target=self._every, args=(LOOK_EVERY_S, self._look), name="look", daemon=True).start()
        self._follow_embeddings()

    def _follow_embeddings(self) -> None:
        """Keep up with the library, and with the watched folder if there is one."""
        follow = self._worker.residents.follow
        threading.Thread(target=self._every, args=(0, follow), name="embeddings", daemon=True).start()
        if self._settings.embeddings_dir is not None:
            watch = FolderWatch(self._settings.embeddings_dir, self._worker.intake())
            threading.Thread(
                target=self._every, args=(LOOK_AT_FOLDER_S, watch.look), name="folder", daemon=True
            ).start()

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
        """Serve checkpoints that were registered since: consume their queues, then advertise them."""
        queues = self._load_new()
        for queue in queues:
            self._celery.control.add_consumer(celery_queue(queue), destination=[self._node])
        if queues:
            self._worker.advertise()

    def _obey(self) -> None:
        for line in sys.stdin:
            order, _, rest = line.strip().partition(" ")
            if order == "cancel":
                self._worker.cancel(rest)
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
            self._worker.hand_back()
        last = time.monotonic() + 2
        while self._worker.in_flight and time.monotonic() < last:
            time.sleep(0.02)
        log.info("worker drained", worker=self._name, left=self._worker.in_flight)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        os._exit(0)


def check_folder(folder: Path | None) -> None:
    """Make sure the folder to watch is there.

    Raises:
        InvalidField: it is not.
    """
    if folder is not None and not folder.is_dir():
        raise InvalidField("embeddings-dir", f"{folder} is no folder")


def check_device(device: str) -> None:
    """Make sure the device is there.

    Raises:
        InvalidField: it is not.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidField("device", f"{device!r}: PyTorch sees no CUDA device here")
    if device == "mps" and not torch.backends.mps.is_available():
        raise InvalidField("device", "'mps': PyTorch sees no Apple GPU here")


def main(make_worker: Callable[[str, Settings, Ledger, ObjectStore, Vitals], Worker] = Worker) -> None:
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
        check_device(settings.device)
        check_folder(settings.embeddings_dir)
        WorkerProcess(settings, arguments.name, vitals, models, make_worker).run()
    except FarmError as error:
        log.error("worker cannot start", error=str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
