"""The names of samplers and schedules, as A1111 users write them, torch-free so that a producer can check them."""

from __future__ import annotations

from latentfarm_shared.errors import UnknownName

SAMPLERS = ("Euler", "Euler a", "Heun", "DPM++ 2M")
SCHEDULES = ("Automatic", "Uniform", "Karras", "Exponential", "SGM Uniform", "Simple")

_SAMPLER_ALIASES = {
    "k_euler": "Euler",
    "k_euler_a": "Euler a",
    "k_euler_ancestral": "Euler a",
    "k_heun": "Heun",
    "k_dpmpp_2m": "DPM++ 2M",
}
_AUTOMATIC = {"DPM++ 2M": "Karras"}


def resolve_sampler(name: str) -> tuple[str, str | None]:
    """Return the sampler's A1111 name and the schedule a legacy suffix asks for (`DPM++ 2M Karras`).

    Raises:
        UnknownName: no such sampler; names the nearest.
    """
    wanted = " ".join(name.split()).lower()
    by_name = {s.lower(): s for s in SAMPLERS} | _SAMPLER_ALIASES
    if wanted in by_name:
        return by_name[wanted], None
    for schedule in SCHEDULES[1:]:
        stem = wanted.removesuffix(schedule.lower()).rstrip()
        if stem != wanted and stem in by_name:
            return by_name[stem], schedule
    raise UnknownName.among("sampler", name, SAMPLERS)


def resolve_schedule(name: str) -> str:
    """Return the schedule's A1111 name.

    Raises:
        UnknownName: no such schedule; names the nearest.
    """
    by_name = {s.lower(): s for s in SCHEDULES}
    try:
        return by_name[" ".join(name.split()).lower()]
    except KeyError:
        raise UnknownName.among("schedule", name, SCHEDULES) from None


def effective_schedule(sampler: str, schedule: str) -> str:
    """Return what `Automatic` means for a sampler (A1111: Karras for DPM++ 2M, else the model's own)."""
    return _AUTOMATIC.get(sampler, "Uniform") if schedule == "Automatic" else schedule
