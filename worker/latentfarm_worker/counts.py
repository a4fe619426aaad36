"""What a backend counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What a backend counts: loads of checkpoints since the start, embeddings at hand, encoded prompts found again or not."""

    loads: int = 0
    embeddings: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
