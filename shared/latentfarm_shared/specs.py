"""A job's spec: one frozen value with one encode and one decode, from which every image follows."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentfarm_shared.errors import InvalidField, UnknownName, nearest
from latentfarm_shared.names import resolve_sampler, resolve_schedule

MAX_SEED = 2**32 - 1
MAX_SPEC_BYTES = 64 * 1024

Lane = Literal["interactive", "batch"]
Side = Literal["positive", "negative"]
Edge = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]


class EmbeddingUse(BaseModel):
    """An embedding asked for by name, and the prompt it belongs in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    side: Side = "positive"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NAME`, `NAME:neg` or `NAME:pos`."""
        name, colon, side = text.rpartition(":")
        sides: dict[str, Side] = {"neg": "negative", "negative": "negative", "pos": "positive", "positive": "positive"}
        if not colon:
            name, side = text, "pos"
        if side not in sides or not 1 <= len(name.strip()) <= 200:
            raise InvalidField("embeddings", f"{_short(text)} should be NAME, NAME:pos or NAME:neg")
        return cls(name=name.strip(), side=sides[side])


class JobSpec(BaseModel):
    """What a user asked for. `seed` is that of the first image; image `i` has `seed + i`, as in A1111."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    expander: Literal[1] = 1
    prompt: str = Field("", max_length=20_000)
    negative_prompt: str = Field("", max_length=20_000)
    embeddings: tuple[EmbeddingUse, ...] = ()
    model: str = Field("demo", min_length=1, max_length=200)
    sampler: str = "Euler"
    schedule: str = "Automatic"
    steps: int = Field(20, ge=1, le=150)
    cfg_scale: float = Field(7.0, ge=1, le=30, allow_inf_nan=False)
    seed: int = Field(-1, ge=-1, le=MAX_SEED)
    width: Edge = 128
    height: Edge = 128
    clip_skip: int = Field(1, ge=1, le=12)
    count: int = Field(1, ge=1, le=1_000_000)
    lane: Lane = "interactive"

    @model_validator(mode="before")
    @classmethod
    def _split_legacy_sampler(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("sampler"), str):
            return values
        sampler, schedule = resolve_sampler(values["sampler"])
        if schedule and values.get("schedule", "Automatic") == "Automatic":
            values = values | {"schedule": schedule}
        return values | {"sampler": sampler}

    @field_validator("schedule")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        return resolve_schedule(value)

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _printable(cls, value: str) -> str:
        if "\0" in value:
            raise ValueError("must not hold a null character")
        return value

    @model_validator(mode="after")
    def _last_seed_fits(self) -> Self:
        if self.seed + self.count - 1 > MAX_SEED:
            raise ValueError(f"seed + count must stay below {MAX_SEED + 1}")
        return self

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
            raise InvalidField(field, f"{message}, got {_short(first['input'])}", line) from error
        if len(spec.encode().encode()) > MAX_SPEC_BYTES:
            raise InvalidField("prompt", f"the job is larger than {MAX_SPEC_BYTES} bytes", line)
        return spec

    def encode(self) -> str:
        """Return the one wire form."""
        return self.model_dump_json()

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """Read the wire form back."""
        return cls.model_validate_json(text)


class ImageSpec(BaseModel):
    """Image `index` of a job: a pure function of (spec, index)."""

    model_config = ConfigDict(frozen=True)

    index: int
    seed: int
    job: JobSpec


def expand(spec: JobSpec, index: int) -> ImageSpec:
    """Return image `index` of a job whose seed is settled.

    Raises:
        IndexError: the job has no such image.
    """
    if not 0 <= index < spec.count:
        raise IndexError(index)
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
