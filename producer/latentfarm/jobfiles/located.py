"""What is wrong in a file of jobs, and where."""

from __future__ import annotations

from dataclasses import dataclass

from latentfarm_shared.errors import UsageError, cut

MAX_ERRORS, SHOWN_ERRORS = 100, 20

Where = tuple[int, int]


@dataclass(frozen=True)
class RowError:
    """Something wrong in a file: `field` at line and column, both from 1; 0 where there is none."""

    file: str
    line: int
    column: int
    field: str
    reason: str

    def __str__(self) -> str:
        """Say where and what."""
        place = f"line {self.line}" + (f", column {self.column}" if self.column else "")
        return f"{cut(self.file)}: {place}: {cut(self.field)}: {cut(self.reason, 1000)}"


class InvalidRows(UsageError):
    """A file of jobs holds what the farm does not take; `errors` say what and where. Nothing is queued."""

    code = "INVALID_ROWS"

    def __init__(self, errors: tuple[RowError, ...]) -> None:
        super().__init__(errors)
        self.errors = errors

    def __str__(self) -> str:
        """List the first errors, one a line."""
        more = len(self.errors) - SHOWN_ERRORS
        lines = [str(error) for error in self.errors[:SHOWN_ERRORS]]
        return "\n".join([*lines, *([f"… and {more} more"] if more > 0 else [])])


class Enough(Exception):
    """So many errors were found that the rest may wait."""


class Findings:
    """What is wrong in a file, as far as it was found."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.errors: list[RowError] = []

    def note(self, where: Where, name: str, reason: str, file: str | None = None) -> None:
        """Note an error; `file` is the one it stands in if that is another.

        Raises:
            Enough: there are many already.
        """
        self.errors.append(RowError(file or self._file, where[0], where[1], name, reason))
        if len(self.errors) >= MAX_ERRORS:
            raise Enough

    def check(self) -> None:
        """Make sure that nothing was found.

        Raises:
            InvalidRows: something was.
        """
        if self.errors:
            raise InvalidRows(tuple(self.errors))
