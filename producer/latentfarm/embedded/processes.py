"""Children of the embedded farm: started on a leash, logged to a file, stopped in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentfarm_shared.errors import Unavailable
from latentfarm_shared.settings import without_secrets_of_producers

LEASH = Path(__file__).with_name("leash.py")


@dataclass
class Child:
    """A running server or worker and the end of its log."""

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path

    def stop(self, timeout_s: float) -> None:
        """Ask it to end, and kill it when it does not."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def await_ready(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait until it answers.

        Raises:
            Unavailable: it died or did not answer in time; quotes the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(self.name, "did not start", f"its log {self.log_path} ends: {self.log_tail()}")
            time.sleep(0.05)

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return " / ".join(text.strip().splitlines()[-3:])


def start(name: str, command: Sequence[str], logs: Path, environ: dict[str, str] | None = None) -> Child:
    """Start a command that dies with this process, in a process group of its own so that Ctrl-C is ours to handle.

    Call from the main thread: on Linux the leash is tied to the thread that starts it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log_path = logs / f"{name}.log"
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=without_secrets_of_producers() if environ is None else environ,
            start_new_session=True,
        )
    return Child(name, process, log_path)


def free_ports(count: int, preferred: Sequence[int] = ()) -> list[int]:
    """Return ports nobody listens on at loopback: the preferred ones where free, else others."""
    held: list[socket.socket] = []
    try:
        return [_bind(wanted, held) for wanted in [*preferred, *[0] * (count - len(preferred))][:count]]
    finally:
        for sock in held:
            sock.close()


def _bind(wanted: int, held: list[socket.socket]) -> int:
    while True:
        sock = socket.socket()
        held.append(sock)
        try:
            sock.bind(("127.0.0.1", wanted))
        except OSError:
            wanted = 0
            continue
        port: int = sock.getsockname()[1]
        return port
