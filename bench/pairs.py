"""Interleaved measurements and what they say: every round runs every arm, in an order that turns."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PAIRS = 9
RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """A ratio over pairs: median, 95 % bootstrap interval of the median, and the pairs themselves."""

    median: float
    low: float
    high: float
    pairs: tuple[float, ...]

    def row(self) -> dict[str, Any]:
        """Return it for JSON."""
        rounded = [round(pair, 4) for pair in self.pairs]
        return {
            "median": round(self.median, 4),
            "interval": [round(self.low, 4), round(self.high, 4)],
            "pairs": rounded,
        }


def interleaved(arms: Mapping[str, Callable[[], float]], rounds: int = PAIRS) -> dict[str, list[float]]:
    """Run every arm once a round, the order turning, after one round that does not count; return their figures."""
    names = list(arms)
    for name in names:
        arms[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(arms[name]())
    return found


def ratio(above: list[float], below: list[float]) -> Ratio:
    """Return the ratio of two arms' figures, pair by pair."""
    pairs = tuple(a / b for a, b in zip(above, below, strict=True))
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return Ratio(statistics.median(pairs), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1], pairs)


def percentile(values: list[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
