"""A1111's requests as jobs: what is taken, what is ignored because it changes nothing here, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentfarm_shared.a1111 import KNOWN, spec_from_request
from latentfarm_shared.errors import InvalidField, UnknownName, nearest
from latentfarm_shared.infotext import read_infotext, spec_values, unread_keys
from latentfarm_shared.parameters import short
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.specs import JobSpec
from pydantic import BaseModel, ConfigDict, Field

from latentfarm.farm import DirectFarm

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "styles": (None, [], ""),
    "restore_faces": (None, False),
    "firstphase_width": (None, 0),
    "firstphase_height": (None, 0),
    "hr_checkpoint_name": (None, "", "Use same checkpoint"),
    "refiner_checkpoint": (None, "", "None"),
    "refiner_switch_at": (None, 0, 1, 0.8),
    "disable_extra_networks": (None, False),
    "script_name": (None, ""),
    "script_args": (None, []),
    "alwayson_scripts": (None, {}),
    "enable_refiner": (None, False),
}
"""Fields that change the picture, with the values at which they do not."""
HARMLESS = frozenset({
    "do_not_save_samples", "do_not_save_grid", "send_images", "save_images", "override_settings_restore_afterwards",
    "comments", "force_task_id", "infotext", "sampler_index", "checkpoint", "vae", "callback_url", "mask", "sd_model",
})  # fmt: skip
HARMLESS_SETTINGS = (
    "save_", "samples_save", "grid_", "return_grid", "show_", "live_preview", "do_not_show", "enable_pnginfo", "outdir_",
    "directories_", "jpeg_quality", "webp_lossless", "img_downscale", "multiple_tqdm", "notification", "sd_checkpoint_cache",
    "sd_vae_checkpoint_cache", "sd_checkpoints_", "upcast_attn", "add_model", "add_version", "add_user", "add_vae",
    "disable_mmap", "memmon", "interrogate", "face_restoration", "code_former", "ESRGAN_tile", "keyedit", "ui_", "list_",
    "sd_vae_as_default", "img2img_fix_steps", "hide_samplers", "sd_checkpoint_hash", "extra_networks", "hires_fix_show",
)  # fmt: skip
MODEL_FILES = (".safetensors", ".ckpt", ".pt")
MOST = 100
TEXTS = {"sd_vae": (None, "", "Automatic", "None"), "samples_format": (None, "", "png")}


class Txt2ImgRequest(BaseModel):
    """A1111's request; its other fields are taken too, as the farm's documentation says."""

    model_config = ConfigDict(extra="allow")

    prompt: str = Field("", max_length=20_000, examples=["masterpiece, corneo_dva"])
    negative_prompt: str = Field("", max_length=20_000)
    steps: int = 50
    seed: int = -1
    sampler_name: str | None = Field(None, examples=["Euler a"])
    scheduler: str | None = Field(None, examples=["Karras"])
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    batch_size: int = 1
    n_iter: int = 1
    enable_hr: bool = False
    override_settings: dict[str, Any] | None = None
    force_task_id: str | None = None
    infotext: str | None = None


def spec_of(request: Mapping[str, Any], farm: DirectFarm, default_model: str, options: Mapping[str, Any]) -> JobSpec:
    """Return the job that a request asks for; `options` are the caller's own settings, under the request's.

    Raises:
        InvalidField, UnknownName: what the farm does not do, or does not have.
    """
    given = _with_infotext(request)
    settings = dict(_mapping(given.pop("override_settings", None)))
    model = settings.pop("sd_model_checkpoint", None) or given.get("checkpoint") or default_model
    if given.get("vae") not in TEXTS["sd_vae"]:
        raise InvalidField("vae", "checkpoints are drawn with their own VAE here; leave it out")
    fields = _supported(given)
    if not fields.get("sampler_name") and isinstance(given.get("sampler_index"), str):
        fields["sampler_name"] = given["sampler_index"]
    settings = {name: value for name, value in options.items() if name in KNOWN} | settings
    spec = spec_from_request(fields | supported_settings(settings, "override_settings."))
    if spec.count > MOST:
        raise InvalidField("n_iter", f"n_iter times batch_size should be up to {MOST}; submit more as a job")
    checkpoint = resolve_model(str(model), farm)
    return JobSpec.check(spec.model_dump(exclude_defaults=True) | {"model": checkpoint.name, "lane": "interactive"})


def _mapping(value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise InvalidField("override_settings", f"should be an object, got {short(value)}")
    return value or {}


def _with_infotext(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request whose absent fields are filled from its `infotext`, as A1111 does."""
    given = {name: value for name, value in request.items() if value is not None}
    text = given.pop("infotext", None)
    if not isinstance(text, str) or not text.strip():
        return given
    infotext = read_infotext(text)
    strange = unread_keys(infotext)
    if strange:
        raise InvalidField("infotext", f"asks for {strange[0]}, which this farm does not do")
    return _a1111(spec_values(infotext)) | given


def _a1111(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec's loose values by A1111's names."""
    names = {
        "variation_seed": "subseed", "variation_strength": "subseed_strength", "sampler": "sampler_name",
        "schedule": "scheduler",
    }  # fmt: skip
    settings = {"clip_skip": "CLIP_stop_at_last_layers", "ensd": "eta_noise_seed_delta", "emphasis": "emphasis"}
    found = {names.get(name, name): value for name, value in values.items() if name in _PLAIN or name in names}
    found["override_settings"] = {settings[name]: value for name, value in values.items() if name in settings}
    found["override_settings"]["randn_source"] = "CPU" if values.get("rng") == "CPU" else "GPU"
    found |= {name: value for name, value in dict(values.get("options") or {}).items() if name in KNOWN}
    hires = values.get("hires")
    if hires:
        given = {
            "scale": "hr_scale", "width": "hr_resize_x", "height": "hr_resize_y", "upscaler": "hr_upscaler",
            "steps": "hr_second_pass_steps", "denoising_strength": "denoising_strength", "sampler": "hr_sampler_name",
            "schedule": "hr_scheduler", "prompt": "hr_prompt", "negative_prompt": "hr_negative_prompt",
        }  # fmt: skip
        found |= {"enable_hr": True} | {given[name]: value for name, value in hires.items()}
    return found


_PLAIN = ("prompt", "negative_prompt", "steps", "cfg_scale", "seed", "width", "height", "tiling")


def _supported(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that decide the picture.

    Raises:
        InvalidField: one asks for what the farm does not do.
    """
    fields = {}
    for name, value in given.items():
        if name in UNSUPPORTED:
            if value not in UNSUPPORTED[name]:
                raise InvalidField(name, f"is not supported, got {short(value)}; leave it out")
        elif name in KNOWN:
            fields[name] = value
        elif name not in HARMLESS:
            near = nearest(name, KNOWN, 1)
            raise InvalidField(name, "is not supported" + (f"; did you mean {near[0]}?" if near else ""))
    return fields


def supported_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings that decide the picture; `where` stands before their names in errors.

    Raises:
        InvalidField: one asks for what the farm does not do.
    """
    fields = {}
    for name, value in settings.items():
        if name in TEXTS:
            if value not in TEXTS[name]:
                raise InvalidField(where + name, f"is not supported, got {short(value)}; leave it out")
        elif name in KNOWN:
            fields[name] = value
        elif not name.startswith(HARMLESS_SETTINGS):
            near = nearest(name, KNOWN, 1)
            reason = "is not supported" + (f"; did you mean {near[0]}?" if near else "")
            raise InvalidField(where + name, reason)
    return fields


def title_of(record: CheckpointRecord) -> str:
    """Return a checkpoint's title as A1111 writes it, a file's name and a short hash."""
    return f"{record.name}.safetensors [{record.weights_hash[:10]}]"


def resolve_model(title: str, farm: DirectFarm) -> CheckpointRecord:
    """Return the checkpoint that a title, a file's name, a name or a hash means.

    Raises:
        UnknownName: there is none; names the nearest.
    """
    found = farm.models.ls()
    wanted = title.strip()
    plain = wanted.rpartition(" [")[0] if wanted.endswith("]") and " [" in wanted else wanted
    stem = next((plain[: -len(end)] for end in MODEL_FILES if plain.lower().endswith(end)), plain)
    for record in found:
        if stem.lower() == record.name.lower() or (len(wanted) >= 8 and record.weights_hash.startswith(wanted.lower())):
            return record
    raise UnknownName.among("model", title, [record.name for record in found])
