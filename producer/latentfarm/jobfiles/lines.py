"""The rows of tables in JSONL, CSV and TSV, each with its place."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from latentfarm_shared.errors import UnreadableFile, nearest
from latentfarm_shared.parameters import short
from latentfarm_shared.specs import JobSpec

from latentfarm.jobfiles.values import require_file

MAX_LINE = 2**20
MAX_SKIPPED = 2**26


@dataclass
class Line:
    """One row of a table: its number, its text and its fields, or what is wrong with it and in which column."""

    number: int
    text: str
    values: dict[str, Any]
    error: tuple[int, str] | None = None
    file: Path | None = None
    columns: Mapping[str, int] | None = None
    indent: int = 0

    def column_of(self, name: str) -> int:
        """Return the column where a field's name, or its cell, stands."""
        if self.columns is not None:
            return self.columns.get(name, 0)
        first = name.partition(".")[0]
        found = re.search(re.escape(json.dumps(first, ensure_ascii=False)) + r"\s*:", self.text)
        return found.start() + 1 + self.indent if found else 0


class LocatedRow(dict[str, Any]):
    """A row's fields, with the line they stand in."""

    def __init__(self, values: dict[str, Any], line: Line) -> None:
        super().__init__(values)
        self.line = line


def open_table(path: Path) -> IO[str]:
    """Open a table; `-` is standard input."""
    if str(path) == "-":
        return sys.stdin
    require_file(path)
    return path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() in (".csv", ".tsv") else None)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys stand once each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{short(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return found


def jsonl_lines(file: IO[str]) -> Iterator[Line]:
    """Yield the rows of JSON lines; blank ones and those that begin with `#` are passed over."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            yield Line(number, "", {}, (0, f"is longer than {MAX_LINE} characters"))
            skipped = 0
            while (rest := file.readline(MAX_LINE)) and not rest.endswith("\n") and skipped < MAX_SKIPPED:
                skipped += len(rest)
            if skipped >= MAX_SKIPPED:
                return
            continue
        text = line.strip()
        if text and not text.startswith("#"):
            row = _json_line(number, text)
            row.indent = len(line) - len(line.lstrip())
            if row.error is not None and row.error[0]:
                row.error = row.error[0] + row.indent, row.error[1]
            yield row


def _json_line(number: int, text: str) -> Line:
    try:
        values = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        return Line(number, text, {}, (error.colno, f"is no JSON: {error.msg.lower()}"))
    except (ValueError, RecursionError) as error:
        reason = "is nested too deep" if isinstance(error, RecursionError) else f"cannot be read: {error}"
        return Line(number, text, {}, (0, reason[:200]))
    if not isinstance(values, dict):
        return Line(number, text, {}, (1, 'should be an object such as {"prompt": "…"}'))
    return Line(number, text, values)


def csv_lines(file: IO[str], path: Path) -> Iterator[Line]:
    """Yield the rows of CSV with a header, or of tabs."""
    reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except (StopIteration, csv.Error) as error:
        raise UnreadableFile(str(path), "has no header row") from error
    columns = {name: number for number, name in enumerate(header, 1)}
    for number, name in enumerate(header, 1):
        near = nearest(name, JobSpec.model_fields, 1)
        if header.index(name) < number - 1 or name not in JobSpec.model_fields:
            hint = f"; did you mean {near[0]}?" if near else ""
            reason = f"column {short(name)} " + (
                "stands twice" if name in JobSpec.model_fields else f"is no field{hint}"
            )
            yield Line(1, "", {}, (number, reason))
            return
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Line(first, "", {}, (0, f"a quote that opens here is not closed, or stands in a cell ({error})"))
            continue
        if not any(cells):
            continue
        text = json.dumps(cells, ensure_ascii=False)
        if len(cells) > len(header):
            yield Line(first, text, {}, (len(header) + 1, "has more cells than the header"))
            continue
        values = {name: _cell(name, cell) for name, cell in zip(header, cells, strict=False) if cell.strip()}
        yield Line(first, text, values, columns=columns)


def _cell(name: str, cell: str) -> Any:
    """Read a cell as the number, truth value or list it looks like, unless it is text by its nature."""
    if name in ("prompt", "negative_prompt", "sampler", "schedule", "model", "key", "name"):
        return cell
    if name == "embeddings":
        return [part.strip() for part in cell.split(";") if part.strip()]
    try:
        return json.loads(cell, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return cell
