"""Errors that a farm told over HTTP, raised as what they are in the farm."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from latentfarm_shared.errors import (
    Busy,
    FarmError,
    InvalidField,
    NotAllowed,
    Unavailable,
    UnknownName,
    UsageError,
)

from latentfarm.client.flows import UNREACHABLE, Reply
from latentfarm.jobfiles import InvalidRows, RowError

GOOD = (range(200, 300), range(304, 305))


def no_farm(status: int, hint: str = "") -> Unavailable:
    """Return the error that something answers which is no farm."""
    return Unavailable("farm", f"the address answered {status}, not as a farm does", hint or "is the address right?")


def refuse_problem(reply: Reply) -> None:
    """Raise what an answer tells, if that is an error.

    Raises:
        FarmError: of the class whose `code` the problem carries, made of the same values where the farm tells them.
        Unavailable: nobody answered, or something that is no farm; a redirection is told, not followed.
    """
    if reply.error is not None:
        raise reply.error
    if reply.status == UNREACHABLE:
        raise Unavailable("farm", reply.content.decode(errors="replace"), "is it running, and is the address right?")
    if any(reply.status in good for good in GOOD):
        return
    elsewhere = reply.headers.get("location", "")
    if reply.status < 400:
        raise no_farm(reply.status, f"it leads to {elsewhere[:200]}" if elsewhere else "")
    try:
        problem = dict(json.loads(reply.content))
        error = error_of(problem, reply.status)
    except (ValueError, KeyError, TypeError):
        raise no_farm(reply.status) from None
    raise error


def error_of(problem: Mapping[str, Any], status: int) -> FarmError:
    """Return the error that a problem tells.

    Raises:
        KeyError: it is no problem of a farm.
    """
    code, title = str(problem["code"]), str(problem["title"])
    kind = _class_of(code, status)
    return _made_again(kind, title, problem.get("details")) or _told(kind, title, dict(problem))


def _made_again(kind: type[FarmError], title: str, details: Any) -> FarmError | None:
    """Return an error made of the values it was made of; None if they are not told, or mean something else here."""
    if not isinstance(details, list) or not details:
        return None
    try:
        error = kind(*(tuple(value) if isinstance(value, list) else value for value in details))
        return error if str(error) == title else None
    except Exception:  # noqa: BLE001 - a farm of another version makes errors of other values
        return None


def _class_of(code: str, status: int) -> type[FarmError]:
    known = _by_code().get(code)
    if known is not None:
        return known
    if status >= 500:
        return Unavailable
    return NotAllowed if status in (401, 403) else UsageError


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
    """An error that was told in words alone; what its kind has beside them is as far as the problem says."""

    def __init__(self, title: str, problem: dict[str, Any]) -> None:
        Exception.__init__(self, title, problem)
        self.title, self.problem = title, problem
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
            self.reason, self.service, self.advice = title, "farm", ""
        elif isinstance(self, Unavailable):
            self.reason, self.service, self.advice = title, "farm", ""
        elif isinstance(self, NotAllowed):
            self.reason, self.is_known = title, problem.get("status") != 401

    def __str__(self) -> str:
        return self.title

    def __reduce__(self) -> tuple[Any, ...]:
        kind = next(base for base in type(self).__mro__[1:] if base is not _Told)
        return _told, (kind, self.title, self.problem)


def _row(row: Mapping[str, Any]) -> RowError:
    return RowError("", int(row["line"]), int(row["column"]), str(row["field"]), str(row["reason"]))


_told_kinds: dict[tuple[type[FarmError], str], type[_Told]] = {}


def _told(kind: type[FarmError], title: str, problem: dict[str, Any]) -> FarmError:
    """Return an error of a kind that was told in words; what catches the kind catches it."""
    code = str(problem["code"])
    if (kind, code) not in _told_kinds:
        body = {"__doc__": kind.__doc__, "__module__": kind.__module__, "code": code}
        _told_kinds[kind, code] = type(kind.__name__, (_Told, kind), body)
    return _told_kinds[kind, code](title, problem)
