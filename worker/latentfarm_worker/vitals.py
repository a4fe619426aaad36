"""A worker's vital signs in a shared file: what it does, and a counter that grows while it does it.

The worker process writes, its supervisor reads. A phase whose counter stands still past its limit means a hung
device, so the supervisor stops beating and kills the process; a long hold of Python's lock loses nothing.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

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
RESERVE = 2  # images of the interactive lane a worker takes beside its slots
_LAYOUT = struct.Struct("<BxxxIIIIIQ")
_TEXT = 4096
_SIZE = _LAYOUT.size + 4 + _TEXT


@dataclass(frozen=True)
class Signs:
    """One reading: `loads` counts checkpoint loads since the start, `checkpoints` are the hashes ready to use."""

    phase: str
    slots: int
    loads: int
    embeddings: int
    cache_hits: int
    cache_misses: int
    progress: int
    checkpoints: tuple[str, ...]


class Vitals:
    """The shared file, open for writing in the worker and for reading in the supervisor."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open the file, made anew if `create`."""
        if create:
            path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._progress, self._phase = 0, 0
        self._counts = (0, 0, 0)
        self._cache = (0, 0)

    def beat(self, phase: str) -> None:
        """Write a new phase and count progress."""
        self._phase = PHASES.index(phase)
        self._write()

    def note(self, slots: int, loads: int, embeddings: int) -> None:
        """Write new counts and count progress; the phase stays."""
        self._counts = (slots, loads, embeddings)
        self._write()

    def note_cache(self, hits: int, misses: int) -> None:
        """Write how often encoded prompts were found again, and count progress."""
        self._cache = (hits, misses)
        self._write()

    def progress(self) -> None:
        """Count progress alone."""
        self._write()

    def _write(self) -> None:
        self._progress += 1
        _LAYOUT.pack_into(self._map, 0, self._phase, *self._counts, *self._cache, self._progress)

    def advertise(self, checkpoints: list[str]) -> None:
        """Write which checkpoints are ready."""
        text = ",".join(checkpoints).encode()[:_TEXT]
        self._map[_LAYOUT.size : _LAYOUT.size + 4 + len(text)] = struct.pack("<I", len(text)) + text

    def read(self) -> Signs:
        """Return the latest reading."""
        phase, slots, loads, embeddings, hits, misses, progress = _LAYOUT.unpack_from(self._map, 0)
        (length,) = struct.unpack_from("<I", self._map, _LAYOUT.size)
        text = bytes(self._map[_LAYOUT.size + 4 : _LAYOUT.size + 4 + length]).decode()
        checkpoints = tuple(filter(None, text.split(",")))
        return Signs(PHASES[phase], slots, loads, embeddings, hits, misses, progress, checkpoints)


class StallWatch:
    """Tells when a process has stood still in a phase for longer than the phase's limit."""

    def __init__(self) -> None:
        """Start watching now."""
        self._seen = (-1, "")
        self._since = time.monotonic()

    def is_stalled(self, signs: Signs, now: float | None = None) -> bool:
        """Take a reading into account; `now` is in seconds on a monotonic clock."""
        now = time.monotonic() if now is None else now
        if (signs.progress, signs.phase) != self._seen:
            self._seen, self._since = (signs.progress, signs.phase), now
        return now - self._since > STALL_LIMIT_S[signs.phase]
