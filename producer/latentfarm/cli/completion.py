"""What a shell offers when Tab is pressed: names that are here, and names of jobs; nothing where the farm does not answer."""

from __future__ import annotations

from collections.abc import Iterable

OFFERED = 50


def complete_job(incomplete: str) -> list[tuple[str, str]]:
    """Offer the newest jobs, with their prompts."""
    from latentfarm_shared.errors import FarmError  # noqa: PLC0415 - keeps --help fast

    from latentfarm.cli.reach import reach  # noqa: PLC0415

    try:
        statuses = reach(None).statuses(OFFERED)
    except FarmError:
        return []
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
    from latentfarm_shared.errors import FarmError  # noqa: PLC0415

    from latentfarm.cli.reach import reach  # noqa: PLC0415

    try:
        return _beginning(incomplete, [record.name for record in reach(None).embeddings.ls()])
    except FarmError:
        return []


def complete_model(incomplete: str) -> list[str]:
    """Offer the checkpoints."""
    from latentfarm_shared.errors import FarmError  # noqa: PLC0415

    from latentfarm.cli.reach import reach  # noqa: PLC0415

    try:
        return _beginning(incomplete, [record.name for record in reach(None).models.ls()])
    except FarmError:
        return []


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.lower().startswith(incomplete.lower())]
