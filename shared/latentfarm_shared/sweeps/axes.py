"""The axes of a sweep: a field of the job, and the values it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Value = int | float | str


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
    values: Annotated[tuple[Value, ...], Field(min_length=1, max_length=10_000)] | Span

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
