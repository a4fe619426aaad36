"""The order in which a job's images are handed out: permutations that are computed, both ways, never stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, Protocol

OrderName = Literal["sequential", "random", "corners-first", "spread"]
GOLDEN = (math.sqrt(5) - 1) / 2
ROUNDS = 4


class Order(Protocol):
    """A permutation of `range(total)`."""

    def at(self, position: int) -> int:
        """Return what stands at a position."""
        ...

    def of(self, index: int) -> int:
        """Return where something stands."""
        ...


def order_of(name: OrderName, shape: Sequence[int], seed: int = 0) -> Order:
    """Return the order of images that lie on a grid of this shape, the last side counting fastest."""
    total = math.prod(shape)
    if name == "random":
        return Shuffled(total, seed)
    if name == "spread":
        return Spread(total)
    if name == "corners-first":
        return CornersFirst(tuple(shape))
    return Sequential()


class Sequential:
    """As they come."""

    def at(self, position: int) -> int:
        """Return the position itself."""
        return position

    def of(self, index: int) -> int:
        """Return the index itself."""
        return index


class Shuffled:
    """A random permutation: a Feistel network over the next power of four, walked until it falls inside.

    Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """

    def __init__(self, total: int, seed: int) -> None:
        self._total = total
        self._half = max(1, math.ceil(max(total - 1, 1).bit_length() / 2))
        self._mask = (1 << self._half) - 1
        self._seed = seed.to_bytes(8, "little")

    def at(self, position: int) -> int:
        """Encrypt until the result is an index."""
        return self._walk(position, range(ROUNDS))

    def of(self, index: int) -> int:
        """Decrypt until the result is a position."""
        return self._swap(self._walk(self._swap(index), range(ROUNDS - 1, -1, -1)))

    def _walk(self, value: int, rounds: range) -> int:
        swapped = rounds.step < 0
        while True:
            left, right = value >> self._half, value & self._mask
            for number in rounds:
                left, right = right, left ^ self._mix(number, right)
            value = left << self._half | right
            if (self._swap(value) if swapped else value) < self._total:
                return value

    def _swap(self, value: int) -> int:
        """Exchange the halves: a Feistel network runs backwards on exchanged halves."""
        return (value & self._mask) << self._half | value >> self._half

    def _mix(self, number: int, half: int) -> int:
        data = bytes([number]) + half.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._seed).digest(), "little") & self._mask


class Spread:
    """Steps of nearly the golden section of the whole: any first part lies evenly over it.

    A rank-1 lattice; Niederreiter, "Random number generation and quasi-Monte Carlo methods", 1992, chapter 5.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._step = next(
            step
            for distance in range(total + 1)
            for step in (round(total * GOLDEN) + distance, round(total * GOLDEN) - distance)
            if step > 0 and math.gcd(step, total) == 1
        )
        self._back = pow(self._step, -1, total) if total > 1 else 0

    def at(self, position: int) -> int:
        """Step on from the start."""
        return position * self._step % self._total

    def of(self, index: int) -> int:
        """Count the steps."""
        return index * self._back % self._total


class CornersFirst:
    """The corners of a grid, then the points half-way between, then quarters: each shell refines the whole grid.

    Every side's values are ranked ends first, then middles, then middles of what is left. Shell k holds the points whose
    ranks all lie below 2^k + 1, less the shells before; in it, they are numbered by the first side whose rank is new.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._by_rank = [refinement(side) for side in shape]
        self._ranks = [_inverse(order) for order in self._by_rank]
        self._shells = 1 + max((max(side - 2, 0).bit_length() for side in shape), default=0)

    def _box(self, shell: int) -> list[int]:
        """Return how many ranks of every side lie in a shell and those before."""
        return [min(side, 2**shell + 1) if shell >= 0 else 0 for side in self._shape]

    def at(self, position: int) -> int:
        """Find the shell, the slab and the ranks in it."""
        shell = next(k for k in range(self._shells + 1) if position < math.prod(self._box(k)))
        inner, outer = self._box(shell - 1), self._box(shell)
        position -= math.prod(inner)
        for side in range(len(self._shape)):
            lows, highs = _slab(inner, outer, side)
            sizes = [high - low for low, high in zip(lows, highs, strict=True)]
            if position < math.prod(sizes):
                ranks = [low + digit for low, digit in zip(lows, _digits(position, sizes), strict=True)]
                values = [self._by_rank[j][rank] for j, rank in enumerate(ranks)]
                return _number(values, self._shape)
            position -= math.prod(sizes)
        raise IndexError(position)

    def of(self, index: int) -> int:
        """Find the shell and slab of an index and its number in it."""
        ranks = [self._ranks[j][value] for j, value in enumerate(_digits(index, self._shape))]
        shell = next(k for k in range(self._shells + 1) if all(r < b for r, b in zip(ranks, self._box(k), strict=True)))
        inner, outer = self._box(shell - 1), self._box(shell)
        position = math.prod(inner)
        for side in range(len(self._shape)):
            lows, highs = _slab(inner, outer, side)
            sizes = [high - low for low, high in zip(lows, highs, strict=True)]
            if all(low <= rank < high for low, rank, high in zip(lows, ranks, highs, strict=True)):
                return position + _number([rank - low for rank, low in zip(ranks, lows, strict=True)], sizes)
            position += math.prod(sizes)
        raise IndexError(index)


def _slab(inner: Sequence[int], outer: Sequence[int], side: int) -> tuple[list[int], list[int]]:
    """Return the ranks at which a slab begins and ends: old on the sides before, new on this one, any on those behind."""
    lows = [inner[j] if j == side else 0 for j in range(len(inner))]
    highs = [inner[j] if j < side else outer[j] for j in range(len(inner))]
    return lows, highs


def _digits(number: int, sides: Sequence[int]) -> list[int]:
    digits = []
    for side in reversed(sides):
        number, digit = divmod(number, side)
        digits.append(digit)
    return digits[::-1]


def _number(digits: Sequence[int], sides: Sequence[int]) -> int:
    number = 0
    for digit, side in zip(digits, sides, strict=True):
        number = number * side + digit
    return number


@lru_cache(maxsize=16)
def refinement(side: int) -> tuple[int, ...]:
    """Return the places of a side: both ends, the middle, the middles of the halves, and so on."""
    if side <= 2:
        return tuple(range(side))
    order, level = [0, side - 1], [(0, side - 1)]
    while level:
        halves = []
        for low, high in level:
            middle = (low + high) // 2
            if middle not in (low, high):
                order.append(middle)
                halves += [(low, middle), (middle, high)]
        level = halves
    return tuple(order)


def _inverse(order: Sequence[int]) -> list[int]:
    ranks = [0] * len(order)
    for rank, value in enumerate(order):
        ranks[value] = rank
    return ranks
