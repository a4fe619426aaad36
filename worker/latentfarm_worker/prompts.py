"""From a prompt's text to what the encoder is asked: laid out by the shared parser, encoded as operations."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from latentfarm_shared.names import TRAITS
from latentfarm_shared.prompts.chunks import Chunk, Reading, chunk_texts
from latentfarm_shared.prompts.editing import Timeline
from latentfarm_shared.prompts.language import Part, parse_negative, parse_positive
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import JobSpec

from latentfarm_worker.guidance import Timed
from latentfarm_worker.operations import Encode, Operation


@dataclass(frozen=True)
class LaidPart:
    """One side of an `AND`: its weight, and for each text the last call it serves and its chunks."""

    weight: float
    ends: tuple[int, ...]
    texts: tuple[tuple[Chunk, ...], ...]


@dataclass(frozen=True)
class LaidPrompts:
    """Both prompts of one pass, laid out; `calls` is how often A1111 expects the model to be asked."""

    positive: tuple[LaidPart, ...]
    negative: LaidPart
    calls: int


class PromptLayout:
    """Lays out a job's prompts, matched against its own lock alone."""

    def __init__(self, job: JobSpec, lock: Lock, tokenizer: ClipTokenizer) -> None:
        self._job, self._tokenizer = job, tokenizer
        self._matcher = NameMatcher(tokenizer, lock.embeddings)
        self._reading = Reading(
            attention=job.emphasis != "None",
            break_as_word="break_as_word" in job.compat,
            leave_vectors_behind="leave_vectors_behind" in job.compat,
        )

    def first_pass(self) -> LaidPrompts:
        """Lay out the prompts of the first pass."""
        job = self._job
        calls = job.steps * TRAITS[job.sampler].calls
        return self._lay(job.prompt, job.negative_prompt, Timeline(calls, old=self._old))

    def hires_pass(self) -> LaidPrompts:
        """Lay out the prompts of the hires pass, whose numbers count on from the first."""
        job, hires = self._job, self._job.hires
        if hires is None:
            raise ValueError("the job has no hires pass")
        before = job.steps * TRAITS[job.sampler].calls
        calls = (hires.steps or job.steps) * TRAITS[hires.sampler or job.sampler].calls
        timeline = Timeline(calls, before, self._old)
        return self._lay(hires.prompt or job.prompt, hires.negative_prompt or job.negative_prompt, timeline)

    def empty(self) -> tuple[Chunk, ...]:
        """Lay out the empty prompt."""
        return chunk_texts([""], self._tokenizer, self._matcher)[0]

    @property
    def _old(self) -> bool:
        return "old_prompt_timelines" in self._job.compat

    def _lay(self, positive: str, negative: str, timeline: Timeline) -> LaidPrompts:
        parts = tuple(self._lay_part(part) for part in parse_positive(positive, timeline))
        (other,) = parse_negative(negative, timeline)
        return LaidPrompts(parts, self._lay_part(other), timeline.steps)

    def _lay_part(self, part: Part) -> LaidPart:
        texts = chunk_texts([entry.text for entry in part.entries], self._tokenizer, self._matcher, self._reading)
        return LaidPart(part.weight, tuple(entry.end_at_step for entry in part.entries), texts)


def encode_part(part: LaidPart, job: JobSpec, *, zero: bool = False) -> Generator[Operation, Any, Timed]:
    """Have one side encoded."""
    conditionings = yield Encode(part.texts, job.clip_skip, job.emphasis, zero)
    return Timed(part.weight, part.ends, conditionings)


def encode_parts(parts: tuple[LaidPart, ...], job: JobSpec) -> Generator[Operation, Any, tuple[Timed, ...]]:
    """Have every side of an `AND` encoded, one after the other."""
    timed: tuple[Timed, ...] = ()
    for part in parts:
        timed += ((yield from encode_part(part, job)),)
    return timed
