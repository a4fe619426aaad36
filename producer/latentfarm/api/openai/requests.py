"""OpenAI's image requests as jobs; the farm's own parameters stand beside OpenAI's, as `extra_body` puts them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentfarm_shared.errors import InvalidField, UnknownName, nearest
from latentfarm_shared.parameters import short
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.specs import JobSpec
from pydantic import BaseModel, ConfigDict, Field

from latentfarm.farm import DirectFarm

NATIVE_SIZE = {"sd1": 512, "sd2": 768, "sdxl": 1024}
STEPS = {
    "low": 12, "medium": 20, "auto": 20, "standard": 20, "high": 40, "hd": 40, "xhigh": 60, "max": 60,
}  # fmt: skip
FORMATS = ("png", "webp", "jpeg")
ALIASES = ("gpt-image", "dall-e", "chatgpt-image")
"""Beginnings of OpenAI's own models, which clients have written into them: they mean the farm's default."""
OURS = {
    "negative_prompt": "negative_prompt", "seed": "seed", "steps": "steps", "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale", "cfg_scale": "cfg_scale", "sampler": "sampler", "sampler_name": "sampler",
    "scheduler": "schedule", "schedule": "schedule", "hires": "hires", "embeddings": "embeddings", "clip_skip": "clip_skip",
    "options": "options", "rng": "rng", "emphasis": "emphasis", "tiling": "tiling", "variation_seed": "variation_seed",
    "variation_strength": "variation_strength", "on_missing": "on_missing", "lane": "lane", "tags": "tags",
    "metadata": "metadata", "width": "width", "height": "height", "dynamic": "dynamic", "priority": "priority",
    "expires_in": "expires_in",
}  # fmt: skip
THEIRS = frozenset({
    "prompt", "model", "n", "size", "response_format", "output_format", "output_compression", "quality", "background", "style",
    "moderation", "partial_images", "stream", "user", "safety_identifier", "complexity", "frame_count", "frame_duration_ms",
})  # fmt: skip
_SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")


class ImagesRequest(BaseModel):
    """OpenAI's request; `seed`, `negative_prompt`, `steps`, `embeddings` … of the farm's jobs stand beside its fields."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field(max_length=32_000, examples=["masterpiece, corneo_dva"])
    model: str | None = Field(None, examples=["demo"])
    n: int | None = Field(None, ge=1, le=10)
    size: str | None = Field(None, examples=["512x512"])
    quality: str | None = None
    response_format: str | None = Field(None, description="b64_json, or url.")
    output_format: str | None = Field(None, description="png, webp or jpeg.")
    output_compression: int | None = Field(None, ge=0, le=100)
    background: str | None = None
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3)
    negative_prompt: str | None = None
    seed: int | None = None
    embeddings: list[str] | None = None


@dataclass(frozen=True)
class Wanted:
    """What a request asks for: a job, and how its pictures are handed over."""

    spec: JobSpec
    as_url: bool
    form: str
    compression: int
    quality: str
    stream: bool
    partial_images: int
    warnings: tuple[str, ...]

    @property
    def size(self) -> str:
        """The size as OpenAI writes it."""
        return f"{self.spec.width}x{self.spec.height}"


def wanted(body: Mapping[str, Any], farm: DirectFarm) -> Wanted:
    """Return what a request asks for.

    Raises:
        InvalidField, UnknownName: what the farm does not do, or does not have.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in THEIRS and name not in OURS:
            near = nearest(name, (*THEIRS, *OURS), 1)
            raise InvalidField(name, "is not supported" + (f"; did you mean {near[0]}?" if near else ""))
    checkpoint, warnings = _checkpoint(given.get("model"), farm)
    quality = _choice(given, "quality", tuple(STEPS), "auto")
    if _choice(given, "background", ("opaque", "auto", "transparent"), "auto") == "transparent":
        raise InvalidField("background", "cannot be transparent here; leave it out")
    if given.get("frame_count", 1) != 1:
        raise InvalidField("frame_count", "should be 1: the farm draws single pictures")
    values: dict[str, Any] = {OURS[name]: value for name, value in given.items() if name in OURS}
    values |= {"prompt": given.get("prompt"), "model": checkpoint.name, "count": _whole(given, "n", 1, 10, 1)}
    values = {"lane": "interactive", "steps": STEPS[quality]} | _size(given.get("size"), checkpoint) | values
    if values["prompt"] is None:
        raise InvalidField("prompt", "is missing")
    return Wanted(
        JobSpec.check(values),
        _choice(given, "response_format", ("b64_json", "url"), "b64_json") == "url",
        _choice(given, "output_format", FORMATS, "png"),
        _whole(given, "output_compression", 0, 100, 100),
        quality,
        bool(given.get("stream", False)),
        _whole(given, "partial_images", 0, 3, 0),
        warnings,
    )


def _choice(given: Mapping[str, Any], name: str, choices: tuple[str, ...], default: str) -> str:
    value = given.get(name, default)
    if value not in choices:
        raise InvalidField(name, f"should be one of {', '.join(choices)}, got {short(value)}")
    return str(value)


def _whole(given: Mapping[str, Any], name: str, least: int, most: int, default: int) -> int:
    value = given.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InvalidField(name, f"should be {least} to {most}, got {short(value)}")
    return value


def _size(size: Any, checkpoint: CheckpointRecord) -> dict[str, int]:
    """Return width and height; those its family was trained at if nothing is said."""
    if size in (None, "auto"):
        edge = NATIVE_SIZE.get(checkpoint.family)
        return {} if edge is None else {"width": edge, "height": edge}
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise InvalidField("size", f"should be WIDTHxHEIGHT or auto, got {short(size)}")
    return {"width": int(found[1]), "height": int(found[2])}


def _checkpoint(model: Any, farm: DirectFarm) -> tuple[CheckpointRecord, tuple[str, ...]]:
    """Return the checkpoint a request means, and what should be said of that.

    Raises:
        UnknownName: there is none of this name.
    """
    known = {record.name: record for record in farm.models.ls()}
    if not known:
        raise UnknownName("model", str(model or "default"))
    default = next(iter(known.values()))
    if model in (None, ""):
        return default, ()
    if not isinstance(model, str):
        raise InvalidField("model", f"should be a text, got {short(model)}")
    if model in known:
        return known[model], ()
    if model.startswith(ALIASES):
        return default, (f"there is no {model} here; drawn with {default.name}",)
    raise UnknownName.among("model", str(model), known)
