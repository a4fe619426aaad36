"""The points of a sweep, found by number without listing them: combinations of columns, less some, and some more."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

from latentfarm_shared.sweeps.axes import Axis, Point


@dataclass(frozen=True)
class Column:
    """Fields that change together: one for an axis, several for axes that are zipped."""

    axes: tuple[Axis, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it sets."""
        return tuple(axis.field for axis in self.axes)

    def __len__(self) -> int:
        """Count its rows."""
        return len(self.axes[0].items)

    def at(self, row: int) -> Point:
        """Return the values of one row."""
        return {axis.field: axis.items[row] for axis in self.axes}


_Alive = frozenset[int]
MAX_STATES = 5000


@dataclass(frozen=True, eq=False)
class Grid:
    """Every combination of columns, the last counting fastest, without those that match an `exclude`; then `include`.

    An exclude matches where all its values are met. Points are counted and found column by column: what is left under a
    choice depends on the choice only through the excludes it still meets, so each such state is counted once.
    """

    columns: tuple[Column, ...] = ()
    exclude: tuple[Point, ...] = ()
    include: tuple[Point, ...] = ()
    _counts: dict[tuple[int, _Alive], list[int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many combinations there are, without the included points."""
        return self._under(0, frozenset(range(len(self.exclude))))

    @property
    def total(self) -> int:
        """How many points there are."""
        return self.size + len(self.include)

    def at(self, number: int) -> Point:
        """Return a point by its number.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= number < self.total:
            raise IndexError(number)
        if number >= self.size:
            return dict(self.include[number - self.size])
        point: Point = {}
        alive: _Alive = frozenset(range(len(self.exclude)))
        for level, column in enumerate(self.columns):
            if alive:
                sums = self._sums(level, alive)
                row = bisect_right(sums, number)
                number -= sums[row - 1] if row else 0
                alive = self._still(alive, column, row)
            else:
                row, number = divmod(number, math.prod(len(later) for later in self.columns[level + 1 :]))
            point |= column.at(row)
        return point

    def first_rows(self) -> list[int]:
        """Return how many points lie under each row of the first column, summed up."""
        return self._sums(0, frozenset(range(len(self.exclude))))

    def _under(self, level: int, alive: _Alive) -> int:
        """Count the points from a column on, of which `alive` excludes were met so far."""
        left = self.columns[level:]
        later = {name for column in left for name in column.fields}
        if any(later.isdisjoint(self.exclude[number]) for number in alive):
            return 0
        if not alive:
            return math.prod(len(column) for column in left)
        return self._sums(level, alive)[-1]

    def _sums(self, level: int, alive: _Alive) -> list[int]:
        key = level, alive
        if key not in self._counts:
            if len(self._counts) > MAX_STATES:
                raise ValueError(f"the excludes cross in more than {MAX_STATES} ways; leave some out")
            column, under = self.columns[level], {}
            counts = []
            for row in range(len(column)):
                still = self._still(alive, column, row)
                if still not in under:
                    under[still] = self._under(level + 1, still)
                counts.append(under[still])
            self._counts[key] = list(accumulate(counts))
        return self._counts[key]

    def _still(self, alive: _Alive, column: Column, row: int) -> _Alive:
        """Return the excludes that a row meets as well."""
        values = column.at(row)
        return frozenset(
            number
            for number in alive
            if all(self.exclude[number].get(name, value) == value for name, value in values.items())
        )
