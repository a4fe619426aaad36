"""The file of a batch: its structure checked whole, its requests sorted into jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentfarm_shared.errors import InvalidField, UsageError
from latentfarm_shared.parameters import short
from latentfarm_shared.specs import JobSpec
from pydantic import BaseModel, TypeAdapter

from latentfarm.api.openai.batch_records import Batch, LineError
from latentfarm.api.openai.requests import Wanted, wanted
from latentfarm.api.problems import openai_style, problem_of, status_of
from latentfarm.farm import DirectFarm
from latentfarm.jobfiles.located import Findings
from latentfarm.jobfiles.rows import Placed, RowSorter
from latentfarm.jobfiles.values import duration

ENDPOINT = "/v1/images/generations"
MAX_LINES, MAX_LINE, MAX_ID = 50_000, 256 * 1024, 512


class Line(BaseModel):
    """A request that was taken: where its images are, and what it asked for."""

    custom_id: str
    placed: Placed
    body: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A request that was not taken, and OpenAI's answer to it."""

    custom_id: str
    status: int
    body: dict[str, Any]


class Reading:
    """The lines of a batch's file, sorted into jobs; what cannot be drawn is answered at the end."""

    def __init__(self, farm: DirectFarm, batch: Batch) -> None:
        """Read for a batch, in the name of its owner."""
        self._farm, self._window = farm, duration("completion_window", batch.completion_window)
        self._sorter = RowSorter(farm.tables, farm.side_of, Findings(batch.input_file_id))
        self._sorter.begin({}, batch.id)
        self.lines: list[Line] = []
        self.refused: list[Refused] = []

    def take(self, number: int, text: str) -> None:
        """Take a line whose structure is right."""
        request = json.loads(text)
        body = {"response_format": "url"} | request["body"]
        try:
            asked = wanted(body, self._farm)
            _refuse_streams(asked)
            self._farm.freeze(asked.spec)
            row = asked.spec.model_dump(mode="json", exclude_defaults=True) | {
                "lane": "batch",
                "expires_in": self._window,
            }
            placed = self._sorter.add((number, 1), row | {"model": asked.spec.model})
        except UsageError as error:
            problem = problem_of(error)
            story = openai_style(problem, problem.model_dump(exclude_none=True))
            self.refused.append(
                Refused(request["custom_id"], 400 if status_of(error) == 422 else status_of(error), story)
            )
        else:
            self.lines.append(Line(custom_id=request["custom_id"], placed=placed, body=body))

    def specs(self) -> list[JobSpec]:
        """Return the jobs of the lines that were taken."""
        return self._sorter.finish() if self.lines else []


def _refuse_streams(asked: Wanted) -> None:
    if asked.stream:
        raise InvalidField("stream", "goes with single requests, not with batches")


def texts(path: Path) -> Iterator[str]:
    """Yield the lines of a file that hold something."""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield line


def structure(path: Path) -> Iterator[LineError]:
    """Yield what keeps a file from being a batch at all, by line."""
    seen: set[str] = set()
    count = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    count += 1
                    error = _line_error(number, text, seen)
                    if error is not None:
                        yield error
                if count > MAX_LINES:
                    yield LineError(code="too_many_tasks", line=number, message=f"more than {MAX_LINES} requests")
                    return
    except UnicodeDecodeError:
        yield LineError(code="invalid_encoding", line=count + 1, message="the file is not UTF-8")
        return
    if not count:
        yield LineError(code="empty_file", line=None, message="the file holds no request")


def _line_error(number: int, text: str, seen: set[str]) -> LineError | None:
    """Return what is wrong with a line; `seen` are the ids of those before it."""
    if len(text) > MAX_LINE:
        return LineError(code="line_too_long", line=number, message=f"a line should have {MAX_LINE} characters at most")
    try:
        found = _JSON.validate_json(text)
    except ValueError:
        return LineError(code="invalid_json_line", line=number, message="this line is no JSON object")
    custom_id = found.get("custom_id")
    is_named = isinstance(custom_id, str) and 1 <= len(custom_id) <= MAX_ID
    checks = (
        (is_named, "missing_required_parameter", "custom_id", f"should be a text of 1 to {MAX_ID} characters"),
        (
            not is_named or custom_id not in seen,
            "duplicate_custom_id",
            "custom_id",
            f"{short(custom_id)} stands in another line too",
        ),
        (found.get("method") == "POST", "invalid_method", "method", "should be POST"),
        (found.get("url") == ENDPOINT, "invalid_url", "url", f"should be {ENDPOINT}"),
        (isinstance(found.get("body"), dict), "missing_required_parameter", "body", "should be an object"),
    )
    for is_right, code, param, reason in checks:
        if not is_right:
            return LineError(code=code, line=number, message=f"{param}: {reason}", param=param)
    seen.add(str(custom_id))
    return None


_JSON: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
