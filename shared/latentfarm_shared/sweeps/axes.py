"""The axes of a sweep: a field of the job, and the values it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Value = int | float | str


MOST_VALUES = 10_000


class Span(BaseModel):
    """Whole numbers from `first` to `last`, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int = Field(ge=0, le=2**32 - 1)
    last: int = Field(ge=0, le=2**32 - 1)
    step: int = Field(1, ge=1, le=2**32 - 1)

    @model_validator(mode="after")
    def _counts_up(self) -> Span:
        if self.first > self.last:
            raise ValueError(f"{self.first}..{self.last} should count up")
        return self


class Axis(BaseModel):
    """One axis of a sweep: `field` takes each of `values` in turn.

    `field` is a field of the job (one of SWEPT), `replace:TEXT`, which puts the values in place of a text in the prompts
    (A1111's Prompt S/R), or `strength:NAME`, which weighs an embedding as `(NAME:value)` does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(min_length=1, max_length=300)
    values: Annotated[tuple[Value, ...], Field(min_length=1, max_length=10_000, fail_fast=True)] | Span

    @model_validator(mode="before")
    @classmethod
    def _values_are_numbers_or_texts(cls, given: Any) -> Any:
        """Look at the values before they are read, so that of many wrong ones the first is told."""
        values = given.get("values") if isinstance(given, dict) else None
        if isinstance(values, list | tuple):
            if len(values) > MOST_VALUES:
                raise ValueError(f"has {len(values)} values; {MOST_VALUES} are possible, or a span such as 1..100000")
            wrong = next((v for v in values if isinstance(v, bool) or not isinstance(v, int | float | str)), None)
            if wrong is not None or None in values:
                raise ValueError(f"values should be numbers or texts, got {type(wrong).__name__}")
        return given

    @field_validator("field")
    @classmethod
    def _has_a_subject(cls, value: str) -> str:
        if not value.isprintable() or (":" in value and not value.partition(":")[2].strip()):
            raise ValueError("should be a field, or replace:TEXT or strength:NAME with something behind the colon")
        return value

    @property
    def items(self) -> Sequence[Value]:
        """The values, of a span too."""
        if isinstance(self.values, Span):
            return range(self.values.first, self.values.last + 1, self.values.step)
        return self.values

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


Point = dict[str, Value]
