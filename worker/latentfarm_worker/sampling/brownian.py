"""A Brownian path that depends on its seed alone, not on where or in which order it is asked.

The dyadic tree of torchsde's `BrownianTree` (Li et al., arXiv:2001.01328), number for number: the path's ends come
first, then midpoints by Brownian bridge, each from a seed of its own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

DIGITS = 6  # times are told apart to a millionth
POOL = 24
_AHEAD = ThreadPoolExecutor(2, "noise")  # a value takes milliseconds, which no device should wait for


class BrownianPath:
    """A path over times `start` to `end`; `draw` gives the standard normal tensor of a seed."""

    def __init__(
        self, start: float, end: float, seed: int, draw: Callable[[int], Tensor], ahead: Sequence[float] = ()
    ) -> None:
        """Draw the path's end; everything else is drawn when asked for and kept, times `ahead` in the background."""
        self._lock, self._stopped = threading.Lock(), False
        self._start, self._end = round(start, DIGITS), round(end, DIGITS)
        self._seed, self._draw = seed, draw
        root = np.random.SeedSequence(entropy=seed, pool_size=POOL).generate_state(3)
        last = draw(int(root[0])) * math.sqrt(self._end - self._start)
        self._values = {self._start: last * 0, self._end: last}
        self._bridges: dict[tuple[int, int], Tensor] = {}
        if ahead:
            _AHEAD.submit(self._fill, list(ahead))

    def _fill(self, times: list[float]) -> None:
        for time in times:
            if self._stopped:
                return
            self._value(time)

    def stop(self) -> None:
        """Draw nothing more in the background."""
        self._stopped = True

    def increment(self, first: float, second: float) -> Tensor:
        """Return the path's increment between two times in either order, divided by the root of their distance."""
        low, high = min(first, second), max(first, second)
        step = self._value(high) - self._value(low)
        if low == high:
            return step
        return step * (math.copysign(1, second - first) / math.sqrt(high - low))

    def _value(self, time: float) -> Tensor:
        """Return the path at a time, going down the tree to it."""
        wanted = min(max(round(time, DIGITS), self._start), self._end)
        with self._lock:
            if wanted not in self._values:
                self._values[wanted] = self._descend(wanted)
            return self._values[wanted]

    def _descend(self, wanted: float) -> Tensor:
        start, end, key, depth = self._start, self._end, 0, 0
        left, rise = self._values[start], self._values[end]
        while True:
            middle = round(0.5 * (start + end), DIGITS)
            bridge = self._bridge(key, depth, (start, middle, end), rise)
            if wanted == middle:
                return left + bridge
            if wanted < middle:
                end, rise, key = middle, bridge, 2 * key
            else:
                start, left, rise, key = middle, left + bridge, rise - bridge, 2 * key + 1
            depth += 1

    def _bridge(self, key: int, depth: int, times: tuple[float, float, float], rise: Tensor) -> Tensor:
        """Return the increment over the left half of a node, given that over the whole."""
        if (key, depth) in self._bridges:
            return self._bridges[key, depth]
        start, middle, end = times
        share, spread = (middle - start) / (end - start), (middle - start) * (end - middle) / (end - start)
        seeds = np.random.SeedSequence(entropy=self._seed, spawn_key=(key, depth), pool_size=POOL).generate_state(4)
        bridge = share * rise + math.sqrt(spread) * self._draw(int(seeds[0]))
        if depth < 8:  # the upper nodes are asked for again and again
            self._bridges[key, depth] = bridge
        return bridge
