"""Queues: a lane, a checkpoint, and what a worker must have to serve it: `<lane>:<hash>[+<tag>…]`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from latentfarm_shared.specs import Lane

LANES: tuple[Lane, ...] = ("interactive", "batch")
MEMORY = "memory:"


def part_name(checkpoint_hash: str, requires: Sequence[str] = ()) -> str:
    """Return the name of a job's part: its checkpoint, and the tags its workers must have."""
    return "+".join([checkpoint_hash, *sorted(set(requires))])


def queue_name(lane: Lane, part: str) -> str:
    """Return the name of the queue of one part in one lane."""
    return f"{lane}:{part}"


def checkpoint_of(queue: str) -> str:
    """Return the hash of a queue's checkpoint."""
    return queue.partition(":")[2].partition("+")[0]


def required_by(queue: str) -> list[str]:
    """Return the tags that a queue's workers must have."""
    return queue.partition(":")[2].split("+")[1:]


def lacking(tags: Collection[str], required: Sequence[str]) -> list[str]:
    """Return what a worker of these tags lacks; `memory:16` asks for as many GiB at least."""
    have = max((float(tag.removeprefix(MEMORY)) for tag in tags if tag.startswith(MEMORY)), default=0.0)
    return [
        tag
        for tag in required
        if tag not in tags and not (tag.startswith(MEMORY) and float(tag.removeprefix(MEMORY)) <= have)
    ]
