"""The parameters of a picture: embeddings asked for, sampler settings, hires fix."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from latentfarm_shared.errors import InvalidField
from latentfarm_shared.names import LATENT_UPSCALERS, PLAIN_UPSCALERS, resolve_sampler, resolve_schedule

Side = Literal["positive", "negative"]


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
            raise InvalidField("embeddings", f"{short(text)} should be NAME, NAME:pos or NAME:neg")
        return cls(name=name.strip(), side=sides[side])


Compat = Literal["old_prompt_timelines", "break_as_word", "leave_vectors_behind", "ignore_extra_networks"]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=0, le=1e5, allow_inf_nan=False)]


TRUTHS = frozenset(
    {
        "discard_penultimate", "old_karras_range", "sgm_noise_multiplier", "round_timesteps", "zero_terminal_snr",
        "downcast_alphas", "uni_pc_lower_order_final", "ngms_all_steps",
    }
)  # fmt: skip


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

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        return refuse_truth(values, TRUTHS)

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
        return split_sampler(refuse_truth(values), None)

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
        return printable(value)

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


def split_sampler(values: Any, default_schedule: str | None) -> Any:
    """Resolve a sampler's name; a legacy suffix (`DPM++ 2M Karras`) becomes the schedule unless one is given."""
    if not isinstance(values, dict) or not isinstance(values.get("sampler"), str):
        return values
    sampler, schedule = resolve_sampler(values["sampler"])
    if schedule and values.get("schedule", default_schedule) in (None, "Automatic"):
        values = values | {"schedule": schedule}
    return values | {"sampler": sampler}


def printable(value: str) -> str:
    """Refuse null characters and halves of characters, which no text needs.

    Raises:
        ValueError: there is one.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must not hold half a character (a lone surrogate)") from None
    if "\0" in value:
        raise ValueError("must not hold a null character")
    return value


def short(value: object) -> str:
    """Return a value as errors quote it, cut to 60 characters."""
    if isinstance(value, str | bytes):
        value = value[:60]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number or a nesting beyond what Python writes out
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"


def refuse_truth(values: Any, but: Collection[str] = ()) -> Any:
    """Refuse true and false where a number or a text belongs; fields named in `but` take them.

    Raises:
        ValueError: names the field.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(value, bool) and name not in but:
                raise ValueError(f"{name}: should be a number or a text, got {value}")
    return values
