"""The names of samplers, schedules and upscalers as A1111 users write them, torch-free so that a producer can check them.

Names, aliases, default schedules and which samplers call the model twice a step are those of A1111 v1.10.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from latentfarm_shared.errors import UnknownName


@dataclass(frozen=True)
class SamplerTraits:
    """What A1111 knows of a sampler besides its method.

    `schedule` is what Automatic means for it. `calls` is how often it asks the model per step, which is what prompt
    editing counts. `kind` says in which terms it works: noise levels, or training timesteps of which it walks all.
    """

    name: str
    aliases: tuple[str, ...] = ()
    schedule: str = "Uniform"
    calls: int = 1
    kind: Literal["sigmas", "timesteps"] = "sigmas"
    discards_penultimate: bool = False
    writes_ensd: bool = False
    eta: float | None = None


_TRAITS = (
    SamplerTraits("DPM++ 2M", ("k_dpmpp_2m",), "Karras"),
    SamplerTraits("DPM++ SDE", ("k_dpmpp_sde",), "Karras", calls=2, eta=1.0),
    SamplerTraits("DPM++ 2M SDE", ("k_dpmpp_2m_sde",), "Exponential", eta=1.0),
    SamplerTraits("DPM++ 2M SDE Heun", ("k_dpmpp_2m_sde_heun",), "Exponential", eta=1.0),
    SamplerTraits("DPM++ 2S a", ("k_dpmpp_2s_a",), "Karras", calls=2, writes_ensd=True, eta=1.0),
    SamplerTraits("DPM++ 3M SDE", ("k_dpmpp_3m_sde",), "Exponential", discards_penultimate=True, eta=1.0),
    SamplerTraits("Euler a", ("k_euler_a", "k_euler_ancestral"), writes_ensd=True, eta=1.0),
    SamplerTraits("Euler", ("k_euler",)),
    SamplerTraits("LMS", ("k_lms",)),
    SamplerTraits("Heun", ("k_heun",), calls=2),
    SamplerTraits("DPM2", ("k_dpm_2",), "Karras", calls=2, discards_penultimate=True),
    SamplerTraits(
        "DPM2 a",
        ("k_dpm_2_a", "k_dpm_2_ancestral"),
        "Karras",
        calls=2,
        discards_penultimate=True,
        writes_ensd=True,
        eta=1.0,
    ),
    SamplerTraits("DPM fast", ("k_dpm_fast",), writes_ensd=True, eta=1.0),
    SamplerTraits("DPM adaptive", ("k_dpm_ad", "k_dpm_adaptive"), writes_ensd=True, eta=1.0),
    SamplerTraits("Restart", ("restart",), "Karras", calls=2),
    SamplerTraits("DDIM", ("ddim",), kind="timesteps", eta=0.0),
    SamplerTraits("DDIM CFG++", ("ddim_cfgpp",), kind="timesteps", eta=0.0),
    SamplerTraits("PLMS", ("plms",), kind="timesteps"),
    SamplerTraits("UniPC", ("unipc",), kind="timesteps"),
    SamplerTraits("LCM", ("k_lcm",)),
)
TRAITS = {traits.name: traits for traits in _TRAITS}
SAMPLERS = tuple(TRAITS)

_SCHEDULE_ALIASES = {
    "Automatic": ("automatic",),
    "Uniform": ("uniform",),
    "Karras": ("karras",),
    "Exponential": ("exponential",),
    "Polyexponential": ("polyexponential",),
    "SGM Uniform": ("sgm_uniform", "sgmuniform"),
    "KL Optimal": ("kl_optimal",),
    "Align Your Steps": ("align_your_steps",),
    "Simple": ("simple",),
    "Normal": ("normal",),
    "DDIM": ("ddim", "ddim_uniform"),
    "Beta": ("beta",),
}
SCHEDULES = tuple(_SCHEDULE_ALIASES)

LATENT_UPSCALERS = {
    "Latent": ("bilinear", False),
    "Latent (antialiased)": ("bilinear", True),
    "Latent (bicubic)": ("bicubic", False),
    "Latent (bicubic antialiased)": ("bicubic", True),
    "Latent (nearest)": ("nearest", False),
    "Latent (nearest-exact)": ("nearest-exact", False),
}
PLAIN_UPSCALERS = ("None", "Lanczos", "Nearest")

EmphasisMode = Literal["Original", "No norm", "Ignore", "None"]


@lru_cache(maxsize=1024)
def resolve_sampler(name: str) -> tuple[str, str | None]:
    """Return the sampler's A1111 name and the schedule a legacy suffix asks for (`DPM++ 2M Karras`).

    Raises:
        UnknownName: no such sampler; names the nearest.
    """
    wanted = _plain(name)
    by_name = {_plain(label): traits.name for traits in _TRAITS for label in (traits.name, *traits.aliases)}
    if wanted in by_name:
        return by_name[wanted], None
    for schedule, aliases in _SCHEDULE_ALIASES.items():
        for label in (schedule, *aliases):
            stem = wanted.removesuffix(_plain(label)).rstrip(" _")
            if stem != wanted and stem in by_name:
                return by_name[stem], schedule
    raise UnknownName.among("sampler", name, SAMPLERS)


@lru_cache(maxsize=1024)
def resolve_schedule(name: str) -> str:
    """Return the schedule's A1111 name.

    Raises:
        UnknownName: no such schedule; names the nearest.
    """
    by_name = {_plain(label): name for name, aliases in _SCHEDULE_ALIASES.items() for label in (name, *aliases)}
    try:
        return by_name[_plain(name)]
    except KeyError:
        raise UnknownName.among("schedule", name, SCHEDULES) from None


def _plain(name: str) -> str:
    return " ".join(name.split()).lower()


def effective_schedule(sampler: str, schedule: str) -> str:
    """Return what `Automatic` means for a sampler."""
    return TRAITS[sampler].schedule if schedule == "Automatic" else schedule
