"""A1111's own words for a job: the fields of its API and the settings behind them, as a spec and back.

Names are those of `/sdapi/v1/txt2img` and of A1111's settings, v1.10.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from latentfarm_shared.errors import InvalidField, nearest
from latentfarm_shared.specs import JobSpec

_FIELDS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "steps",
    "cfg_scale": "cfg_scale",
    "seed": "seed",
    "subseed": "variation_seed",
    "subseed_strength": "variation_strength",
    "width": "width",
    "height": "height",
    "tiling": "tiling",
}
_HIRES = {
    "hr_scale": "scale",
    "hr_resize_x": "width",
    "hr_resize_y": "height",
    "hr_upscaler": "upscaler",
    "hr_second_pass_steps": "steps",
    "denoising_strength": "denoising_strength",
    "hr_sampler_name": "sampler",
    "hr_scheduler": "schedule",
    "hr_prompt": "prompt",
    "hr_negative_prompt": "negative_prompt",
}
_OPTIONS = {
    "eta": "eta",
    "s_churn": "s_churn",
    "s_tmin": "s_tmin",
    "s_tmax": "s_tmax",
    "s_noise": "s_noise",
    "s_min_uncond": "ngms",
    "s_min_uncond_all": "ngms_all_steps",
    "skip_early_cond": "skip_early_cfg",
    "sigma_min": "sigma_min",
    "sigma_max": "sigma_max",
    "rho": "rho",
    "beta_dist_alpha": "beta_alpha",
    "beta_dist_beta": "beta_beta",
    "always_discard_next_to_last_sigma": "discard_penultimate",
    "use_old_karras_scheduler_sigmas": "old_karras_range",
    "sgm_noise_multiplier": "sgm_noise_multiplier",
    "enable_quantization": "round_timesteps",
    "use_downcasted_alpha_bar": "downcast_alphas",
    "uni_pc_variant": "uni_pc_variant",
    "uni_pc_skip_type": "uni_pc_skip_type",
    "uni_pc_order": "uni_pc_order",
    "uni_pc_lower_order_final": "uni_pc_lower_order_final",
}
_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "CLIP_stop_at_last_layers": ("clip_skip", int),
    "emphasis": ("emphasis", str),
    "randn_source": ("rng", lambda source: "CPU" if source == "CPU" else "NV"),
    "eta_noise_seed_delta": ("ensd", int),
}
_DEFAULTS: dict[str, Any] = {
    "width": 512, "height": 512, "steps": 50, "denoising_strength": 0.75, "randn_source": "GPU",
}  # fmt: skip
_ETAS = ("eta_ancestral", "eta_ddim")
_SWITCHES = (
    "enable_hr",
    "batch_size",
    "n_iter",
    "sampler_name",
    "scheduler",
    "seed_resize_from_w",
    "seed_resize_from_h",
)
KNOWN = (
    *_FIELDS, *_HIRES, *_OPTIONS, *_SETTINGS, *_ETAS, *_SWITCHES,
    "override_settings", "sd_noise_schedule", "pad_cond_uncond", "pad_cond_uncond_v0", "use_old_scheduling",
)  # fmt: skip


def spec_from_request(request: Mapping[str, Any]) -> JobSpec:
    """Return the job an A1111 API request describes; `override_settings` may stand among the fields or apart.

    Absent fields have A1111's defaults: 512 x 512, 50 steps, the noise of a GPU. Images of a batch and batches are one
    job's images, as their seeds count on.

    Raises:
        InvalidField: a field the farm does not take.
        UnknownName: no such sampler or schedule.
    """
    try:
        return _spec(request)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidField("request", f"holds a value of the wrong kind ({error})") from error


def _spec(request: Mapping[str, Any]) -> JobSpec:
    given = _DEFAULTS | {name: value for name, value in request.items() if value is not None}
    given |= given.pop("override_settings", None) or {}
    for name in given:
        if name not in KNOWN:
            near = nearest(name, KNOWN, 1)
            raise InvalidField(name, "is not supported" + (f"; did you mean {near[0]}?" if near else ""))
    values = {ours: given[theirs] for theirs, ours in _FIELDS.items() if theirs in given}
    values |= {ours: read(given[theirs]) for theirs, (ours, read) in _SETTINGS.items() if theirs in given}
    values["sampler"] = given.get("sampler_name") or "Euler"
    values["schedule"] = given.get("scheduler") or "Automatic"
    values["count"] = int(given.get("batch_size", 1)) * int(given.get("n_iter", 1))
    if given.get("seed_resize_from_w", 0) > 0 and given.get("seed_resize_from_h", 0) > 0:
        values["seed_resize"] = given["seed_resize_from_w"], given["seed_resize_from_h"]
    if given.get("enable_hr"):
        unset = (None, "", "Use same sampler", "Use same scheduler")
        values["hires"] = {ours: given[theirs] for theirs, ours in _HIRES.items() if given.get(theirs) not in unset}
    if given.get("use_old_scheduling"):
        values["compat"] = ("old_prompt_timelines",)
    return JobSpec.check(values | {"options": _options(given, values["sampler"])})


def _options(given: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    options = {ours: given[theirs] for theirs, ours in _OPTIONS.items() if given.get(theirs) is not None}
    default_eta = given.get("eta_ddim" if sampler.lower().startswith("ddim") else "eta_ancestral")
    if default_eta is not None and options.get("eta") is None:
        options["eta"] = default_eta
    if given.get("sd_noise_schedule") == "Zero Terminal SNR":
        options["zero_terminal_snr"] = True
    if given.get("pad_cond_uncond_v0"):
        options["pad_conds"] = "v0"
    elif given.get("pad_cond_uncond"):
        options["pad_conds"] = "empty"
    return options
