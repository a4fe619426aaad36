"""Progress bars: on stderr, or in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from latentfarm_shared.ledger import JobStatus

Tell = Callable[["JobStatus"], None]


class Update(Protocol):
    """Tells a bar how many are done, of how many if that is known, and a word on the state."""

    def __call__(self, done: int, total: int | None, word: str) -> None:
        """Tell it."""
        ...


@contextmanager
def bar() -> Iterator[Update]:
    """Show a bar; yield what moves it."""
    from rich.console import Console  # noqa: PLC0415 - it takes long to import
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("queued", total=None)

        def update(done: int, total: int | None, word: str) -> None:
            shown.update(task, completed=done, total=total, description=word)

        yield update


@contextmanager
def told(on_change: Tell | None, *, progress: bool) -> Iterator[Tell]:
    """Yield what hears of a job's changes: a bar if one is to be shown, and whoever else listens."""
    listens = on_change or _nobody
    if not progress:
        yield listens
        return
    with bar() as update:

        def tell(status: JobStatus) -> None:
            update(status.finished, status.total, status.state)
            listens(status)

        yield tell


def _nobody(status: JobStatus) -> None:
    """Tell nobody."""
