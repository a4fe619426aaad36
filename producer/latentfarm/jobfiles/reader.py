"""Files of jobs read: sections of sweeps, rows of tables."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentfarm_shared.errors import InvalidField, UnknownName, UnreadableFile, UsageError, cut, nearest
from latentfarm_shared.parameters import EmbeddingUse, Side, short
from latentfarm_shared.specs import JOB_FIELDS, MAX_SEED, JobSpec
from latentfarm_shared.tables import TableStore

from latentfarm.jobfiles.lines import Line, LocatedRow, csv_lines, jsonl_lines, open_table
from latentfarm.jobfiles.located import Enough, Findings, InvalidRows, RowError, Where
from latentfarm.jobfiles.marked import MarkedDocument
from latentfarm.jobfiles.rows import MADE, RowSorter
from latentfarm.jobfiles.values import DURATIONS, check_field, check_uses, check_whole, duration, require_file

MAX_SWEEP_BYTES = 16 * 2**20
MAX_PATH = 200
TABLES = (".jsonl", ".ndjson", ".csv", ".tsv")
SWEEPS = (".yaml", ".yml", ".json")
SECTIONS = ("name", "defaults", "matrix", "zip", "include", "exclude", "items", "rows", "wildcards")
_SPAN = re.compile(r"\s*(\d+)\s*\.\.\s*(\d+)(?:\s*(?:\.\.|step)\s*(\d+))?\s*")


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
    made = next((name for name in MADE if name in defaults), None)
    if made is not None:
        raise InvalidField(made, "is made from a file, not given")
    check_whole(dict(defaults))
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
    if not specs and not reader.findings.errors:
        raise UnreadableFile(str(path), "holds no job")
    reader.findings.check()
    lines = tuple(reader.sorter.places) or ((1, False),) * len(specs)
    return JobFile(tuple(specs), reader.digest.hexdigest(), str(path), lines)


class _Reader:
    def __init__(
        self, path: Path, tables: TableStore, defaults: Mapping[str, Any], side_of: Callable[[str], Side]
    ) -> None:
        self._path, self._tables = path, tables
        self.findings = Findings(str(path))
        self.sorter = RowSorter(tables, side_of, self.findings)
        self.digest = hashlib.sha256(json.dumps(dict(defaults), sort_keys=True, default=str).encode())
        self._defaults = dict(defaults)

    def _wrong(self, where: Where, name: str, reason: str, file: Path | None = None) -> None:
        self.findings.note(where, name, reason, str(file) if file else None)

    # ---- tables

    def table(self, path: Path, defaults: Mapping[str, Any]) -> list[JobSpec]:
        """Read a table; rows that ask for other checkpoints, lanes … than the first become jobs of their own."""
        try:
            with open_table(path) as file:
                rows = csv_lines(file, path) if path.suffix.lower() in (".csv", ".tsv") else jsonl_lines(file)
                return self.sorter.jobs(self._rows(self._digested(rows), path), dict(defaults), path.stem)
        except Enough:
            return []

    def _digested(self, rows: Iterable[Line]) -> Iterator[Line]:
        for line in rows:
            self.digest.update(line.text.encode() + b"\n")
            yield line

    def _rows(self, lines: Iterable[Line], path: Path) -> Iterator[tuple[Where, dict[str, Any]]]:
        for line in lines:
            line.file = path
            if line.error is not None:
                self._wrong((line.number, line.error[0]), "row", line.error[1], path)
            else:
                yield (line.number, 0), LocatedRow(line.values, line)

    # ---- sweeps

    def sweep(self) -> list[JobSpec]:
        """Read a sweep file."""
        try:
            return self._sweep()
        except Enough:
            return []

    def _sweep(self) -> list[JobSpec]:
        require_file(self._path)
        if self._path.stat().st_size > MAX_SWEEP_BYTES:
            raise UnreadableFile(str(self._path), f"is larger than {MAX_SWEEP_BYTES} bytes; put rows into a table")
        text = self._path.read_text(encoding="utf-8-sig")
        self.digest.update(text.encode())
        marked = MarkedDocument(text, str(self._path))
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
        self.findings.check()
        return self._rows_of(content, values, marked)

    def _name(self, content: dict[str, Any], marked: MarkedDocument) -> str:
        name = content.get("name", self._path.stem)
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            self._wrong(marked.at("name"), "name", f"should be a text, got {short(name)}")
        return str(name)

    def _rows_of(self, content: dict[str, Any], values: dict[str, Any], marked: MarkedDocument) -> list[JobSpec]:
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
            specs = self.sorter.jobs(checked, values, str(values["name"]))
        else:
            try:
                check_uses(values.get("embeddings", []))
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

    def _check_sections(self, content: dict[str, Any], marked: MarkedDocument) -> None:
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

    def _fields(self, section: str, content: dict[str, Any], marked: MarkedDocument) -> dict[str, Any]:
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

    def _axes(self, section: str, content: dict[str, Any], marked: MarkedDocument) -> list[dict[str, Any]]:
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
                check_field(name, item)
            except InvalidField as error:
                self._wrong(where, name, error.reason)

    def _points(self, section: str, content: dict[str, Any], marked: MarkedDocument) -> list[dict[str, Any]]:
        points = []
        for number, point in enumerate(content.get(section) or []):
            if self._is_mapping(section, (marked.at(section, number), point)):
                for name, value in point.items():
                    self._check_item(str(name), value, marked.at(section, number, name))
                points.append({str(name): value for name, value in point.items()})
        return points

    def _wildcards(self, content: dict[str, Any], marked: MarkedDocument) -> list[dict[str, Any]]:
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

    def _named(self, given: dict[Any, Any], marked: MarkedDocument) -> dict[str, list[str]]:
        named = {}
        for name, lines in given.items():
            if isinstance(lines, list) and lines and all(isinstance(line, str | int | float) for line in lines):
                named[str(name)] = [str(line) for line in lines]
            else:
                self._wrong(marked.at("wildcards", name), "wildcards", f"{short(name)} should be a list of lines")
        return named

    def _folder(self, given: Any, marked: MarkedDocument) -> dict[str, list[str]]:
        folder = self._beside("wildcards", given, marked)
        if folder is None or not folder.is_dir():
            if folder is not None:
                self._wrong(marked.at("wildcards"), "wildcards", f"there is no folder {short(given)} beside the file")
            return {}
        named = {}
        for file in sorted(folder.rglob("*.txt")):
            require_file(file)
            if file.stat().st_size > MAX_SWEEP_BYTES:
                self._wrong(marked.at("wildcards"), "wildcards", f"{file.name} is larger than {MAX_SWEEP_BYTES} bytes")
            elif lines := _lines(self._text_of(file, marked)):
                named[file.relative_to(folder).with_suffix("").as_posix()] = lines
        return named

    def _text_of(self, file: Path, marked: MarkedDocument) -> str:
        try:
            return file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self._wrong(marked.at("wildcards"), "wildcards", f"{file.name} cannot be read as UTF-8 text ({error})")
            return ""

    def _beside(self, section: str, given: Any, marked: MarkedDocument) -> Path | None:
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


def _lines(text: str) -> list[str]:
    """Return a wildcard file's lines, without comments and blank ones."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
