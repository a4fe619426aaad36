"""Errors that a farm told over HTTP, raised as what they are in the farm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from latentfarm_shared.errors import Busy, FarmError, InvalidField, NotAllowed, Unavailable, UnknownName

from latentfarm.client.flows import UNREACHABLE, Reply
from latentfarm.jobfiles import InvalidRows, RowError

AT_LEAST = 400


def refuse_problem(reply: Reply, address: str = "the farm") -> None:
    """Raise what an answer tells, if that is an error.

    Raises:
        FarmError: of the class whose `code` the problem carries, with its text, `field`, `line`, `suggestions`.
        Unavailable: nobody answered, or something that is no farm.
    """
    if reply.error is not None:
        raise reply.error
    if reply.status == UNREACHABLE:
        raise Unavailable("farm", reply.content.decode(errors="replace"), "is it running, and is the address right?")
    if reply.status < AT_LEAST:
        return
    try:
        problem = json.loads(reply.content)
        code, title = str(problem["code"]), str(problem["title"])
    except (ValueError, KeyError, TypeError):
        raise Unavailable("farm", f"{address} answered {reply.status}, not as a farm does") from None
    raise _error(_class_of(code, reply.status), title, problem)


def _class_of(code: str, status: int) -> type[FarmError]:
    known = _by_code().get(code)
    if known is not None:
        return known
    if status >= 500:
        return Unavailable
    return NotAllowed if status in (401, 403) else FarmError


@cache
def _by_code() -> dict[str, type[FarmError]]:
    found: dict[str, type[FarmError]] = {}
    for kind in _kinds(FarmError):
        found.setdefault(kind.code, kind)  # parents come first: what shares a code is caught by the parent's name
    return found


def _kinds(root: type[FarmError]) -> Iterator[type[FarmError]]:
    if not issubclass(root, _Told):
        yield root
        for kind in root.__subclasses__():
            yield from _kinds(kind)


class _Told(FarmError):
    """An error that was told in words, by a farm."""

    def __init__(self, title: str, problem: dict[str, Any]) -> None:
        Exception.__init__(self, title, problem)
        self.title, self.problem = title, problem
        self.request_id: str | None = problem.get("request_id")
        if isinstance(self, InvalidField):
            self.field, self.line = problem.get("field") or "", problem.get("line")
            self.reason = title.removeprefix(f"{self.field}: ")
        elif isinstance(self, InvalidRows):
            self.errors = tuple(_row(row) for row in problem.get("errors") or ())
        elif isinstance(self, UnknownName):
            self.kind, self.suggestions = problem.get("field") or "", tuple(problem.get("nearest") or ())
            self.name = title.partition("called '")[2].partition("'")[0]
        elif isinstance(self, Busy):
            self.retry_after_s = int(problem.get("retry_after") or 1)
        elif isinstance(self, NotAllowed):
            self.reason, self.is_known = title, problem.get("status") != 401

    def __str__(self) -> str:
        return self.title

    def __reduce__(self) -> tuple[Any, ...]:
        kind = next(base for base in type(self).__mro__[1:] if base is not _Told)
        return _error, (kind, self.title, self.problem)


def _row(row: dict[str, Any]) -> RowError:
    return RowError("", int(row["line"]), int(row["column"]), str(row["field"]), str(row["reason"]))


_told_kinds: dict[type[FarmError], type[_Told]] = {}


def _error(kind: type[FarmError], title: str, problem: dict[str, Any]) -> FarmError:
    """Return an error of a kind that was told in words; what catches the kind catches it."""
    if kind not in _told_kinds:
        body = {"__doc__": kind.__doc__, "__module__": kind.__module__}
        _told_kinds[kind] = type(kind.__name__, (_Told, kind), body)
    return _told_kinds[kind](title, problem)
