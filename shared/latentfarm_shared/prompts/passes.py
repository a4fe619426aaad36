"""Which prompts a job's passes read, and what numbers in them mean there."""

from __future__ import annotations

from collections.abc import Iterator

from latentfarm_shared.names import TRAITS
from latentfarm_shared.parameters import HiresFix
from latentfarm_shared.prompts.editing import Timeline
from latentfarm_shared.specs import JobSpec


def _is_old(job: JobSpec) -> bool:
    return "old_prompt_timelines" in job.compat


def first_timeline(job: JobSpec) -> Timeline:
    """Return the timeline of the first pass, in calls of the model."""
    return Timeline(job.steps * TRAITS[job.sampler].calls, old=_is_old(job))


def hires_timeline(job: JobSpec, hires: HiresFix) -> Timeline:
    """Return the timeline of the hires pass, whose numbers count on from the first."""
    calls = (hires.steps or job.steps) * TRAITS[hires.sampler or job.sampler].calls
    return Timeline(calls, first_timeline(job).steps, _is_old(job))


def timelines(job: JobSpec, field: str) -> Iterator[Timeline]:
    """Yield the timelines a prompt field (`prompt`, `hires.prompt` …) is read with."""
    if not field.startswith("hires."):
        yield first_timeline(job)
    if job.hires is not None and (field.startswith("hires.") or not getattr(job.hires, field)):
        yield hires_timeline(job, job.hires)
