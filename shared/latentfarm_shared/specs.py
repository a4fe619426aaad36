"""A job's spec: one frozen value with one encode and one decode, from which every image follows."""

from __future__ import annotations

import math
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from latentfarm_shared.errors import InvalidField, UnknownName, cut, nearest
from latentfarm_shared.explicit import bare, removed, weighed
from latentfarm_shared.names import EmphasisMode, resolve_sampler, resolve_schedule
from latentfarm_shared.parameters import (
    Compat,
    EmbeddingUse,
    Fraction,
    HiresFix,
    SamplingOptions,
    printable,
    refuse_truth,
    short,
    split_sampler,
)
from latentfarm_shared.sweeps.axes import Axis, Point, Value
from latentfarm_shared.sweeps.dynamic import Node, parse
from latentfarm_shared.sweeps.orders import Order, OrderName, order_of
from latentfarm_shared.sweeps.points import Column, Grid

MAX_SEED = 2**32 - 1
MAX_SPEC_BYTES = 64 * 1024
MAX_IMAGES = 1_000_000
MAX_TEXT = 200_000
SAMPLED = 32
SEEDS = ("seed", "variation_seed")
SETTLED = {"settled": True}  # a spec that was checked when it was submitted

Lane = Literal["interactive", "batch"]
MAX_EDGE = 4096
Edge = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]
ResizeEdge = Annotated[int, Field(ge=8, le=2048)]
Seconds = Annotated[float, Field(gt=0, le=10 * 365 * 86400, allow_inf_nan=False)]
Need = Annotated[str, Field(pattern=r"^[\w.-]+(:[\w.-]+)?$", max_length=100)]
Tag = Annotated[str, Field(min_length=1, max_length=100)]


class NoData:
    """No rows and no wildcards."""

    def row(self, number: int) -> Point:
        """Have none."""
        raise IndexError(number)

    def wildcard(self, name: str) -> list[str]:
        """Have none."""
        raise KeyError(name)


class Data(Protocol):
    """The rows and wildcard files that a job was frozen to."""

    def row(self, number: int) -> Point:
        """Return a row, the fields it sets."""
        ...

    def wildcard(self, name: str) -> Sequence[str]:
        """Return the lines of a wildcard. Raises KeyError."""
        ...


NO_DATA = NoData()


class Rows(BaseModel):
    """A table of `total` rows, each the fields of one image, frozen in the store; `index` is the sha256 of its index.

    `chunk` rows lie in one object.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("rows", max_length=300)
    total: int = Field(ge=1, le=MAX_IMAGES)
    chunk: int = Field(ge=1, le=100_000)
    index: str = Field(pattern=r"^[0-9a-f]{64}$")


class Wildcard(BaseModel):
    """A wildcard file, `__name__` in prompts, frozen in the store by its sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


SWEPT = (
    "model", "prompt", "negative_prompt", "sampler", "schedule", "steps", "cfg_scale", "seed", "clip_skip", "width",
    "height", "rng", "emphasis", "variation_strength", "variation_seed", "ensd",
)  # fmt: skip


class Pack(BaseModel):
    """Instead of a picture, make an embedding called `name` that stands for the job's prompt.

    `vectors` are found in `steps` steps of gradient descent; a `negative` one is for negative prompts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=120)
    vectors: int = Field(8, ge=1, le=64)
    negative: bool = False
    steps: int = Field(600, ge=1, le=20_000)
    allow_word: bool = False


class JobSpec(BaseModel):
    """What a user asked for. `seed` is that of the first image; image `i` has `seed + i`, as in A1111.

    With a `variation_strength` all images share `seed`, and image `i` has `variation_seed + i`, as there. `axes` multiply:
    `count` images are drawn at every point. `without` is what a submission takes out of the prompts of a sweep that
    may drop missing embeddings: words, and `<NAME>` for explicit requests.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    expander: Literal[1, 2] = 2
    name: str = Field("", max_length=200)
    prompt: str = Field("", max_length=20_000)
    negative_prompt: str = Field("", max_length=20_000)
    embeddings: Annotated[tuple[EmbeddingUse, ...], Field(max_length=1000, fail_fast=True)] = ()
    model: str = Field("demo", min_length=1, max_length=200)
    sampler: str = "Euler"
    schedule: str = "Automatic"
    steps: int = Field(20, ge=1, le=150)
    cfg_scale: float = Field(7.0, ge=0, le=30, allow_inf_nan=False)
    seed: int = Field(-1, ge=-1, le=MAX_SEED)
    variation_seed: int = Field(-1, ge=-1, le=MAX_SEED)
    variation_strength: Fraction = 0.0
    seed_resize: tuple[ResizeEdge, ResizeEdge] | None = None
    ensd: int = Field(0, ge=0, le=MAX_SEED)
    rng: Literal["CPU", "NV"] = "CPU"
    width: Edge = 128
    height: Edge = 128
    clip_skip: int = Field(1, ge=1, le=12)
    emphasis: EmphasisMode = "Original"
    tiling: bool = False
    hires: HiresFix | None = None
    options: SamplingOptions = SamplingOptions()
    compat: tuple[Compat, ...] = ()
    count: int = Field(1, ge=1, le=1_000_000)
    lane: Lane = "interactive"
    on_missing: Literal["fail", "warn", "drop"] = "fail"
    axes: tuple[Axis, ...] = Field((), max_length=16)
    zipped: tuple[Axis, ...] = Field((), max_length=16)
    include: tuple[Point, ...] = Field((), max_length=1000)
    exclude: tuple[Point, ...] = Field((), max_length=64)
    rows: Rows | None = None
    dynamic: Literal["off", "random", "all"] = "off"
    dynamic_seed: int = Field(0, ge=0, le=MAX_SEED)
    variants: int = Field(1, ge=1, le=MAX_IMAGES)
    wildcards: tuple[Wildcard, ...] = Field((), max_length=200)
    order: OrderName = "sequential"
    approve_after: int | None = Field(None, ge=1)
    reuse: bool = True
    priority: int = Field(0, ge=-100, le=100)
    expires_in: Seconds | None = None
    max_runtime: Seconds | None = None
    keep: Seconds | None = None
    key: str | None = Field(None, min_length=1, max_length=300)
    tags: Annotated[tuple[Tag, ...], Field(max_length=50, fail_fast=True)] = ()
    metadata: dict[Tag, Annotated[str, Field(max_length=1000)]] = Field({}, max_length=50)
    requires: Annotated[tuple[Need, ...], Field(max_length=20, fail_fast=True)] = ()
    without: Annotated[tuple[str, ...], Field(max_length=10_000, fail_fast=True)] = ()
    pack: Pack | None = None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a changed copy; what was worked out of the old values is worked out anew."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("grid", "layout", "swept", "total"):
            copy.__dict__.pop(name, None)
        return copy

    # ---- which images there are

    @cached_property
    def grid(self) -> Grid:
        """The points of the axes, by number."""
        columns = [Column((axis,)) for axis in self.axes]
        if self.zipped:
            columns.append(Column(self.zipped))
        columns.sort(key=lambda column: "model" not in column.fields)  # images of one checkpoint stand together
        return Grid(tuple(columns), self.exclude, self.include)

    @cached_property
    def swept(self) -> tuple[Axis, ...]:
        """Every axis, zipped or not."""
        return (*self.axes, *self.zipped)

    @property
    def is_sweep(self) -> bool:
        """Whether images differ in more than their seeds."""
        return bool(self.swept or self.rows or self.include or self.dynamic != "off")

    @cached_property
    def total(self) -> int:
        """How many images the job has: rows times points of the grid times variants of its prompts times `count`."""
        rows = self.rows.total if self.rows else 1
        return rows * self.grid.total * self.variants * self.count

    @property
    def text_variants(self) -> int:
        """How many different prompts the axes make, with rows and templates; rows alone are checked one by one."""
        made = math.prod(len(axis.items) for axis in self.axes if axis.is_text)
        zipped = len(self.zipped[0].items) if any(axis.is_text for axis in self.zipped) else 1
        rows = self.rows.total if self.rows and made * zipped > 1 else 1
        return made * zipped * rows * (MAX_IMAGES if self.dynamic == "random" else self.variants)

    @property
    def models(self) -> tuple[str, ...]:
        """The checkpoints the job draws on, in the order of its images."""
        axis = next((axis for axis in self.swept if axis.field == "model"), None)
        return tuple(dict.fromkeys(map(str, axis.items))) if axis else (self.model,)

    @cached_property
    def layout(self) -> Layout:
        """Where images stand in the order they are handed out."""
        return Layout.of(self)

    def place(self, index: int) -> tuple[int, int, int, int]:
        """Return the row, the number of the point, the variant and the place among `count` of an image."""
        index, among = divmod(index, self.count)
        index, variant = divmod(index, self.variants)
        row, number = divmod(index, self.grid.total)
        return row, number, variant, among

    def point_of(self, index: int, data: Data = NO_DATA) -> Point:
        """Return the values that an image's row and point set."""
        row, number, _, _ = self.place(index)
        values = data.row(row) if self.rows else {}
        return values | self.grid.at(number)

    def requested_at(self, values: Point, texts: Mapping[str, str] | None = None) -> Self:
        """Return the job of one point as it was asked for: its values and replaced texts, explicit requests as they are.

        `texts` are what its templates came to.
        """
        if not self.is_sweep:
            return self
        plain = {field: value for field, value in values.items() if ":" not in field}
        job = self.model_validate(self.model_dump() | _PLAIN | plain, context=SETTLED)
        for axis in self.swept:
            if axis.kind == "replace" and axis.field in values:
                value = str(values[axis.field])
                job = job.with_prompts({field: replaced(text, axis.subject, value) for field, text in job.prompts})
        return job.with_prompts(dict(texts)) if texts else job

    def at(self, values: Point, texts: Mapping[str, str] | None = None) -> Self:
        """Return the job of one point as it is drawn: bare names in place of requests, weighed as its axes say."""
        job = self.requested_at(values, texts).drawn()
        for axis in self.swept:
            if axis.kind == "strength" and axis.field in values:
                weight = float(values[axis.field])
                job = job.with_prompts({field: weighed(text, axis.subject, weight) for field, text in job.prompts})
        return job

    def templates(self, values: Point, data: Data = NO_DATA) -> dict[str, Node]:
        """Return the parsed templates of the prompts at a point; none if prompts are no templates.

        Raises:
            InvalidField: a template cannot be read, or names a wildcard that is not there.
        """
        if self.dynamic == "off":
            return {}
        found = {}
        for field, text in self.requested_at(values).prompts:
            try:
                found[field] = _parsed(text, self.wildcards, data)
            except KeyError as error:
                known = [wildcard.name for wildcard in self.wildcards]
                raise InvalidField(field, str(UnknownName.among("wildcard", str(error.args[0]), known))) from error
            except (ValueError, RecursionError) as error:
                raise InvalidField(field, f"{error}") from error
        return found

    @property
    def seed_of_order(self) -> int:
        """What a random order is drawn from."""
        return self.dynamic_seed

    # ---- what they cost

    @property
    def pixel_steps(self) -> int:
        """What one image costs a device, pixels times steps, of both passes."""
        cost = self.width * self.height * self.steps
        if self.hires is not None:
            wide, high = self.hires.target(self.width, self.height)
            cost += wide * high * (self.hires.steps or self.steps)
        return cost

    @property
    def mean_cost(self) -> float:
        """What an image of the job costs on the mean, estimated from images spread over its grid."""
        if not self.swept and not self.include:
            return float(self.pixel_steps)
        total = self.grid.total
        numbers = [i * total // min(total, SAMPLED) for i in range(min(total, SAMPLED))]
        costs = []
        for number in numbers:
            values = {k: v for k, v in self.grid.at(number).items() if k in ("width", "height", "steps")}
            costs.append(self.model_copy(update=values).pixel_steps)
        return sum(costs) / len(costs)

    def drawn(self) -> Self:
        """Return the job with bare names in place of explicit requests, and without the words it does without."""
        requests = {word[1:-1].lower() for word in self.without if word.startswith("<")}
        words = [word for word in self.without if not word.startswith("<")]
        texts = {field: removed(bare(text, requests), words) for field, text in self.prompts}
        return self.with_prompts(texts).model_copy(update={"without": ()})

    @model_validator(mode="before")
    @classmethod
    def _split_legacy_sampler(cls, values: Any) -> Any:
        return split_sampler(refuse_truth(values, ("tiling", "reuse")), "Automatic")

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        return resolve_schedule(value)

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _printable(cls, value: str) -> str:
        return printable(value)

    @model_validator(mode="after")
    def _last_seed_fits(self) -> Self:
        first = self.variation_seed if self.variation_strength else self.seed
        if first + self.count - 1 > MAX_SEED:
            raise ValueError(f"seed + count must stay below {MAX_SEED + 1}")
        return self

    @model_validator(mode="after")
    def _pack_is_one(self) -> Self:
        if self.pack is not None and (self.total != 1 or not self.prompt.strip() or self.hires is not None):
            raise ValueError("packing takes one prompt, which is not empty, and makes one embedding")
        return self

    @model_validator(mode="after")
    def _sweep_makes_images(self, info: ValidationInfo) -> Self:
        if info.context == SETTLED:
            return self
        if self.variants > 1 and self.dynamic != "all":
            raise ValueError("variants is worked out where dynamic is 'all'; leave it out")
        if self.is_sweep or self.exclude:
            check_sweep(self)
        return self

    @field_validator("tags", "metadata")
    @classmethod
    def _visible(cls, value: Any) -> Any:
        for text in (*value, *value.values()) if isinstance(value, dict) else value:
            if not text.isprintable():
                raise ValueError(f"should hold printable characters alone, got {short(text)}")
        return value

    @field_validator("embeddings", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Take `NAME`, `NAME:neg` and `NAME:pos` as the command line does."""
        if not isinstance(value, list | tuple):
            return value
        return [EmbeddingUse.parse(use) if isinstance(use, str) else use for use in value]

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _points_of_numbers_and_texts(cls, value: Any) -> Any:
        for point in value if isinstance(value, list | tuple) else ():
            refuse_truth(point)
        return value

    @field_validator("requires")
    @classmethod
    def _memory_is_a_number(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for need in value:
            if need.startswith("memory:") and not need.removeprefix("memory:").replace(".", "", 1).isdecimal():
                raise ValueError(f"{need!r} should be like memory:16, in GiB")
        return value

    @field_validator("axes")
    @classmethod
    def _models_first(cls, value: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(sorted(value, key=lambda axis: axis.field != "model"))

    @field_validator("key", "name")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("should be one line of printable characters")
        return value

    @model_validator(mode="after")
    def _hires_fits(self) -> Self:
        if self.hires is not None:
            wide, high = self.hires.target(self.width, self.height)
            if max(wide, high) > MAX_EDGE or min(wide, high) < 64:
                raise ValueError(f"the hires pass would be {wide}x{high}; edges of 64 to {MAX_EDGE} are possible")
        return self

    @property
    def prompts(self) -> tuple[tuple[str, str], ...]:
        """Every prompt with its field's name: the first pass's, then those of a hires pass that has its own."""
        own = self.hires or HiresFix()
        named = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "hires.prompt": own.prompt,
            "hires.negative_prompt": own.negative_prompt,
        }
        return tuple((field, text) for field, text in named.items() if text or not field.startswith("hires"))

    def with_prompts(self, prompts: dict[str, str]) -> Self:
        """Return the spec with other texts in the fields that `prompts` names."""
        own = {field: text for field, text in prompts.items() if not field.startswith("hires.")}
        hires = {field.removeprefix("hires."): text for field, text in prompts.items() if field.startswith("hires.")}
        if self.hires is not None and hires:
            return self.model_copy(update=own | {"hires": self.hires.model_copy(update=hires)})
        return self.model_copy(update=own)

    @classmethod
    def check(cls, values: dict[str, Any], line: int | None = None) -> Self:
        """Build a spec from loose values.

        Raises:
            InvalidField: names the field, and the line of the file where given.
            UnknownName: no such sampler or schedule.
        """
        unknown = next((name for name in values if name not in cls.model_fields), None)
        if unknown is not None:
            unknown = cut(str(unknown))
            near = nearest(unknown, cls.model_fields)
            raise InvalidField(unknown, "is not a field" + (f"; did you mean {near[0]}?" if near else ""), line)
        try:
            spec = cls.model_validate(values)
        except RecursionError as error:
            raise InvalidField("job", "is nested too deep", line) from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "spec"
            message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
            given = f", got {short(first['input'])}" if first["loc"] else ""
            named, colon, rest = message.partition(": ")
            if field == "spec" and colon and named in cls.model_fields:
                field, message = named, rest
            raise InvalidField(field, message + given, line) from error
        if len(spec.encode().encode()) > MAX_SPEC_BYTES:
            raise InvalidField(
                "job", f"is larger than {MAX_SPEC_BYTES} bytes; put long lists into a table of rows", line
            )
        return spec

    def encode(self) -> str:
        """Return the one wire form."""
        return self.model_dump_json()

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """Read the wire form back."""
        return cls.model_validate_json(text, context=SETTLED)


_TEMPLATES: OrderedDict[tuple[str, tuple[Wildcard, ...]], Node] = OrderedDict()
_TEMPLATES_KEPT = 64
_templates_guard = threading.Lock()


def _parsed(text: str, wildcards: tuple[Wildcard, ...], data: Data) -> Node:
    """Return a parsed template, kept for the next images of its job."""
    key = text, wildcards
    with _templates_guard:
        if key in _TEMPLATES:
            _TEMPLATES.move_to_end(key)
            return _TEMPLATES[key]
    node = parse(text, data.wildcard)
    with _templates_guard:
        _TEMPLATES[key] = node
        if len(_TEMPLATES) > _TEMPLATES_KEPT:
            _TEMPLATES.popitem(last=False)
    return node


_PLAIN: dict[str, Any] = {
    "axes": (), "zipped": (), "include": (), "exclude": (), "rows": None, "dynamic": "off", "variants": 1,
    "wildcards": (), "order": "sequential", "approve_after": None,
}  # fmt: skip
JOB_FIELDS = frozenset(_PLAIN) | {
    "embeddings", "model", "count", "lane", "seed", "on_missing", "without", "pack", "expander", "name", "dynamic_seed",
    "reuse", "priority", "expires_in", "max_runtime", "keep", "key", "tags", "metadata", "requires",
}  # fmt: skip
"""Fields that decide no pixels: they say which images there are and how they are handled."""


def replaced(text: str, subject: str, value: str) -> str:
    """Return a text with a value in place of another text.

    Raises:
        InvalidField: that would make it longer than a prompt may become.
    """
    if len(text) + text.count(subject) * len(value) > MAX_TEXT:
        raise InvalidField("prompt", f"{short(value)} in place of {short(subject)} makes it longer than {MAX_TEXT}")
    return text.replace(subject, value)


class Layout:
    """Where a job's images stand in the order they are handed out: a part for every checkpoint, ordered in itself."""

    def __init__(self, parts: Sequence[tuple[int, int]], orders: Sequence[Order]) -> None:
        self.parts, self._orders = tuple(parts), tuple(orders)

    @classmethod
    def of(cls, spec: JobSpec) -> Layout:
        """Return the layout of a job."""
        grid, inner = spec.grid, [spec.variants, spec.count]
        rows = spec.rows.total if spec.rows else 1
        if len(spec.models) == 1:
            shape = [rows, *([len(c) for c in grid.columns] if _is_full(grid) else [grid.total]), *inner]
            return cls([(0, spec.total)], [order_of(spec.order, shape, spec.seed_of_order)])
        parts = part_bounds(spec)
        later = [len(c) for c in grid.columns[1:]] if _is_full(grid) else []
        size = math.prod([*later, *inner])
        shapes = [[(stop - start) // size, *later, *inner] for start, stop in parts]
        return cls(parts, [order_of(spec.order, shape, spec.seed_of_order) for shape in shapes])

    def index_at(self, position: int) -> int:
        """Return which image is handed out at a position."""
        (start, _), order = self._part(position)
        return start + order.at(position - start)

    def position_of(self, index: int) -> int:
        """Return when an image is handed out."""
        (start, _), order = self._part(index)
        return start + order.of(index - start)

    def part_of(self, index: int) -> int:
        """Return which of the job's checkpoints an image is drawn with."""
        return next(number for number, (_, stop) in enumerate(self.parts) if index < stop)

    def _part(self, place: int) -> tuple[tuple[int, int], Order]:
        if len(self.parts) == 1:
            return self.parts[0], self._orders[0]
        number = self.part_of(place)
        return self.parts[number], self._orders[number]


def part_bounds(spec: JobSpec) -> list[tuple[int, int]]:
    """Return where the images of each of a job's models begin and end."""
    column, sums = spec.grid.columns[0], spec.grid.first_rows()
    bounds, start = [], 0
    for name in spec.models:
        last = max(row for row in range(len(column)) if str(column.at(row)["model"]) == name)
        stop = sums[last] * spec.variants * spec.count
        bounds.append((start, stop))
        start = stop
    return bounds


def _is_full(grid: Grid) -> bool:
    return not grid.exclude and not grid.include


def check_sweep(spec: JobSpec) -> None:
    """Make sure that a sweep's axes, points and order go together.

    Raises:
        ValueError: says which does not.
    """
    fields = [axis.field for axis in spec.swept]
    twice = next((field for field in fields if fields.count(field) > 1), None)
    if twice is not None:
        raise ValueError(f"axis {short(twice)} stands twice")
    if len({len(axis.items) for axis in spec.zipped}) > 1:
        lengths = ", ".join(f"{short(axis.field)} {len(axis.items)}" for axis in spec.zipped)
        raise ValueError(f"zipped axes should be of one length, but there are {lengths}")
    for axis in spec.swept:
        _check_axis(spec, axis)
    _check_points(spec, fields)
    if not 1 <= spec.total <= MAX_IMAGES:
        raise ValueError(f"the axes make {spec.total} images; 1 to {MAX_IMAGES} are possible")
    if spec.order == "corners-first" and not _is_full(spec.grid):
        raise ValueError("the order corners-first needs a full grid, without include and exclude")
    _check_models(spec)
    _check_dynamic(spec)
    _check_corners(spec)


def _check_axis(spec: JobSpec, axis: Axis) -> None:
    if axis.kind not in ("replace", "strength") and axis.field not in SWEPT:
        near = nearest(axis.field, SWEPT, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{short(axis.field)} is no axis; {hint}there are {', '.join(SWEPT)}, replace:TEXT, strength:NAME"
        )
    if axis.kind == "replace" and not spec.rows and not any(axis.subject in text for text in _texts(spec)):
        raise ValueError(f"{short(axis.subject)} stands in none of the prompts")
    for value in _ends(axis):
        if axis.kind == "strength" and (isinstance(value, str) or not -10 <= value <= 10):
            raise ValueError(f"{cut(axis.field)}: {short(value)} should be a number from -10 to 10")
        if not axis.kind:
            check_value(axis.field, value)
        elif isinstance(value, str):
            printable(value)


def _texts(spec: JobSpec) -> list[str]:
    """Return every text the prompts can be, before anything is replaced."""
    swept = [str(value) for axis in spec.swept if axis.field.endswith("prompt") for value in axis.items]
    more = [str(v) for point in spec.include for field, v in point.items() if field.endswith("prompt")]
    return [*swept, *more, *(text for _, text in spec.prompts)]


def _check_points(spec: JobSpec, fields: list[str]) -> None:
    for point in spec.exclude:
        strange = next((field for field in point if field not in fields), None)
        if strange is not None or not point:
            raise ValueError(
                f"exclude names {short(strange)}, which is no axis" if point else "an exclude names nothing"
            )
        for axis in spec.swept:
            if axis.field in point and point[axis.field] not in axis.items:
                raise ValueError(f"exclude: {cut(axis.field)} never is {short(point[axis.field])}")
    for point in spec.include:
        for field, value in point.items():
            if field in ("model", "rows") or (field not in SWEPT and field not in fields):
                raise ValueError(f"include cannot set {short(field)}; it can {', '.join(SWEPT[1:])}")
            if ":" not in field:
                check_value(field, value)
        _check_together(spec, {field: value for field, value in point.items() if ":" not in field})


def _check_models(spec: JobSpec) -> None:
    if spec.rows is not None and spec.embeddings:
        raise ValueError("embeddings go into the rows' own prompts; give them to the file, or write <NAME> there")
    if len(spec.models) > 1 and (spec.include or spec.rows):
        raise ValueError(
            "an axis of models goes with neither include nor rows; list the models in zip, or make two jobs"
        )
    if len(spec.models) > 1 and spec.zipped and "model" in [axis.field for axis in spec.zipped]:
        models = next(axis.items for axis in spec.zipped if axis.field == "model")
        if any(a != b and a in models[i + 2 :] for i, (a, b) in enumerate(pairwise(models))):
            raise ValueError("zipped models should stand together: all of one, then all of the next")
    if len(spec.models) > 1 and any(stop <= start for start, stop in part_bounds(spec)):
        raise ValueError("an exclude leaves nothing of one of the models; take that model out instead")


def _check_dynamic(spec: JobSpec) -> None:
    swept = spec.rows or any(axis.field.endswith("prompt") for axis in spec.swept)
    templates = [v for a in spec.swept if a.kind == "replace" for v in a.items if "{" in str(v) or "__" in str(v)]
    if spec.dynamic == "all" and templates:
        raise ValueError(
            f"dynamic 'all' takes no templates in replace axes, such as {short(templates[0])}; use 'random'"
        )
    if spec.dynamic == "all" and (swept or any("prompt" in field for p in spec.include for field in p)):
        raise ValueError(
            "dynamic 'all' needs prompts that neither axes nor rows change; use 'random', or a replace axis"
        )


def _ends(axis: Axis) -> Sequence[Value]:
    """Return the values among which the least and the greatest are."""
    return axis.values if isinstance(axis.values, tuple) else (axis.items[0], axis.items[-1])


def _check_corners(spec: JobSpec) -> None:
    """Make sure that the largest and the smallest values go together."""
    plain = [axis for axis in spec.swept if not axis.kind and not isinstance(axis.items[0], str)]
    for extreme in (min, max):
        _check_together(spec, {axis.field: extreme(_ends(axis), key=float) for axis in plain})


def _check_together(spec: JobSpec, point: Point) -> None:
    """Make sure that the values of a point make a job."""
    try:
        type(spec).model_validate(spec.model_dump() | _PLAIN | point)
    except ValidationError as error:
        where = ", ".join(f"{field} {short(value)}" for field, value in point.items())
        raise ValueError(f"at {where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


@cache
def _field_check(field: str) -> TypeAdapter[Any]:
    """Return what checks one field's value, without the rest of a job."""
    if field in ("sampler", "schedule"):
        resolve: Any = resolve_sampler if field == "sampler" else resolve_schedule
        return TypeAdapter(Annotated[str, AfterValidator(resolve)])
    info = JobSpec.model_fields[field]
    return TypeAdapter(Annotated[info.annotation, *info.metadata])  # type: ignore[arg-type]


def check_value(field: str, value: Value) -> None:
    """Check one value of an axis.

    Raises:
        ValueError: the field does not take it.
    """
    if isinstance(value, bool) and field not in ("tiling", "reuse"):
        raise ValueError(f"{field}: should be a number or a text, got {value}")
    if isinstance(value, str) and field.endswith("prompt"):
        printable(value)
    try:
        _field_check(field).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{field}: {error.errors()[0]['msg'].lower()}, got {short(value)}") from error


class ImageSpec(BaseModel):
    """Image `index` of a job: a pure function of (spec, index). `point` is where it lies on the job's axes, if it has any.

    `varies` says whether the job's images differ in more than their seeds.
    """

    model_config = ConfigDict(frozen=True)

    index: int
    seed: int
    variation_seed: int = 0
    job: JobSpec
    point: Point = {}
    varies: bool = False


def drawn_seeds(spec: JobSpec, draw: Callable[[int], int]) -> dict[str, Any]:
    """Return fields with seeds in place of those that are -1, in axes too; `draw` gives a number below its argument."""

    def settled(field: str, value: Value) -> Value:
        return draw(MAX_SEED - spec.count) if value == -1 and field in SEEDS else value

    fields: dict[str, Any] = {"seed": settled("seed", spec.seed)}
    if _may_vary(spec):
        fields["variation_seed"] = settled("variation_seed", spec.variation_seed)
    for name, axes in (("axes", spec.axes), ("zipped", spec.zipped)):
        if any(axis.field in SEEDS and -1 in axis.items for axis in axes):
            fields[name] = [
                axis.model_dump()
                | ({"values": [settled(axis.field, v) for v in axis.items]} if -1 in axis.items else {})
                for axis in axes
            ]
    fields["include"] = [{name: settled(name, value) for name, value in point.items()} for point in spec.include]
    if (spec.dynamic == "random" or spec.order == "random") and not spec.dynamic_seed:
        fields["dynamic_seed"] = draw(MAX_SEED)
    return fields


def _may_vary(spec: JobSpec) -> bool:
    """Tell whether any image mixes in the noise of a variation seed."""
    strengths = [value for axis in spec.swept if axis.field == "variation_strength" for value in axis.items]
    included = any("variation_strength" in point for point in spec.include)
    return bool(spec.variation_strength or any(strengths) or included or spec.rows)


def expand(spec: JobSpec, index: int, data: Data = NO_DATA) -> ImageSpec:
    """Return image `index` of a job whose seed is settled; `data` holds the rows and wildcards it was frozen to.

    Raises:
        IndexError: the job has no such image.
    """
    if not 0 <= index < spec.total:
        raise IndexError(index)
    if not spec.is_sweep:
        return _seeded(spec, index, index, {})
    _, _, variant, among = spec.place(index)
    values = spec.point_of(index, data)
    job = spec.at(values, _texts_of(spec, values, index, variant, data))
    return _seeded(job, index, among, values).model_copy(update={"varies": True})


def _texts_of(spec: JobSpec, values: Point, index: int, variant: int, data: Data) -> dict[str, str]:
    """Return what the templates of an image come to: drawn from its number, or the variant it is."""
    nodes = spec.templates(values, data)
    if spec.dynamic == "all":
        texts = {}
        for field, node in reversed(nodes.items()):
            variant, number = divmod(variant, node.count)
            texts[field] = node.at(number)
        return texts
    return {field: node.draw(random.Random(f"{spec.dynamic_seed} {index} {field}")) for field, node in nodes.items()}


def _seeded(job: JobSpec, index: int, among: int, point: Point) -> ImageSpec:
    """Return an image of a job without axes: with a variation all share the seed, else seeds count up, as in A1111."""
    if job.variation_strength:
        return ImageSpec(index=index, seed=job.seed, variation_seed=job.variation_seed + among, job=job, point=point)
    return ImageSpec(index=index, seed=job.seed + among, job=job, point=point)
