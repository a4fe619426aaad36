"""`latentfarm jobs watch`: a table of jobs that moves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentfarm_shared.ledger import JobStatus
    from rich.table import Table

LOOK_S, REMEMBERED = 0.5, 60
WIDTH = 10
COLUMNS = {"id": 16, "state": 9, "": WIDTH, "done": 9, "images/s": 8, "left": 7}


@dataclass
class Pace:
    """How fast a job's images come, over the last half minute."""

    _seen: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def note(self, finished: int, at: float) -> None:
        """Note how many are finished."""
        self._seen.append((at, finished))

    @property
    def per_second(self) -> float:
        """Images a second; 0 if that is not known yet."""
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if ended > began else 0.0

    def left(self, images: int) -> str:
        """Return how long so many images will take, in words."""
        return clock(images / self.per_second) if self.per_second > 0 and images else ""


def clock(seconds: float) -> str:
    """Return a time as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def watch(
    look: Callable[[], Sequence[JobStatus]], *, is_endless: bool, timeout_s: float | None = None
) -> Sequence[JobStatus]:
    """Show jobs until all are over, or without end; return where they stand then.

    Raises:
        WaitTimeout: it took longer.
    """
    from rich.console import Console  # noqa: PLC0415 - keeps --help fast
    from rich.live import Live  # noqa: PLC0415

    paces: dict[str, Pace] = {}
    began = time.monotonic()
    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            statuses = look()
            for status in statuses:
                paces.setdefault(status.id, Pace()).note(status.finished, time.monotonic())
            live.update(table_of(statuses, paces), refresh=True)
            if not is_endless and all(status.is_final for status in statuses):
                return statuses
            if timeout_s is not None and time.monotonic() - began > timeout_s:
                from latentfarm.jobs import WaitTimeout  # noqa: PLC0415

                open_ = [status.id for status in statuses if not status.is_final]
                raise WaitTimeout(open_[0] if open_ else "none", timeout_s)
            time.sleep(LOOK_S)


def table_of(statuses: Sequence[JobStatus], paces: dict[str, Pace]) -> Table:
    """Return jobs as rows."""
    from rich.markup import escape  # noqa: PLC0415
    from rich.progress_bar import ProgressBar  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name, width in COLUMNS.items():
        table.add_column(name, no_wrap=True, overflow="ellipsis", min_width=width)
    table.add_column("prompt", no_wrap=True, overflow="ellipsis")
    for status in statuses:
        pace, failed = paces[status.id], status.counts["failed"]
        done = f"{status.finished}/{status.total}" + (f", {failed} failed" if failed else "")
        rate = "" if status.is_final or not pace.per_second else f"{pace.per_second:.2f}"
        left = "" if status.is_final else pace.left(status.total - status.finished)
        bar = ProgressBar(total=status.total, completed=status.finished, width=WIDTH)
        table.add_row(status.id, status.state, bar, done, rate, left, escape(status.name or status.prompt))
    return table
