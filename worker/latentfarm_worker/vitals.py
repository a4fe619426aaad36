"""A worker's vital signs in a shared file: what it does, and a counter that grows while it does it.

The worker process writes, its supervisor reads. A phase whose counter stands still past its limit means a hung
device, so the supervisor stops beating and kills the process; a long hold of Python's lock loses nothing.
"""

from __future__ import annotations

import json
import mmap
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentfarm_shared.logs import log

from latentfarm_worker.counts import Counts

PHASES = ("importing", "loading", "idle", "encoding", "denoising", "decoding", "upscaling", "tuning")
STALL_LIMIT_S = {
    "importing": 180.0,
    "loading": 900.0,
    "idle": float("inf"),
    "encoding": 120.0,
    "denoising": 120.0,
    "decoding": 300.0,
    "upscaling": 300.0,
    "tuning": 300.0,
}
DEVICE_PHASES = ("encoding", "denoising", "decoding", "upscaling", "tuning")
RESERVE = 2  # images of the interactive lane a worker takes beside its slots
_LAYOUT = struct.Struct("<BxxxIIIIIIQQ")
_TEXT = 64 * 1024
_SIZE = _LAYOUT.size + 4 + _TEXT
MAX_ERROR = 500


@dataclass(frozen=True)
class Signs:
    """One reading: `loads` counts checkpoint loads since the start, `checkpoints` are the hashes ready to use.

    `images` were published since the start, for so many `pixel_steps`.
    """

    phase: str
    slots: int
    loads: int
    embeddings: int
    cache_hits: int
    cache_misses: int
    images: int
    pixel_steps: int
    progress: int
    checkpoints: tuple[str, ...]
    queues: tuple[str, ...] = ()
    last_error: str = ""


class Vitals:
    """The shared file, open for writing in the worker and for reading in the supervisor."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open the file, made anew if `create`."""
        if create:
            path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._progress, self._phase, self._slots = 0, 0, 0
        self._counts = Counts()
        self._images, self._pixel_steps = 0, 0
        self._text: dict[str, list[str] | str] = {}
        self._seen: dict[str, Any] = {}
        self._guard = threading.Lock()

    def beat(self, phase: str) -> None:
        """Write a new phase and count progress."""
        self._phase = PHASES.index(phase)
        self._write()

    def note(self, slots: int, counts: Counts) -> None:
        """Write new counts and count progress; the phase stays."""
        self._slots, self._counts = slots, counts
        self._write()

    def note_image(self, pixel_steps: int) -> None:
        """Count a published image and what it cost."""
        with self._guard:
            self._images, self._pixel_steps = self._images + 1, self._pixel_steps + pixel_steps
        self._write()

    def progress(self) -> None:
        """Count progress alone."""
        self._write()

    def _write(self) -> None:
        with self._guard:
            self._progress += 1
            counts = self._counts
            _LAYOUT.pack_into(
                self._map, 0, self._phase, self._slots, counts.loads, counts.embeddings, counts.cache_hits,
                counts.cache_misses, self._images, self._pixel_steps, self._progress,
            )  # fmt: skip

    def advertise(self, checkpoints: list[str], queues: list[str]) -> None:
        """Write which checkpoints are ready and which queues are consumed."""
        self._write_text({"checkpoints": checkpoints, "queues": queues})

    def note_error(self, text: str) -> None:
        """Write what went wrong last."""
        self._write_text({"last_error": text[:MAX_ERROR]})

    def _write_text(self, change: dict[str, list[str] | str]) -> None:
        with self._guard:
            text = json.dumps(self._text | change).encode()
            if len(text) <= _TEXT:
                self._text |= change
                self._map[_LAYOUT.size + 4 : _LAYOUT.size + 4 + len(text)] = text
                self._map[_LAYOUT.size : _LAYOUT.size + 4] = struct.pack("<I", len(text))
            else:
                log.error("too much to advertise", bytes=len(text), most=_TEXT)

    def read(self) -> Signs:
        """Return the latest reading."""
        phase, *numbers = _LAYOUT.unpack_from(self._map, 0)
        return Signs(PHASES[phase], *numbers, **self._read_text())

    def _read_text(self) -> dict[str, Any]:
        """Return what is written as text; what is being written right now is read the next time."""
        (length,) = struct.unpack_from("<I", self._map, _LAYOUT.size)
        raw = bytes(self._map[_LAYOUT.size + 4 : _LAYOUT.size + 4 + length])
        with suppress(ValueError):
            self._seen = json.loads(raw or b"{}")
        return {
            "checkpoints": tuple(self._seen.get("checkpoints", ())),
            "queues": tuple(self._seen.get("queues", ())),
            "last_error": str(self._seen.get("last_error", "")),
        }


class StallWatch:
    """Tells when a process has stood still in a phase for longer than the phase's limit."""

    def __init__(self, limit_s: float | None = None) -> None:
        """Start watching now; `limit_s` takes the place of the limits of what the device does."""
        self._limits = STALL_LIMIT_S | (dict.fromkeys(DEVICE_PHASES, limit_s) if limit_s else {})
        self._seen = (-1, "")
        self._since = time.monotonic()

    def is_stalled(self, signs: Signs, now: float | None = None) -> bool:
        """Take a reading into account; `now` is in seconds on a monotonic clock."""
        now = time.monotonic() if now is None else now
        if (signs.progress, signs.phase) != self._seen:
            self._seen, self._since = (signs.progress, signs.phase), now
        return now - self._since > self._limits[signs.phase]
