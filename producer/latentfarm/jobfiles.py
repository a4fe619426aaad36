"""Files of jobs: sweeps in YAML or JSON, tables in JSONL or CSV. All of a file is checked, and every error located.

A sweep file has `name`, `defaults` (fields of a job), `matrix` (axes that multiply), `zip` (axes that advance together),
`include`, `exclude`, `items` (rows) or `rows` (the name of a table beside it), `wildcards`, and fields of the whole job
such as `order` or `priority`. A table has one image a line; its rows are streamed into the store, however many.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from latentfarm_shared.errors import InvalidField, UnknownName, UnreadableFile, UsageError, cut, nearest
from latentfarm_shared.explicit import bare, plain_name, requested, standing
from latentfarm_shared.parameters import EmbeddingUse, Side, short
from latentfarm_shared.prompts.contract import with_word
from latentfarm_shared.specs import JOB_FIELDS, MAX_IMAGES, MAX_SEED, JobSpec, check_value
from latentfarm_shared.tables import RowWriter, TableStore
from pydantic import ValidationError

MAX_SWEEP_BYTES, MAX_NODES, MAX_DEPTH = 16 * 2**20, 100_000, 24
MAX_LINE = 2**20
MAX_SKIPPED = 2**26
MAX_USES = 1000
MAX_PATH = 200
MAX_DURATION = 40
MAX_ERRORS, SHOWN_ERRORS = 100, 20
MAX_GROUPS = 200
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
SWEEPS = (".yaml", ".yml", ".json")
SECTIONS = ("name", "defaults", "matrix", "zip", "include", "exclude", "items", "rows", "wildcards")
_SPAN = re.compile(r"\s*(\d+)\s*\.\.\s*(\d+)(?:\s*(?:\.\.|step)\s*(\d+))?\s*")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
DURATIONS = ("expires_in", "max_runtime", "keep")
QUICK = frozenset(
    {"prompt", "negative_prompt", "seed", "steps", "cfg_scale", "sampler", "schedule", "clip_skip", "variation_seed"}
)
IN_ROWS = (frozenset(JobSpec.model_fields) - JOB_FIELDS) | {"seed"}

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


@dataclass(frozen=True)
class JobFile:
    """The jobs of a file, their rows in the store, and the sha256 of what was read."""

    specs: tuple[JobSpec, ...]
    digest: str
    path: str
    lines: tuple[tuple[int, bool], ...]
    """Where each job begins, and whether its rows stand in one line each from there on."""

    def wrong(self, number: int, error: UsageError) -> InvalidRows:
        """Return what is wrong with a job as an error that tells where the job begins."""
        field = error.field if isinstance(error, InvalidField) else "prompt"
        reason = error.reason if isinstance(error, InvalidField) else str(error)
        line, is_straight = self.lines[number]
        row = error.line if isinstance(error, InvalidField) else None
        if row is not None:
            line, reason = (line + row - 1, reason) if is_straight else (line, f"row {row}: {reason}")
        return InvalidRows((RowError(self.path, line, 0, field, reason),))


def read_job_file(
    path: Path, tables: TableStore, defaults: Mapping[str, Any], side_of: Callable[[str], Side] | None = None
) -> JobFile:
    """Read a file of jobs; `-` is a table in JSONL on standard input. `side_of` tells an embedding's own prompt.

    Raises:
        InvalidRows: what is wrong, and where.
        UnreadableFile: it cannot be read at all.
    """
    forged = next((name for name in ("rows", "wildcards", "variants") if name in defaults), None)
    if forged is not None:
        raise InvalidField(forged, "is made from a file, not given")
    _check_whole(dict(defaults))
    reader = _Reader(path, tables, defaults, side_of or (lambda _name: "positive"))
    suffix = path.suffix.lower()
    if str(path) != "-" and suffix not in (*TABLES, *SWEEPS):
        raise UnreadableFile(str(path), f"should end in {', '.join((*SWEEPS, *TABLES))}")
    try:
        specs = reader.sweep() if suffix in SWEEPS else reader.table(path, defaults)
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFile(cut(str(path)), f"cannot be read as UTF-8 text ({error})") from error
    except ValueError as error:  # a null character in its name
        raise UnreadableFile(cut(str(path)), str(error)) from error
    if not specs and not reader.errors:
        raise UnreadableFile(str(path), "holds no job")
    reader.raise_errors()
    lines = tuple(reader.lines) or ((1, False),) * len(specs)
    return JobFile(tuple(specs), reader.digest.hexdigest(), str(path), lines)


class _Enough(Exception):
    """So many errors were found that the rest may wait."""


@dataclass
class _Group:
    """Rows that share the fields of their job."""

    fields: dict[str, Any]
    writer: RowWriter
    line: int
    is_straight: bool = True
    first: dict[str, Any] = field(default_factory=dict)


class _Reader:
    def __init__(
        self, path: Path, tables: TableStore, defaults: Mapping[str, Any], side_of: Callable[[str], Side]
    ) -> None:
        self._path, self._tables, self._side_of = path, tables, side_of
        self.errors: list[RowError] = []
        self.lines: list[tuple[int, bool]] = []
        self.digest = hashlib.sha256(json.dumps(dict(defaults), sort_keys=True, default=str).encode())
        self._defaults = dict(defaults)
        self._valid: set[tuple[str, Any]] = set()

    def raise_errors(self) -> None:
        """Raise what was found."""
        if self.errors:
            raise InvalidRows(tuple(self.errors))

    def _wrong(self, where: Where, name: str, reason: str, file: Path | None = None) -> None:
        self.errors.append(RowError(str(file or self._path), where[0], where[1], name, reason))
        if len(self.errors) >= MAX_ERRORS:
            raise _Enough

    # ---- tables

    def table(self, path: Path, defaults: Mapping[str, Any]) -> list[JobSpec]:
        """Read a table; rows that ask for other checkpoints, lanes … than the first become jobs of their own."""
        try:
            with _open(path) as file:
                rows = _csv(file, path) if path.suffix.lower() in (".csv", ".tsv") else _jsonl(file)
                return self._jobs(self._rows(self._digested(rows), path), dict(defaults), path.stem)
        except _Enough:
            return []

    def _digested(self, rows: Iterable[_Line]) -> Iterator[_Line]:
        for line in rows:
            self.digest.update(line.text.encode() + b"\n")
            yield line

    def _rows(self, lines: Iterable[_Line], path: Path) -> Iterator[tuple[Where, dict[str, Any]]]:
        for line in lines:
            line.file = path
            if line.error is not None:
                self._wrong((line.number, line.error[0]), "row", line.error[1], path)
            else:
                yield (line.number, 0), _Located(line.values, line)

    def _jobs(self, rows: Iterable[tuple[Where, dict[str, Any]]], defaults: dict[str, Any], name: str) -> list[JobSpec]:
        """Check rows and stream them into the store, by the jobs they belong to."""
        base = {k: v for k, v in defaults.items() if k != "embeddings"}
        try:
            _check_whole(defaults)
        except InvalidField as error:
            self._wrong((1, 1), error.field, error.reason)
            return []
        groups: dict[str, _Group] = {}
        total = 0
        for where, row in rows:
            try:
                values = self._checked(row, base, defaults.get("embeddings", []))
                _refuse_too_many(total + values.get("count", 1))
            except InvalidField as error:
                line = row.line if isinstance(row, _Located) else None
                place = (where[0], line.column_of(error.field) if line else where[1])
                self._wrong(place, error.field, error.reason, line.file if line else None)
                continue
            shared = {k: v for k, v in values.items() if k not in IN_ROWS and k != "count"}
            group = groups.get(key := json.dumps(shared, sort_keys=True, default=str))
            if group is None:
                if len(groups) == MAX_GROUPS:
                    self._wrong(where, "file", f"its rows make more than {MAX_GROUPS} different jobs")
                    raise _Enough
                group = groups[key] = _Group(shared, self._tables.writer(name), where[0])
            group.is_straight &= where[0] == group.line + group.writer.total and values.get("count", 1) == 1
            for number in range(values.get("count", 1)):
                own = {k: v for k, v in values.items() if k in IN_ROWS}
                seed = int(own.get("seed", base.get("seed", -1)))
                own |= self._seeds(own | base, seed, number)
                group.first = group.first or own
                group.writer.add(own)
                total += 1
        self.raise_errors()
        self.lines = [(group.line, group.is_straight) for group in groups.values()]
        return [self._job_of(group, base, name) for group in groups.values()]

    @staticmethod
    def _seeds(values: dict[str, Any], seed: int, number: int) -> dict[str, int]:
        """Return the seeds of one of a row's images: they count up, with a variation the variation's, as in A1111.

        Raises:
            InvalidField: they go beyond the last seed.
        """
        drawn = secrets.randbelow(MAX_SEED) if seed == -1 else seed
        if not values.get("variation_strength"):
            drawn = drawn if seed == -1 else seed + number
            found = {"seed": drawn}
        else:
            varied = int(values.get("variation_seed", -1))
            found = {"seed": drawn, "variation_seed": secrets.randbelow(MAX_SEED) if varied == -1 else varied + number}
        if max(found.values()) > MAX_SEED:
            raise InvalidField("seed", f"seed + count must stay below {MAX_SEED + 1}")
        return found

    def _job_of(self, group: _Group, base: dict[str, Any], name: str) -> JobSpec:
        values = {"name": name} | base | group.fields
        if group.writer.total == 1:
            return JobSpec.check(values | group.first)
        return JobSpec.check(values | {"seed": 0, "rows": group.writer.close().model_dump()})

    def _checked(self, row: dict[str, Any], base: dict[str, Any], uses: Iterable[Any]) -> dict[str, Any]:
        """Return a row's fields, with its embeddings written into its prompts.

        Raises:
            InvalidField: the field and why.
        """
        forged = next((name for name in ("rows", "wildcards", "variants") if name in row), None)
        if forged is not None:
            raise InvalidField(forged, "is made from a file, not given")
        unknown = next((name for name in row if name not in JobSpec.model_fields), None)
        if unknown is not None:
            near = nearest(str(unknown), JobSpec.model_fields, 1)
            raise InvalidField(cut(str(unknown)), "is not a field" + (f"; did you mean {near[0]}?" if near else ""))
        values = dict(row)
        for name in DURATIONS:
            if name in values:
                values[name] = duration(name, values[name])
        count = values.get("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_IMAGES:
            raise InvalidField("count", f"should be 1 to {MAX_IMAGES}, got {short(count)}")
        for name in QUICK & values.keys():
            self._check(name, values[name])
        if not values.keys() <= QUICK:
            _check_whole(base | values)
        own = values.pop("embeddings", [])
        _check_uses(own)
        asked = (*uses, *own)
        for use in (EmbeddingUse.parse(u) if isinstance(u, str) else EmbeddingUse.model_validate(u) for u in asked):
            side = use.side or self._side_of(use.name)
            name = "negative_prompt" if side == "negative" else "prompt"
            text = str(values.get(name, base.get(name, "")))
            is_there = plain_name(use.name).lower() in {plain_name(asked).lower() for asked in requested(text)}
            is_there = is_there or standing(plain_name(use.name)).search(bare(text)) is not None
            values[name] = text if is_there else with_word(text, f"<{use.name}>")
        return values

    def _check(self, name: str, value: Any) -> None:
        """Check one field by itself; what was found good once is good."""
        if name in ("prompt", "negative_prompt"):
            if not isinstance(value, str) or len(value) > MAX_PROMPT or not value.isprintable():
                _check_value(name, value)
            return
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            _check_value(name, value)
        elif (name, value) not in self._valid:
            _check_value(name, value)
            if len(self._valid) < 100_000:
                self._valid.add((name, value))

    # ---- sweeps

    def sweep(self) -> list[JobSpec]:
        """Read a sweep file."""
        try:
            return self._sweep()
        except _Enough:
            return []

    def _sweep(self) -> list[JobSpec]:
        _require_file(self._path)
        if self._path.stat().st_size > MAX_SWEEP_BYTES:
            raise UnreadableFile(str(self._path), f"is larger than {MAX_SWEEP_BYTES} bytes; put rows into a table")
        text = self._path.read_text(encoding="utf-8-sig")
        self.digest.update(text.encode())
        marked = _Marked(text, str(self._path))
        if not isinstance(marked.value, dict):
            self._wrong((1, 1), "file", "should be a mapping with sections such as defaults and matrix")
            return []
        if not any(value not in (None, {}, []) for value in marked.value.values()):
            return []
        values, content = dict(self._defaults), marked.value
        self._check_sections(content, marked)
        for section in ("defaults", *(name for name in content if name not in SECTIONS)):
            values |= self._fields(section, content, marked)
        values |= {"name": self._name(content, marked)}
        values |= {"axes": self._axes("matrix", content, marked), "zipped": self._axes("zip", content, marked)}
        values |= {part: self._points(part, content, marked) for part in ("include", "exclude")}
        values |= {"wildcards": self._wildcards(content, marked)}
        self.raise_errors()
        return self._rows_of(content, values, marked)

    def _name(self, content: dict[str, Any], marked: _Marked) -> str:
        name = content.get("name", self._path.stem)
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            self._wrong(marked.at("name"), "name", f"should be a text, got {short(name)}")
        return str(name)

    def _rows_of(self, content: dict[str, Any], values: dict[str, Any], marked: _Marked) -> list[JobSpec]:
        values = {name: value for name, value in values.items() if value not in ([], {}, None)}
        if "rows" in content and "items" in content:
            self._wrong(marked.at("rows"), "rows", "goes without items; put all rows into one of them")
            return []
        if "items" in content and not content["items"]:
            self._wrong(marked.at("items"), "items", "has no rows")
            return []
        if content.get("rows"):
            table = self._beside("rows", content["rows"], marked)
            specs = self.table(table, values) if table else []
        elif content.get("items"):
            rows = ((marked.at("items", number), item) for number, item in enumerate(content["items"]))
            checked = (pair for pair in rows if self._is_mapping("items", pair))
            specs = self._jobs(checked, values, str(values["name"]))
        else:
            try:
                _check_uses(values.get("embeddings", []))
                values["embeddings"] = [
                    EmbeddingUse.parse(u) if isinstance(u, str) else u for u in values.get("embeddings", [])
                ]
                specs = [JobSpec.check(values)]
            except (InvalidField, UnknownName) as error:
                name = error.field if isinstance(error, InvalidField) else error.kind
                reason = error.reason if isinstance(error, InvalidField) else str(error)
                self._wrong(marked.near(name), name, reason)
                specs = []
        return specs

    def _is_mapping(self, section: str, pair: tuple[Where, Any]) -> bool:
        if not isinstance(pair[1], dict):
            self._wrong(pair[0], section, f"should be a mapping of fields, got {short(pair[1])}")
            return False
        return True

    def _check_sections(self, content: dict[str, Any], marked: _Marked) -> None:
        known = (*SECTIONS, *JOB_FIELDS, *JobSpec.model_fields)
        for name in content:
            if name not in known:
                near = nearest(str(name), known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                self._wrong(marked.at(name), str(name), f"is no section and no field{hint}")
            elif name in ("axes", "zipped", "variants"):
                self._wrong(marked.at(name), str(name), "is written as matrix or zip in a file")
        for name, kind in (("defaults", dict), ("matrix", dict), ("zip", dict), ("include", list), ("exclude", list),
                           ("items", list)):  # fmt: skip
            if not isinstance(content.get(name, kind()), kind) and content.get(name) is not None:
                what = "a mapping" if kind is dict else "a list"
                self._wrong(marked.at(name), name, f"should be {what}, got {short(content[name])}")
                content[name] = kind()

    def _fields(self, section: str, content: dict[str, Any], marked: _Marked) -> dict[str, Any]:
        """Return the fields that a section, or a field at the top, sets."""
        found = content.get(section)
        if section != "defaults":
            found = {section: found}
        values = {}
        for name, value in (found or {}).items():
            where = marked.at(section, name) if section == "defaults" else marked.at(name)
            if name not in JobSpec.model_fields:
                if section != "defaults":
                    continue  # told already
                near = nearest(str(name), JobSpec.model_fields, 1)
                self._wrong(where, str(name), "is not a field" + (f"; did you mean {near[0]}?" if near else ""))
                continue
            try:
                values[name] = duration(name, value) if name in DURATIONS and value is not None else value
            except InvalidField as error:
                self._wrong(where, error.field, error.reason)
            if name == "dynamic" and value is False:
                values[name] = "off"  # YAML reads `off` as false
        return values

    def _axes(self, section: str, content: dict[str, Any], marked: _Marked) -> list[dict[str, Any]]:
        """Return the axes of `matrix` or `zip`: lists, single values, or spans such as 1..400."""
        axes = []
        for name, value in (content.get(section) or {}).items():
            span = _SPAN.fullmatch(value) if isinstance(value, str) else None
            if span:
                first, last, step = (int(part[:20]) if part else 1 for part in span.groups())
                if step < 1 or first > last or last > MAX_SEED:
                    reason = f"{short(value)} should count up, to {MAX_SEED} at most"
                    self._wrong(marked.at(section, name), str(name), reason)
                axes.append({"field": str(name), "values": {"first": first, "last": last, "step": step}})
                continue
            items = value if isinstance(value, list) else [value]
            for number, item in enumerate(items):
                where = marked.at(section, name, number) if isinstance(value, list) else marked.at(section, name)
                self._check_item(str(name), item, where)
            if not items:
                self._wrong(marked.at(section, name), str(name), "has no values")
            axes.append({"field": str(name), "values": items})
        return axes

    def _check_item(self, name: str, item: Any, where: Where) -> None:
        if not isinstance(item, int | float | str) or isinstance(item, bool):
            self._wrong(where, name, f"should be a number or a text, got {short(item)}")
        elif ":" not in name and name in JobSpec.model_fields and name not in ("axes", "zipped"):
            try:
                _check_value(name, item)
            except InvalidField as error:
                self._wrong(where, name, error.reason)

    def _points(self, section: str, content: dict[str, Any], marked: _Marked) -> list[dict[str, Any]]:
        points = []
        for number, point in enumerate(content.get(section) or []):
            if self._is_mapping(section, (marked.at(section, number), point)):
                for name, value in point.items():
                    self._check_item(str(name), value, marked.at(section, number, name))
                points.append({str(name): value for name, value in point.items()})
        return points

    def _wildcards(self, content: dict[str, Any], marked: _Marked) -> list[dict[str, Any]]:
        """Freeze wildcards: a mapping of names to lines, or a folder of text files beside the sweep file."""
        given = content.get("wildcards")
        if not given:
            return []
        named = self._named(given, marked) if isinstance(given, dict) else self._folder(given, marked)
        self.digest.update(json.dumps(named, sort_keys=True).encode())
        found = []
        for name, lines in named.items():
            try:
                found.append(self._tables.put_wildcard(name, lines).model_dump())
            except InvalidField as error:
                self._wrong(marked.at("wildcards", name), error.field, error.reason)
        return found

    def _named(self, given: dict[Any, Any], marked: _Marked) -> dict[str, list[str]]:
        named = {}
        for name, lines in given.items():
            if isinstance(lines, list) and lines and all(isinstance(line, str | int | float) for line in lines):
                named[str(name)] = [str(line) for line in lines]
            else:
                self._wrong(marked.at("wildcards", name), "wildcards", f"{short(name)} should be a list of lines")
        return named

    def _folder(self, given: Any, marked: _Marked) -> dict[str, list[str]]:
        folder = self._beside("wildcards", given, marked)
        if folder is None or not folder.is_dir():
            if folder is not None:
                self._wrong(marked.at("wildcards"), "wildcards", f"there is no folder {short(given)} beside the file")
            return {}
        named = {}
        for file in sorted(folder.rglob("*.txt")):
            _require_file(file)
            if file.stat().st_size > MAX_SWEEP_BYTES:
                self._wrong(marked.at("wildcards"), "wildcards", f"{file.name} is larger than {MAX_SWEEP_BYTES} bytes")
            elif lines := _lines(self._text_of(file, marked)):
                named[file.relative_to(folder).with_suffix("").as_posix()] = lines
        return named

    def _text_of(self, file: Path, marked: _Marked) -> str:
        try:
            return file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self._wrong(marked.at("wildcards"), "wildcards", f"{file.name} cannot be read as UTF-8 text ({error})")
            return ""

    def _beside(self, section: str, given: Any, marked: _Marked) -> Path | None:
        """Return a path that a sweep file names, which must lie in its folder or below."""
        parent = self._path.parent.resolve()
        fits = isinstance(given, str) and "\0" not in given and len(given) < MAX_PATH
        found: Path | None = (parent / str(given)).resolve() if fits else None
        if found is None or not found.is_relative_to(parent):
            reason = f"should name what lies in the file's own folder, got {short(given)}"
            self._wrong(marked.at(section), section, reason)
            return None
        if section == "rows" and not found.is_file():
            self._wrong(marked.at(section), section, f"there is no file {short(given)} beside the sweep")
            return None
        return found


MAX_PROMPT = 20_000


def _lines(text: str) -> list[str]:
    """Return a wildcard file's lines, without comments and blank ones."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _check_value(name: str, value: Any) -> None:
    """Check one field's value.

    Raises:
        InvalidField: with what is valid, and the nearest where there are names.
    """
    try:
        check_value(name, value)
    except UnknownName as error:
        raise InvalidField(name, str(error)) from error
    except ValueError as error:
        raise InvalidField(name, str(error).partition(": ")[2] or str(error)) from error


def _check_whole(values: dict[str, Any]) -> None:
    """Check fields together, as a job.

    Raises:
        InvalidField: names the field.
    """
    uses = values.get("embeddings", [])
    _check_uses(uses)
    try:
        JobSpec.check(values | {"embeddings": [EmbeddingUse.parse(u) if isinstance(u, str) else u for u in uses]})
    except UnknownName as error:
        raise InvalidField(error.kind, str(error)) from error


def _refuse_too_many(total: int) -> None:
    if total > MAX_IMAGES:
        raise InvalidField("count", f"the file makes more than {MAX_IMAGES} images")


def _check_uses(uses: Any) -> None:
    """Make sure that embeddings are asked for by a list.

    Raises:
        InvalidField: they are not.
    """
    if not isinstance(uses, list | tuple) or len(uses) > MAX_USES:
        raise InvalidField("embeddings", f"should be a list of up to {MAX_USES} names, got {short(uses)}")
    for use in uses:
        if not isinstance(use, str | dict | EmbeddingUse):
            raise InvalidField("embeddings", f"should be names such as EasyNegative:neg, got {short(use)}")
        if isinstance(use, dict):
            try:
                EmbeddingUse.model_validate(use)
            except ValidationError as error:
                raise InvalidField("embeddings", error.errors()[0]["msg"]) from error


def _require_file(path: Path) -> None:
    """Make sure that reading a path comes to an end.

    Raises:
        UnreadableFile: it is a pipe, a device or a folder.
    """
    if not path.is_file() and path.exists():
        raise UnreadableFile(cut(str(path)), "is no plain file; read from a pipe with -")


def duration(name: str, value: object) -> float:
    """Read seconds, or a text such as `90m`, `12h`, `7d`.

    Raises:
        InvalidField: it is neither.
    """
    is_plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    text = value if isinstance(value, str) else short(value)
    found = _DURATION.fullmatch(text) if is_plain and len(text) < MAX_DURATION else None
    if found is None:
        raise InvalidField(name, f"should be seconds or like 90m, 12h, 7d, got {short(value)}")
    return float(found.group(1)) * _SECONDS[found.group(2)]


# ---- lines of tables


@dataclass
class _Line:
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


class _Located(dict[str, Any]):
    """A row's fields, with the line they stand in."""

    def __init__(self, values: dict[str, Any], line: _Line) -> None:
        super().__init__(values)
        self.line = line


def _open(path: Path) -> IO[str]:
    if str(path) == "-":
        return sys.stdin
    _require_file(path)
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


def _jsonl(file: IO[str]) -> Iterator[_Line]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            yield _Line(number, "", {}, (0, f"is longer than {MAX_LINE} characters"))
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


def _json_line(number: int, text: str) -> _Line:
    try:
        values = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        return _Line(number, text, {}, (error.colno, f"is no JSON: {error.msg.lower()}"))
    except (ValueError, RecursionError) as error:
        reason = "is nested too deep" if isinstance(error, RecursionError) else f"cannot be read: {error}"
        return _Line(number, text, {}, (0, reason[:200]))
    if not isinstance(values, dict):
        return _Line(number, text, {}, (1, 'should be an object such as {"prompt": "…"}'))
    return _Line(number, text, values)


def _csv(file: IO[str], path: Path) -> Iterator[_Line]:
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
            yield _Line(1, "", {}, (number, reason))
            return
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Line(first, "", {}, (0, f"a quote that opens here is not closed, or stands in a cell ({error})"))
            continue
        if not any(cells):
            continue
        text = json.dumps(cells, ensure_ascii=False)
        if len(cells) > len(header):
            yield _Line(first, text, {}, (len(header) + 1, "has more cells than the header"))
            continue
        values = {name: _cell(name, cell) for name, cell in zip(header, cells, strict=False) if cell.strip()}
        yield _Line(first, text, values, columns=columns)


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


# ---- YAML with places


class _BoundedLoader(yaml.SafeLoader):
    """Reads no more than so many values, nested no deeper than so far, before anything is made of them."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes, self._depth = 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count a value and what it stands in."""
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            what = (
                f"holds more than {MAX_NODES} values"
                if self._nodes > MAX_NODES
                else f"is nested deeper than {MAX_DEPTH}"
            )
            raise yaml.MarkedYAMLError(problem=what, problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Marked:
    """A YAML document as plain values, and where every one of them stands."""

    def __init__(self, text: str, file: str) -> None:
        self._marks: dict[tuple[Any, ...], Where] = {}
        self._left, self._file = MAX_NODES, file
        try:
            loader = _BoundedLoader(text)
            node = loader.get_single_node()
            self.value = self._build(node, (), loader) if node is not None else {}
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            raise InvalidRows((RowError(file, *where, "YAML", str(error.problem or error.context)),)) from error
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            reason = "is nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
            raise InvalidRows((RowError(file, 1, 1, "YAML", reason),)) from error

    def _build(self, node: yaml.Node, path: tuple[Any, ...], loader: yaml.SafeLoader) -> Any:
        where = node.start_mark.line + 1, node.start_mark.column + 1
        self._marks[path] = where
        self._left -= 1
        if self._left < 0 or len(path) > MAX_DEPTH:
            reason = f"holds more than {MAX_NODES} values" if self._left < 0 else f"is nested deeper than {MAX_DEPTH}"
            raise InvalidRows((RowError(self._file, *where, "YAML", reason),))
        if isinstance(node, yaml.MappingNode):
            found: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
                if not isinstance(key, str | int | float) or key in found:
                    line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
                    is_twice = key is not None and key in found
                    reason = f"{short(key)} stands twice" if is_twice else "a field's name should be a text"
                    raise InvalidRows((RowError(self._file, line, column, "YAML", reason),))
                found[key] = self._build(value_node, (*path, key), loader)
            return found
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, number), loader) for number, item in enumerate(node.value)]
        try:
            value = loader.construct_object(node)
        except (ValueError, OverflowError) as error:
            raise InvalidRows((RowError(self._file, *where, "YAML", f"cannot be read: {error}"),)) from error
        return value if isinstance(value, str | int | float | bool) or value is None else str(node.value)

    def at(self, *path: Any) -> Where:
        """Return where a value stands."""
        return self._marks.get(path, (1, 1))

    def near(self, name: str) -> Where:
        """Return where the field that an error names stands, or its section."""
        first, _, _ = name.partition(".")
        section = {"axes": "matrix", "zipped": "zip"}.get(first, first)
        for path in (("defaults", first), (section,), ("matrix",), ("defaults",)):
            if path in self._marks:
                return self._marks[path]
        return 1, 1
