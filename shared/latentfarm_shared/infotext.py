"""The `parameters` text of a picture: written with A1111's keys, order and quoting, and read back.

Order and keys are those of A1111 v1.10.1; keys for options it does not write down come last.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentfarm_shared import __version__
from latentfarm_shared.errors import InvalidField
from latentfarm_shared.names import TRAITS, effective_schedule
from latentfarm_shared.parameters import HiresFix, SamplingOptions
from latentfarm_shared.png import png_texts
from latentfarm_shared.records import EmbeddingRecord, Lock
from latentfarm_shared.specs import ImageSpec, JobSpec

KEYWORD = "parameters"
_PAIR = re.compile(r'\s*(\w[\w \-/]{1,60}):\s*(\{[^{}]*\}|"(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_SIZE_KEYS = ("Size", "Hires resize", "Seed resize from", "First pass size")
MAX_CHARACTERS = 200_000
_NEGATIVE = "Negative prompt:"
_OPTION_KEYS = {
    "Sigma churn": "s_churn",
    "Sigma tmin": "s_tmin",
    "Sigma tmax": "s_tmax",
    "Sigma noise": "s_noise",
    "Discard penultimate sigma": "discard_penultimate",
    "Schedule min sigma": "sigma_min",
    "Schedule max sigma": "sigma_max",
    "Schedule rho": "rho",
    "Beta schedule alpha": "beta_alpha",
    "Beta schedule beta": "beta_beta",
    "SGM noise multiplier": "sgm_noise_multiplier",
    "NGMS": "ngms",
    "NGMS all steps": "ngms_all_steps",
    "Skip Early CFG": "skip_early_cfg",
    "Downcast alphas_cumprod": "downcast_alphas",
    "UniPC variant": "uni_pc_variant",
    "UniPC skip type": "uni_pc_skip_type",
    "UniPC order": "uni_pc_order",
    "UniPC lower order final": "uni_pc_lower_order_final",
    "Old Karras range": "old_karras_range",
    "Round timesteps": "round_timesteps",
    "CFG rescale": "cfg_rescale",
}
_COMPAT_KEYS = {
    "Old prompt editing timelines": "old_prompt_timelines",
    "BREAK as word": "break_as_word",
    "Vectors left behind": "leave_vectors_behind",
    "Extra networks ignored": "ignore_extra_networks",
}


# ---- writing


def quote(value: object) -> str:
    """Return a value as A1111 writes it: a JSON string if it holds a comma, colon or line break.

    One that could not be read back as it is, for quotes or spaces at its ends, is made one too.
    """
    text = str(value)
    unsafe = text != text.strip() or (text[:1] == '"' and text != unquote(text))
    return json.dumps(text, ensure_ascii=False) if unsafe or any(c in text for c in ",:\n") else text


def format_infotext(image: ImageSpec, lock: Lock, used: Sequence[EmbeddingRecord] | None = None) -> str:
    """Describe an image so that A1111 and its readers understand it; every embedding stands once in `TI hashes`.

    `used` are the embeddings of the image's own prompts, by default all that its job has; images of sweeps differ.
    """
    job = image.job
    hashed = lock.embeddings if used is None else used
    fields = (
        _fixed_fields(image, lock) | _hires_fields(job) | _embedding_fields(job, lock, hashed) | _option_fields(job)
    )
    fields |= _exact_prompts(job) | {"Version": f"latentfarm {__version__}"}
    line = ", ".join(f"{key}: {quote(value)}" for key, value in fields.items() if value is not None)
    return _text(job, line)


def _text(job: JobSpec, line: str) -> str:
    negative = f"\n{_NEGATIVE} {job.negative_prompt}" if job.negative_prompt else ""
    return f"{job.prompt}{negative}\n{line}".strip()


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _fixed_fields(image: ImageSpec, lock: Lock) -> dict[str, Any]:
    job = image.job
    varied = job.variation_strength > 0
    return {
        "Steps": job.steps,
        "Sampler": job.sampler,
        "Schedule type": _schedule(job.sampler, job.schedule),
        "CFG scale": _number(job.cfg_scale),
        "Seed": image.seed,
        "Size": f"{job.width}x{job.height}",
        "Model hash": lock.checkpoint.weights_hash[:10],
        "Model": lock.checkpoint.name,
        "Variation seed": image.variation_seed if varied else None,
        "Variation seed strength": _number(job.variation_strength) if varied else None,
        "Seed resize from": f"{job.seed_resize[0]}x{job.seed_resize[1]}" if job.seed_resize else None,
        "Denoising strength": _number(job.hires.denoising_strength) if job.hires else None,
        "Clip skip": job.clip_skip if job.clip_skip > 1 else None,
        "ENSD": job.ensd or None,
        "RNG": job.rng,
        "Tiling": True if job.tiling else None,
    }


def _schedule(sampler: str, schedule: str) -> str:
    """Return the schedule as A1111 writes it: what Automatic stands for, unless that is the model's own."""
    effective = effective_schedule(sampler, schedule)
    return schedule if effective == "Uniform" else effective


def _hires_fields(job: JobSpec) -> dict[str, Any]:
    hires = job.hires
    if hires is None:
        return {}
    sampler = hires.sampler or job.sampler
    schedule = _schedule(sampler, hires.schedule or job.schedule)
    resized = bool(hires.width or hires.height)
    return {
        "Hires sampler": sampler if sampler != job.sampler else None,
        "Hires prompt": hires.prompt or None,
        "Hires negative prompt": hires.negative_prompt or None,
        "Hires schedule type": schedule if schedule != _schedule(job.sampler, job.schedule) else None,
        "Hires upscale": None if resized else _number(hires.scale),
        "Hires resize": f"{hires.width}x{hires.height}" if resized else None,
        "Hires steps": hires.steps or None,
        "Hires upscaler": hires.upscaler,
    }


def _embedding_fields(job: JobSpec, lock: Lock, used: Sequence[EmbeddingRecord]) -> dict[str, Any]:
    names = (f"{e.name.replace(':', '').replace(',', '')}: {e.ti_hash}" for e in used)
    dropped = (item.name.replace(",", "") for item in lock.dropped)
    texts = "".join(text for _, text in job.prompts)
    weighed = any(c in texts for c in "([") or "BREAK" in texts
    return {
        "TI hashes": ", ".join(names) or None,
        "Dropped embeddings": ", ".join(dropped) or None,
        "Emphasis": job.emphasis if job.emphasis != "Original" and weighed else None,
    }


def _option_fields(job: JobSpec) -> dict[str, Any]:
    """Return every option that is not at its default, by its key."""
    options, defaults = job.options, SamplingOptions()
    fields: dict[str, Any] = {}
    if options.eta is not None:
        fields["Eta DDIM" if TRAITS[job.sampler].eta == 0 else "Eta"] = options.eta
    for key, name in _OPTION_KEYS.items():
        value = getattr(options, name)
        if value != getattr(defaults, name):
            fields[key] = value
    if options.pad_conds != "no":
        fields["Pad conds v0" if options.pad_conds == "v0" else "Pad conds"] = True
    if options.zero_terminal_snr:
        fields["Noise Schedule"] = "Zero Terminal SNR"
    return fields | {key: True for key, name in _COMPAT_KEYS.items() if name in job.compat}


def _exact_prompts(job: JobSpec) -> dict[str, Any]:
    """Return the prompts once more, as fields, where A1111's layout could not be read back."""
    read = read_infotext(_text(job, "Steps: 1, Sampler: Euler, Seed: 1"))
    if (read.prompt, read.negative_prompt) == (job.prompt, job.negative_prompt):
        return {}
    return {"Exact prompt": job.prompt + ":", "Exact negative prompt": job.negative_prompt + ":"}


# ---- reading


def unquote(text: str) -> str:
    """Undo `quote`."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


@dataclass(frozen=True)
class Infotext:
    """What a picture's text says: both prompts, and the fields by A1111's keys."""

    prompt: str
    negative_prompt: str
    fields: dict[str, str]


def read_infotext(text: str) -> Infotext:
    """Read what A1111 or we wrote.

    The last line holds the fields if it has three at least; sizes are split into `KEY-1` and `KEY-2`, as A1111 does.

    Raises:
        InvalidField: the text is longer than any A1111 writes.
    """
    if len(text) > MAX_CHARACTERS:
        raise InvalidField("parameters", f"are {len(text)} characters long; {MAX_CHARACTERS} are read at most")
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < 3:
        lines, pairs = [*lines, last], []
    fields: dict[str, str] = {}
    for key, value in pairs:
        size = _SIZE.fullmatch(value) if key in _SIZE_KEYS else None
        fields |= {f"{key}-1": size[1], f"{key}-2": size[2]} if size else {key: unquote(value)}
    if {"First pass size-1", "Size-1", "Size-2"} <= fields.keys():
        fields |= _old_hires(fields)
    at = next((i for i, line in enumerate(lines) if line.strip().startswith(_NEGATIVE)), len(lines))
    negative = [lines[at].strip().removeprefix(_NEGATIVE), *lines[at + 1 :]] if at < len(lines) else []
    prompts = ["\n".join(line.strip() for line in part) for part in (lines[:at], negative)]
    exact = [fields.pop(key, None) for key in ("Exact prompt", "Exact negative prompt")]
    prompt, negative_prompt = (old if new is None else new[:-1] for old, new in zip(prompts, exact, strict=True))
    return Infotext(prompt, negative_prompt, fields)


def _old_hires(fields: dict[str, str]) -> dict[str, str]:
    """Return what an old hires fix means today: its size was the last one, and 0x0 for the first means as many as 512x512."""
    wide, high = int(fields["Size-1"]), int(fields["Size-2"])
    first = int(fields["First pass size-1"]), int(fields["First pass size-2"])
    if 0 in first:
        share = math.sqrt(512 * 512 / max(wide * high, 1))
        first = math.ceil(share * wide / 64) * 64, math.ceil(share * high / 64) * 64
    return {
        "Size-1": str(first[0]), "Size-2": str(first[1]), "Hires resize-1": str(wide), "Hires resize-2": str(high),
    }  # fmt: skip


def read_png(data: bytes) -> Infotext | None:
    """Read the text of a PNG file; None if it has none."""
    text = next((value for key, value in png_texts(data) if key == KEYWORD), None)
    return None if text is None else read_infotext(text.decode("utf-8", "replace"))


def spec_values(infotext: Infotext) -> dict[str, Any]:
    """Return the job that makes the picture again, as loose values for `JobSpec.check`.

    A picture made with A1111's default noise, a GPU's, gets `NV`, which draws the same numbers.
    """
    fields = infotext.fields
    values: dict[str, Any] = {"prompt": infotext.prompt, "negative_prompt": infotext.negative_prompt}
    for key, name in _JOB_KEYS.items():
        if key in fields:
            values[name] = fields[key]
    values["rng"] = "CPU" if fields.get("RNG") == "CPU" else "NV"
    values["tiling"] = fields.get("Tiling") == "True"
    if "Seed resize from-1" in fields:
        values["seed_resize"] = fields["Seed resize from-1"], fields["Seed resize from-2"]
    if _is_older(fields.get("Version", ""), (1, 6, 0)) and "[" in infotext.prompt + infotext.negative_prompt:
        fields = fields | {"Old prompt editing timelines": "True"}
    values["compat"] = tuple(name for key, name in _COMPAT_KEYS.items() if fields.get(key) == "True")
    values["options"] = _read_options(fields)
    if {"Hires upscale", "Hires upscaler", "Hires resize-1"} & fields.keys() and "Denoising strength" in fields:
        values["hires"] = _read_hires(fields)
    return values


def _is_older(version: str, than: tuple[int, int, int]) -> bool:
    """Tell whether A1111 wrote a text before a version; one without a version, or not A1111's, is taken for new."""
    match = re.match(r"v(\d+)\.(\d+)\.(\d+)", version)
    return match is not None and tuple(map(int, match.groups())) < than


def unread_keys(infotext: Infotext) -> list[str]:
    """Return what a picture's text says that this farm does not do, such as a refiner; the new picture will differ."""
    return [key for key in infotext.fields if any(key.startswith(name) for name in _NOT_DONE)]


_NOT_DONE = (
    "Refiner", "Face restoration", "Lora hashes", "Hypernet", "VAE", "Hires checkpoint", "Extra noise", "Token merging",
    "Conditional mask weight", "ControlNet", "FP8 weight", "Mask",
)  # fmt: skip
_JOB_KEYS = {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "schedule",
    "CFG scale": "cfg_scale",
    "Seed": "seed",
    "Size-1": "width",
    "Size-2": "height",
    "Model": "model",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
    "Clip skip": "clip_skip",
    "ENSD": "ensd",
    "Emphasis": "emphasis",
}
_HIRES_KEYS = {
    "Hires upscale": "scale",
    "Hires resize-1": "width",
    "Hires resize-2": "height",
    "Hires upscaler": "upscaler",
    "Hires steps": "steps",
    "Denoising strength": "denoising_strength",
    "Hires sampler": "sampler",
    "Hires schedule type": "schedule",
    "Hires prompt": "prompt",
    "Hires negative prompt": "negative_prompt",
}


def _read_hires(fields: dict[str, str]) -> dict[str, Any]:
    same = {"Use same sampler", "Use same scheduler", "Use same checkpoint"}
    found = {
        name: fields[key]
        for key, name in _HIRES_KEYS.items()
        if key in fields and (name.endswith("prompt") or fields[key] not in same)
    }
    return {"upscaler": HiresFix().upscaler} | found


def _read_options(fields: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {name: fields[key] for key, name in _OPTION_KEYS.items() if key in fields}
    for key in ("Eta", "Eta DDIM"):
        if key in fields:
            options["eta"] = fields[key]
    if fields.get("Pad conds") == "True":
        options["pad_conds"] = "empty"
    if fields.get("Pad conds v0") == "True":
        options["pad_conds"] = "v0"
    if fields.get("Noise Schedule") == "Zero Terminal SNR":
        options["zero_terminal_snr"] = True
    return options
