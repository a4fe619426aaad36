"""Errors as HTTP tells them: RFC 9457's problem details, with our code, the field and the nearest valid values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from latentfarm_shared.errors import (
    AlreadyTaken,
    Busy,
    EmbeddingInUse,
    FarmError,
    InvalidField,
    NotAllowed,
    Unavailable,
    UnknownName,
    UsageError,
    cut,
)
from latentfarm_shared.storage import MissingObject
from pydantic import BaseModel, ConfigDict, Field

from latentfarm.jobfiles import InvalidRows, RowError
from latentfarm.jobs import ImageNotReady, WaitTimeout

MEDIA = "application/problem+json"
AGAIN_S = 2  # when a service is away
IN_PATH = frozenset({"job", "image", "key", "webhook", "delivery", "file", "batch", "task"})


class Problem(BaseModel):
    """What went wrong. `code` is for programs; `title` says it in a sentence, with what to do."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "about:blank",
                    "title": "there is no sampler called 'Eular'; did you mean 'Euler'?",
                    "status": 422,
                    "code": "UNKNOWN_NAME",
                    "field": "sampler",
                    "nearest": ["Euler"],
                    "request_id": "5b4f0c7e",
                }
            ]
        }
    )

    type: str = "about:blank"
    title: str
    status: int
    code: str
    field: str | None = None
    line: int | None = None
    nearest: list[str] = []
    errors: list[dict[str, Any]] = Field([], description="Of a file, every row that is wrong.")
    details: list[Any] = Field([], description="What the sentence is made of, in an order that depends on the code.")
    retry_after: int | None = Field(None, description="Seconds after which trying again may help.")
    request_id: str | None = None


class NotHere(FarmError):
    """What the address names is not there."""

    code = "UNKNOWN_NAME"

    def __init__(self, error: UnknownName) -> None:
        super().__init__(error)
        self.error = error

    def __str__(self) -> str:
        return str(self.error)


@contextmanager
def addressed() -> Iterator[None]:
    """Say "not found" of names that stand in the address, not in the body."""
    try:
        yield
    except UnknownName as error:
        raise NotHere(error) from error


def status_of(error: FarmError) -> int:
    """Return the HTTP status that says what an error says."""
    if isinstance(error, NotHere) or (isinstance(error, UnknownName) and error.kind in IN_PATH):
        return 404
    if isinstance(error, AlreadyTaken) and error.kind == "job":
        return 409
    if isinstance(error, NotAllowed):
        return 403 if error.is_known else 401
    return next((status for kinds, status in _STATUSES if isinstance(error, kinds)), 500)


_STATUSES: tuple[tuple[tuple[type[FarmError], ...], int], ...] = (
    ((EmbeddingInUse, ImageNotReady), 409),
    ((MissingObject,), 404),
    ((Busy,), 429),
    ((Unavailable,), 503),
    ((WaitTimeout,), 504),
    ((UsageError,), 422),
)


def problem_of(error: FarmError) -> Problem:
    """Return an error as a problem."""
    inner = error.error if isinstance(error, NotHere) else error
    status = status_of(error)
    wait = (
        inner.retry_after_s
        if isinstance(inner, Busy)
        else AGAIN_S
        if status == HTTPStatus.SERVICE_UNAVAILABLE
        else None
    )
    return Problem(
        title=_row(inner.errors[0])["message"] if isinstance(inner, InvalidRows) else str(inner),
        status=status,
        code=inner.code,
        field=inner.field
        if isinstance(inner, InvalidField)
        else inner.kind
        if isinstance(inner, UnknownName)
        else None,
        line=inner.line if isinstance(inner, InvalidField) else None,
        nearest=list(inner.suggestions) if isinstance(inner, UnknownName) else [],
        errors=[_row(row) for row in inner.errors] if isinstance(inner, InvalidRows) else [],
        retry_after=wait,
        details=_details(inner),
    )


def _details(error: FarmError) -> list[Any]:
    """Return what an error was made of, if that can be written down."""
    plain = (str, int, float, bool, type(None))
    found = [list(value) if isinstance(value, tuple) else value for value in error.args]
    is_plain = all(
        isinstance(item, plain) for value in found for item in (value if isinstance(value, list) else [value])
    )
    return found if is_plain else []


def _row(row: RowError) -> dict[str, Any]:
    """Describe a row without the path of its file, which is this server's business."""
    message = f"line {row.line}: {cut(row.field)}: {cut(row.reason, 1000)}"
    return {"line": row.line, "column": row.column, "field": row.field, "reason": row.reason, "message": message}


def problem_of_request(error: RequestValidationError) -> Problem:
    """Return what is wrong with a query, a header or a body, of which the first is told."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "header", "path")]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return Problem(title=f"the body is no JSON: {reason}", status=422, code="INVALID_JSON")
    field = ".".join(place) or str(first["loc"][0])
    message = str(first["msg"]).removeprefix("Value error, ").lower()
    return Problem(title=f"{field}: {message}", status=422, code="INVALID_FIELD", field=field)


def documented(
    *statuses: int, also: Mapping[int | str, dict[str, Any]] | None = None
) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of the problems a route may answer with, beside those that any may.

    `also` describes what it answers when all is well.
    """
    anywhere = (400, 401, 403, 404, 413, 422, 429, 503)
    problems: dict[int | str, dict[str, Any]] = {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA: {"schema": _SCHEMA}}}
        for status in sorted({*anywhere, *statuses})
    }
    return {**(also or {}), **problems}


_SCHEMA = {"$ref": "#/components/schemas/Problem"}


def a1111_style(problem: Problem, body: dict[str, Any]) -> dict[str, Any]:
    """Return a problem as A1111 tells errors, with what we know beside it."""
    return body | {"error": problem.code, "detail": problem.title, "body": "", "errors": problem.title}


_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def openai_style(problem: Problem, body: dict[str, Any]) -> dict[str, Any]:
    """Return a problem as OpenAI tells errors, with what we know beside it."""
    kind = _OPENAI_TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    told = {"message": problem.title, "type": kind, "param": problem.field, "code": problem.code.lower()}
    return {"error": told, "farm": body}
