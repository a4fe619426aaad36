"""What a shell offers when Tab is pressed: names that are here, and names of jobs; nothing where the farm does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
OFFERED, PATIENCE_S = 50, 1.0


def complete_job(incomplete: str) -> list[tuple[str, str]]:
    """Offer the newest jobs, with their prompts."""
    statuses = _asked(lambda farm: farm.statuses(OFFERED))
    return [
        (status.id, f"{status.state}: {status.name or status.prompt}"[:60])
        for status in statuses
        if status.id.startswith(incomplete)
    ]


def complete_sampler(incomplete: str) -> list[str]:
    """Offer the samplers."""
    from latentfarm_shared.names import SAMPLERS  # noqa: PLC0415

    return _beginning(incomplete, SAMPLERS)


def complete_schedule(incomplete: str) -> list[str]:
    """Offer the schedules."""
    from latentfarm_shared.names import SCHEDULES  # noqa: PLC0415

    return _beginning(incomplete, SCHEDULES)


def complete_embedding(incomplete: str) -> list[str]:
    """Offer the embeddings that can be named."""
    return _beginning(incomplete, [record.name for record in _asked(lambda farm: farm.embeddings.ls())])


def complete_model(incomplete: str) -> list[str]:
    """Offer the checkpoints."""
    return _beginning(incomplete, [record.name for record in _asked(lambda farm: farm.models.ls())])


def _asked(ask: Callable[[Any], Sequence[T]]) -> Sequence[T]:
    """Ask the farm, for a moment; return nothing where it does not answer, for Tab is no place for errors."""
    from latentfarm.cli.reach import reach  # noqa: PLC0415 - keeps --help fast
    from latentfarm.client import flows  # noqa: PLC0415

    flows.TRIES = 1  # this process does nothing else
    found: list[Sequence[T]] = []

    def look() -> None:
        with suppress(Exception):
            found.append(ask(reach(None, timeout_s=PATIENCE_S)))

    thread = threading.Thread(target=look, daemon=True)  # a farm that is reached directly has other limits of time
    thread.start()
    thread.join(2 * PATIENCE_S)
    return found[0] if found else []


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.lower().startswith(incomplete.lower())]
