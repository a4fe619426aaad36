"""A bound in bytes on what waits to be published, so that a slow store stops claims and not the device."""

from __future__ import annotations

import threading


class Room:
    """So many bytes, shared between threads; one picture is let in however large."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._used = limit_bytes, 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until `size` bytes fit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size

    def give(self, size: int) -> None:
        """Give them back."""
        with self._changed:
            self._used -= size
            self._changed.notify_all()
