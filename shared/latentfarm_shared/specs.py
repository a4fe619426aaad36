"""A job's spec: one frozen value with one encode and one decode, from which every image follows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal, Self

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

from latentfarm_shared.errors import InvalidField, UnknownName, nearest
from latentfarm_shared.explicit import bare, removed, weighed
from latentfarm_shared.names import (
    LATENT_UPSCALERS,
    PLAIN_UPSCALERS,
    EmphasisMode,
    resolve_sampler,
    resolve_schedule,
)

MAX_SEED = 2**32 - 1
MAX_SPEC_BYTES = 64 * 1024
MAX_IMAGES = 1_000_000
SETTLED = {"settled": True}  # a spec that was checked when it was submitted

Lane = Literal["interactive", "batch"]
Side = Literal["positive", "negative"]
MAX_EDGE = 4096
Edge = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]
ResizeEdge = Annotated[int, Field(ge=8, le=2048)]


class EmbeddingUse(BaseModel):
    """An embedding asked for by name, and the prompt it belongs in; None leaves that to its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    side: Side | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NAME`, `NAME:neg` or `NAME:pos`; NAME may be `NAME@version`."""
        name, colon, side = text.rpartition(":")
        sides: dict[str, Side | None] = {
            "neg": "negative", "negative": "negative", "pos": "positive", "positive": "positive", "": None,
        }  # fmt: skip
        if not colon:
            name, side = text, ""
        if (colon and not side) or side not in sides or not 1 <= len(name.strip()) <= 200:
            raise InvalidField("embeddings", f"{_short(text)} should be NAME, NAME:pos or NAME:neg")
        return cls(name=name.strip(), side=sides[side])


Compat = Literal["old_prompt_timelines", "break_as_word", "leave_vectors_behind", "ignore_extra_networks"]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=0, le=1e5, allow_inf_nan=False)]


class SamplingOptions(BaseModel):
    """A1111's settings of samplers, schedules and guidance; the defaults are A1111's, 0 leaves a bound open.

    `eta` is None for a sampler's own default. Names of the A1111 settings are in docs/parameters.md.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    eta: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    s_churn: Level = 0.0
    s_tmin: Level = 0.0
    s_tmax: Level = 0.0
    s_noise: float = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    sigma_min: Level = 0.0
    sigma_max: Level = 0.0
    rho: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    beta_alpha: float = Field(0.6, gt=0, le=10, allow_inf_nan=False)
    beta_beta: float = Field(0.6, gt=0, le=10, allow_inf_nan=False)
    discard_penultimate: bool = False
    old_karras_range: bool = False
    sgm_noise_multiplier: bool = False
    round_timesteps: bool = False
    zero_terminal_snr: bool = False
    downcast_alphas: bool = False
    uni_pc_variant: Literal["bh1", "bh2"] = "bh1"
    uni_pc_skip_type: Literal["time_uniform", "time_quadratic", "logSNR"] = "time_uniform"
    uni_pc_order: int = Field(3, ge=1, le=10)
    uni_pc_lower_order_final: bool = True
    ngms: Level = 0.0
    ngms_all_steps: bool = False
    skip_early_cfg: Fraction = 0.0
    pad_conds: Literal["no", "empty", "v0"] = "no"
    cfg_rescale: Fraction = 0.0

    @model_validator(mode="after")
    def _range_descends(self) -> Self:
        if self.sigma_min and self.sigma_max and self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min should be below sigma_max")
        return self


class HiresFix(BaseModel):
    """A second pass at a larger size, as A1111's hires fix.

    The size is `scale` times the first, or `width` x `height` where given (one of them keeps the proportions). `steps` 0
    means as many as the first pass; sampler, schedule and prompts are the first pass's unless given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = Field(2.0, ge=1, le=8, allow_inf_nan=False)
    width: int = Field(0, ge=0, le=4096, multiple_of=8)
    height: int = Field(0, ge=0, le=4096, multiple_of=8)
    upscaler: str = Field("Latent", min_length=1, max_length=200)
    steps: int = Field(0, ge=0, le=150)
    denoising_strength: Fraction = 0.7
    sampler: str | None = None
    schedule: str | None = None
    prompt: str = Field("", max_length=20_000)
    negative_prompt: str = Field("", max_length=20_000)

    @model_validator(mode="before")
    @classmethod
    def _split_legacy_sampler(cls, values: Any) -> Any:
        return _split_sampler(values, None)

    @field_validator("denoising_strength")
    @classmethod
    def _not_too_little(cls, value: float) -> float:
        """Refuse a strength whose schedule would be endless: a pass of n steps walks the end of n / strength."""
        if 0 < value < 0.01:
            raise ValueError("should be 0, or 0.01 to 1")
        return value

    @field_validator("width", "height")
    @classmethod
    def _large_enough(cls, value: int) -> int:
        if 0 < value < 64:
            raise ValueError("should be 0, or 64 at least")
        return value

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, value: str | None) -> str | None:
        return None if value is None else resolve_schedule(value)

    @field_validator("upscaler")
    @classmethod
    def _known_upscaler(cls, value: str) -> str:
        known = {name.lower(): name for name in (*LATENT_UPSCALERS, *PLAIN_UPSCALERS)}
        return known.get(value.strip().lower(), value.strip())

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _printable(cls, value: str) -> str:
        return _printable(value)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return the size in pixels that the first pass is enlarged to cover, before anything is cropped."""
        if not (self.width or self.height):
            return int(width * self.scale), int(height * self.scale)
        if not self.height or (self.width and self.width * height >= self.height * width):
            return self.width, self.width * height // width
        return self.height * width // height, self.height

    def crop(self, width: int, height: int) -> tuple[int, int]:
        """Return by how many latent columns and rows the enlarged first pass exceeds the size asked for."""
        if not (self.width and self.height):
            return 0, 0
        wide, high = self.target(width, height)
        return (wide - self.width) // 8, (high - self.height) // 8


def _split_sampler(values: Any, default_schedule: str | None) -> Any:
    """Resolve a sampler's name; a legacy suffix (`DPM++ 2M Karras`) becomes the schedule unless one is given."""
    if not isinstance(values, dict) or not isinstance(values.get("sampler"), str):
        return values
    sampler, schedule = resolve_sampler(values["sampler"])
    if schedule and values.get("schedule", default_schedule) in (None, "Automatic"):
        values = values | {"schedule": schedule}
    return values | {"sampler": sampler}


def _printable(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not hold a null character")
    return value


Value = int | float | str


class Axis(BaseModel):
    """One axis of a sweep: `field` takes each of `values` in turn.

    `field` is a field of the job (one of SWEPT), `replace:TEXT`, which puts the values in place of a text in the prompts
    (A1111's Prompt S/R), or `strength:NAME`, which weighs an embedding as `(NAME:value)` does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(min_length=1, max_length=300)
    values: tuple[Value, ...] = Field(min_length=1, max_length=10_000)

    @property
    def is_text(self) -> bool:
        """Whether it changes what the prompts say."""
        return self.field in ("prompt", "negative_prompt") or self.kind in ("replace", "strength")

    @property
    def kind(self) -> str:
        """What stands before the colon, if anything."""
        return self.field.partition(":")[0] if ":" in self.field else ""

    @property
    def subject(self) -> str:
        """What stands behind the colon: a text or a name."""
        return self.field.partition(":")[2]


SWEPT = (
    "prompt", "negative_prompt", "sampler", "schedule", "steps", "cfg_scale", "seed", "clip_skip", "width",
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

    expander: Literal[1] = 1
    prompt: str = Field("", max_length=20_000)
    negative_prompt: str = Field("", max_length=20_000)
    embeddings: tuple[EmbeddingUse, ...] = ()
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
    axes: tuple[Axis, ...] = Field((), max_length=8)
    without: tuple[str, ...] = ()
    pack: Pack | None = None

    @property
    def total(self) -> int:
        """How many images the job has: `count` at every point of its axes."""
        return self.count * math.prod(len(axis.values) for axis in self.axes)

    @property
    def text_variants(self) -> int:
        """How many different prompts the axes make."""
        return math.prod(len(axis.values) for axis in self.axes if axis.is_text)

    def point(self, number: int) -> dict[str, Value]:
        """Return the values of every axis at a point, the last axis counting fastest."""
        values: dict[str, Value] = {}
        for axis in reversed(self.axes):
            number, place = divmod(number, len(axis.values))
            values[axis.field] = axis.values[place]
        return {axis.field: values[axis.field] for axis in self.axes}

    def requested_at(self, values: dict[str, Value]) -> Self:
        """Return the job of one point as it was asked for: its values and replaced texts, explicit requests as they are."""
        if not self.axes:
            return self
        plain = {field: value for field, value in values.items() if ":" not in field}
        job = self.model_validate(self.model_dump() | {"axes": ()} | plain)
        for axis in self.axes:
            if axis.kind == "replace" and axis.field in values:
                value = str(values[axis.field])
                job = job.with_prompts({field: text.replace(axis.subject, value) for field, text in job.prompts})
        return job

    def at(self, values: dict[str, Value]) -> Self:
        """Return the job of one point as it is drawn: bare names in place of requests, weighed as its axes say."""
        job = self.requested_at(values).drawn()
        for axis in self.axes:
            if axis.kind == "strength" and axis.field in values:
                weight = float(values[axis.field])
                job = job.with_prompts({field: weighed(text, axis.subject, weight) for field, text in job.prompts})
        return job

    def drawn(self) -> Self:
        """Return the job with bare names in place of explicit requests, and without the words it does without."""
        requests = {word[1:-1].lower() for word in self.without if word.startswith("<")}
        words = [word for word in self.without if not word.startswith("<")]
        texts = {field: removed(bare(text, requests), words) for field, text in self.prompts}
        return self.with_prompts(texts).model_copy(update={"without": ()})

    @model_validator(mode="before")
    @classmethod
    def _split_legacy_sampler(cls, values: Any) -> Any:
        return _split_sampler(values, "Automatic")

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        return resolve_schedule(value)

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _printable(cls, value: str) -> str:
        return _printable(value)

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
    def _axes_make_jobs(self, info: ValidationInfo) -> Self:
        if not self.axes or info.context == SETTLED:
            return self
        fields = [axis.field for axis in self.axes]
        if len(set(fields)) < len(fields):
            raise ValueError("an axis stands twice")
        if not 1 <= self.total <= MAX_IMAGES:
            raise ValueError(f"the axes make {self.total} images; {MAX_IMAGES} are possible")
        for axis in self.axes:
            self._check_axis(axis)
        self._check_corners()
        return self

    def _check_axis(self, axis: Axis) -> None:
        if axis.kind not in ("replace", "strength") and axis.field not in SWEPT:
            raise ValueError(f"{axis.field!r} is no axis; there are {', '.join(SWEPT)}, replace:TEXT, strength:NAME")
        if axis.kind == "replace" and not any(axis.subject in text for text in self._texts()):
            raise ValueError(f"{axis.subject!r} stands in none of the prompts")
        for value in axis.values:
            if axis.kind == "strength" and (isinstance(value, str) or not -10 <= value <= 10):
                raise ValueError(f"{axis.field}: {value!r} should be a number from -10 to 10")
            if not axis.kind:
                _check_field(axis.field, value)

    def _texts(self) -> list[str]:
        """Return every text the prompts can be, before anything is replaced."""
        swept = [str(value) for axis in self.axes if axis.field.endswith("prompt") for value in axis.values]
        return [*swept, *(text for _, text in self.prompts)]

    def _check_corners(self) -> None:
        """Make sure that the largest and the smallest values go together."""
        plain = [axis for axis in self.axes if not axis.kind and not isinstance(axis.values[0], str)]
        for extreme in (min, max):
            corner = {axis.field: extreme(axis.values, key=float) for axis in plain}
            try:
                type(self).model_validate(self.model_dump() | {"axes": ()} | corner)
            except ValidationError as error:
                where = ", ".join(f"{field} {value}" for field, value in corner.items())
                raise ValueError(f"at {where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error

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
            near = nearest(unknown, cls.model_fields)
            raise InvalidField(unknown, "is not a field" + (f"; did you mean {near[0]}?" if near else ""), line)
        try:
            spec = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "spec"
            message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
            given = f", got {_short(first['input'])}" if first["loc"] else ""
            raise InvalidField(field, message + given, line) from error
        if len(spec.encode().encode()) > MAX_SPEC_BYTES:
            raise InvalidField("prompt", f"the job is larger than {MAX_SPEC_BYTES} bytes", line)
        return spec

    def encode(self) -> str:
        """Return the one wire form."""
        return self.model_dump_json()

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """Read the wire form back."""
        return cls.model_validate_json(text, context=SETTLED)


@cache
def _field_check(field: str) -> TypeAdapter[Any]:
    """Return what checks one field's value, without the rest of a job."""
    if field in ("sampler", "schedule"):
        resolve: Any = resolve_sampler if field == "sampler" else resolve_schedule
        return TypeAdapter(Annotated[str, AfterValidator(resolve)])
    info = JobSpec.model_fields[field]
    return TypeAdapter(Annotated[info.annotation, *info.metadata])  # type: ignore[arg-type]


def _check_field(field: str, value: Value) -> None:
    """Check one value of an axis.

    Raises:
        ValueError: the field does not take it.
    """
    try:
        _field_check(field).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{field}: {error.errors()[0]['msg'].lower()}, got {_short(value)}") from error


class ImageSpec(BaseModel):
    """Image `index` of a job: a pure function of (spec, index). `point` is where it lies on the job's axes, if it has any."""

    model_config = ConfigDict(frozen=True)

    index: int
    seed: int
    variation_seed: int = 0
    job: JobSpec
    point: dict[str, Value] = {}


def drawn_seeds(spec: JobSpec, draw: Callable[[int], int]) -> dict[str, Any]:
    """Return fields with seeds in place of those that are -1, in axes too; `draw` gives a number below its argument."""

    def settled(seed: Value) -> Value:
        return draw(MAX_SEED - spec.count) if seed == -1 else seed

    swept = {axis.field: axis.values for axis in spec.axes}
    varies = spec.variation_strength or any(swept.get("variation_strength", ()))
    fields: dict[str, Any] = {"seed": settled(spec.seed)}
    if varies:
        fields["variation_seed"] = settled(spec.variation_seed)
    if {"seed", "variation_seed"} & swept.keys():
        fields["axes"] = [
            axis.model_dump()
            | {"values": [settled(v) for v in axis.values] if axis.field.endswith("seed") else axis.values}
            for axis in spec.axes
        ]
    return fields


def expand(spec: JobSpec, index: int) -> ImageSpec:
    """Return image `index` of a job whose seed is settled.

    Raises:
        IndexError: the job has no such image.
    """
    if not 0 <= index < spec.total:
        raise IndexError(index)
    number, index_of_seed = divmod(index, spec.count)
    if spec.axes:
        point = spec.point(number)
        return expand(spec.at(point), index_of_seed).model_copy(update={"index": index, "point": point})
    if spec.variation_strength:
        return ImageSpec(index=index, seed=spec.seed, variation_seed=spec.variation_seed + index, job=spec)
    return ImageSpec(index=index, seed=spec.seed + index, job=spec)


def read_jsonl(text: str) -> list[JobSpec]:
    """Read one job a line; the whole text is checked before anything is returned.

    Blank lines and lines that start with `#` are passed over. Embeddings may be written `"NAME:neg"`.

    Raises:
        InvalidField, UnknownName: with the line.
    """
    specs = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            specs.append(_read_row(line, number))
    if not specs:
        raise InvalidField("file", "holds no job")
    return specs


def _read_row(line: str, number: int) -> JobSpec:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidField("JSON", f"column {error.colno}: {error.msg.lower()}", number) from error
    except (ValueError, RecursionError) as error:
        raise InvalidField("JSON", "holds a number too large or is nested too deep", number) from error
    if not isinstance(row, dict):
        raise InvalidField("JSON", 'should be an object such as {"prompt": "…"}', number)
    try:
        if isinstance(row.get("embeddings"), list):
            row["embeddings"] = [EmbeddingUse.parse(e) if isinstance(e, str) else e for e in row["embeddings"]]
        return JobSpec.check(row, number)
    except UnknownName as error:
        raise InvalidField(error.kind, str(error), number) from error
    except InvalidField as error:
        raise InvalidField(error.field, error.reason, number) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
