"""Rows of tables and of sweep files' items: checked, sorted by the jobs they belong to, streamed into the store."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from latentfarm_shared.errors import InvalidField, cut, nearest
from latentfarm_shared.explicit import bare, plain_name, requested, standing
from latentfarm_shared.parameters import EmbeddingUse, Side, short
from latentfarm_shared.prompts.contract import with_word
from latentfarm_shared.specs import JOB_FIELDS, MAX_IMAGES, MAX_SEED, JobSpec
from latentfarm_shared.tables import RowWriter, TableStore

from latentfarm.jobfiles.lines import LocatedRow
from latentfarm.jobfiles.located import Enough, Findings, Where
from latentfarm.jobfiles.values import DURATIONS, check_field, check_uses, check_whole, duration, refuse_too_many

MAX_GROUPS = 200
MAX_PROMPT = 20_000
MAX_VALID = 100_000
MADE = ("rows", "wildcards", "variants")  # fields that a file is made into
QUICK = frozenset(
    {"prompt", "negative_prompt", "seed", "steps", "cfg_scale", "sampler", "schedule", "clip_skip", "variation_seed"}
)
IN_ROWS = (frozenset(JobSpec.model_fields) - JOB_FIELDS) | {"seed"}


@dataclass
class Group:
    """Rows that share the fields of their job; it `is_straight` if they stand in one line each from `line` on."""

    fields: dict[str, Any]
    writer: RowWriter
    line: int
    number: int
    is_straight: bool = True
    first: dict[str, Any] = field(default_factory=dict)

    def add(self, images: Iterable[dict[str, Any]], line: int, count: int) -> None:
        """Write the images of one row."""
        self.is_straight &= line == self.line + self.writer.total and count == 1
        for image in images:
            self.first = self.first or image
            self.writer.add(image)


@dataclass(frozen=True)
class Placed:
    """Where a row went: the number of its job, and its images, `count` from `first` on."""

    job: int
    first: int
    count: int


class RowSorter:
    """Makes jobs of rows; those that ask for other checkpoints, lanes … than others become jobs of their own."""

    def __init__(self, tables: TableStore, side_of: Callable[[str], Side], findings: Findings) -> None:
        self._tables, self._side_of, self._findings = tables, side_of, findings
        self._valid: set[tuple[str, Any]] = set()
        self.begin({}, "rows")
        self.places: list[tuple[int, bool]] = []
        """Where each job begins, and whether its rows stand in one line each from there on."""

    def jobs(self, rows: Iterable[tuple[Where, dict[str, Any]]], defaults: dict[str, Any], name: str) -> list[JobSpec]:
        """Check rows and stream them into the store.

        Raises:
            InvalidRows: what is wrong, and where.
        """
        try:
            check_whole(defaults)
        except InvalidField as error:
            self._findings.note((1, 1), error.field, error.reason)
            self._findings.check()
        self.begin(defaults, name)
        for where, row in rows:
            try:
                self.add(where, row)
            except InvalidField as error:
                self._note(where, row, error)
        self._findings.check()
        return self.finish()

    def begin(self, defaults: dict[str, Any], name: str) -> None:
        """Begin a table whose rows have these fields unless they say otherwise."""
        self._uses, self._name, self._total = defaults.get("embeddings", []), name, 0
        self._base = {name: value for name, value in defaults.items() if name != "embeddings"}
        self._groups: dict[str, Group] = {}

    def add(self, where: Where, row: dict[str, Any]) -> Placed:
        """Add a row; return which of the jobs it belongs to, and which images of it it makes.

        Raises:
            InvalidField: what is wrong with it; nothing is added.
        """
        values = self._checked(row, self._base, self._uses)
        count = values.pop("count", 1)
        refuse_too_many(self._total + count)
        images = _images(values, self._base, count)
        group = self._group_of(values, where)
        placed = Placed(group.number, group.writer.total, count)
        group.add(images, where[0], count)
        self._total += count
        return placed

    def finish(self) -> list[JobSpec]:
        """Return the jobs of the rows that were added."""
        groups = self._groups.values()
        self.places = [(group.line, group.is_straight) for group in groups]
        return [_job_of(group, self._base, self._name) for group in groups]

    def _note(self, where: Where, row: dict[str, Any], error: InvalidField) -> None:
        """Note what is wrong with a row, at its field where that is known."""
        if isinstance(row, LocatedRow):
            place = where[0], row.line.column_of(error.field)
            self._findings.note(place, error.field, error.reason, str(row.line.file))
        else:
            self._findings.note(where, error.field, error.reason)

    def _group_of(self, values: dict[str, Any], where: Where) -> Group:
        """Return the job that a row belongs to by the fields of its job."""
        shared = {name: value for name, value in values.items() if name not in IN_ROWS}
        key = json.dumps(shared, sort_keys=True, default=str)
        if key not in self._groups:
            if len(self._groups) == MAX_GROUPS:
                self._findings.note(where, "file", f"its rows make more than {MAX_GROUPS} different jobs")
                raise Enough
            self._groups[key] = Group(shared, self._tables.writer(self._name), where[0], len(self._groups))
        return self._groups[key]

    def _checked(self, row: dict[str, Any], base: dict[str, Any], uses: Iterable[Any]) -> dict[str, Any]:
        """Return a row's fields, with its embeddings written into its prompts.

        Raises:
            InvalidField: the field and why.
        """
        _refuse_strange(row)
        values = row | {name: duration(name, row[name]) for name in DURATIONS if name in row}
        count = values.get("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_IMAGES:
            raise InvalidField("count", f"should be 1 to {MAX_IMAGES}, got {short(count)}")
        for name in QUICK & values.keys():
            self._check(name, values[name])
        if not values.keys() - {"count"} <= QUICK:
            check_whole(base | values | {"count": 1})
        own = values.pop("embeddings", [])
        check_uses(own)
        for use in (*uses, *own):
            self._write_in(
                EmbeddingUse.parse(use) if isinstance(use, str) else EmbeddingUse.model_validate(use), values, base
            )
        return values

    def _write_in(self, use: EmbeddingUse, values: dict[str, Any], base: dict[str, Any]) -> None:
        """Ask for an embedding in the prompt it belongs in, unless that does so itself."""
        name = "negative_prompt" if (use.side or self._side_of(use.name)) == "negative" else "prompt"
        text, plain = str(values.get(name, base.get(name, ""))), plain_name(use.name)
        is_there = plain.lower() in {plain_name(asked).lower() for asked in requested(text)}
        is_there = is_there or standing(plain).search(bare(text)) is not None
        values[name] = text if is_there else with_word(text, f"<{use.name}>")

    def _check(self, name: str, value: Any) -> None:
        """Check one field by itself; what was found good once is good."""
        if name in ("prompt", "negative_prompt"):
            if not isinstance(value, str) or len(value) > MAX_PROMPT or not value.isprintable():
                check_field(name, value)
        elif not isinstance(value, int | float | str) or isinstance(value, bool):
            check_field(name, value)
        elif (name, value) not in self._valid:
            check_field(name, value)
            if len(self._valid) < MAX_VALID:
                self._valid.add((name, value))


def _refuse_strange(row: dict[str, Any]) -> None:
    """Refuse fields that are none, or that are made from a file.

    Raises:
        InvalidField: names the first.
    """
    made = next((name for name in MADE if name in row), None)
    if made is not None:
        raise InvalidField(made, "is made from a file, not given")
    unknown = next((name for name in row if name not in JobSpec.model_fields), None)
    if unknown is not None:
        near = nearest(str(unknown), JobSpec.model_fields, 1)
        raise InvalidField(cut(str(unknown)), "is not a field" + (f"; did you mean {near[0]}?" if near else ""))


def _images(values: dict[str, Any], base: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Return the images of one row: seeds count up, with a variation the variation's, as in A1111; -1 draws the first.

    Raises:
        InvalidField: they go beyond the last seed.
    """
    own = {name: value for name, value in values.items() if name in IN_ROWS}
    wanted = base | own
    own["seed"] = _drawn(wanted.get("seed", -1), count)
    counting = "seed"
    if wanted.get("variation_strength"):
        own["variation_seed"] = _drawn(wanted.get("variation_seed", -1), count)
        counting = "variation_seed"
    if own[counting] + count - 1 > MAX_SEED:
        raise InvalidField("seed", f"seed + count must stay below {MAX_SEED + 1}")
    return (own | {counting: own[counting] + number} for number in range(count))


def _drawn(seed: Any, count: int) -> int:
    return secrets.randbelow(MAX_SEED - count) if int(seed) == -1 else int(seed)


def _job_of(group: Group, base: dict[str, Any], name: str) -> JobSpec:
    """Return the job of a group of rows; a single row needs no table."""
    values = {"name": name} | base | group.fields
    if group.writer.total == 1:
        return JobSpec.check(values | group.first)
    return JobSpec.check(values | {"seed": 0, "rows": group.writer.close().model_dump()})
