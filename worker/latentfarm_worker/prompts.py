"""From a prompt's text to what the encoder is asked: laid out by the shared parser, encoded as operations."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from latentfarm_shared.prompts.chunks import Chunk, Reading, chunk_texts
from latentfarm_shared.prompts.editing import Timeline
from latentfarm_shared.prompts.language import Part, parse_negative, parse_positive
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.prompts.passes import first_timeline, hires_timeline
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import JobSpec

from latentfarm_worker.guidance import Timed
from latentfarm_worker.operations import Encode, Operation


@dataclass(frozen=True)
class LaidPart:
    """One side of an `AND`: its weight, for each entry of its timetable the last call it serves and its text.

    `texts` are the distinct ones, each as chunks; `which` says for each entry which of them it shows.
    """

    weight: float
    ends: tuple[int, ...]
    which: tuple[int, ...]
    texts: tuple[tuple[Chunk, ...], ...]
    is_empty: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """How many entries show each text."""
        return tuple(self.which.count(number) for number in range(len(self.texts)))


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
        return self._lay(self._job.prompt, self._job.negative_prompt, first_timeline(self._job))

    def hires_pass(self) -> LaidPrompts:
        """Lay out the prompts of the hires pass, whose numbers count on from the first."""
        job, hires = self._job, self._job.hires
        if hires is None:
            raise ValueError("the job has no hires pass")
        prompts = hires.prompt or job.prompt, hires.negative_prompt or job.negative_prompt
        return self._lay(*prompts, hires_timeline(job, hires))

    def empty(self) -> tuple[Chunk, ...]:
        """Lay out the empty prompt."""
        return chunk_texts([""], self._tokenizer, self._matcher)[0]

    def _lay(self, positive: str, negative: str, timeline: Timeline) -> LaidPrompts:
        parts = tuple(self._lay_part(part) for part in parse_positive(positive, timeline))
        (other,) = parse_negative(negative, timeline)
        return LaidPrompts(parts, self._lay_part(other), timeline.steps)

    def _lay_part(self, part: Part) -> LaidPart:
        distinct = {entry.text: None for entry in part.entries}
        numbers = {text: number for number, text in enumerate(distinct)}
        return LaidPart(
            weight=part.weight,
            ends=tuple(entry.end_at_step for entry in part.entries),
            which=tuple(numbers[entry.text] for entry in part.entries),
            texts=chunk_texts(list(distinct), self._tokenizer, self._matcher, self._reading),
            is_empty=list(distinct) == [""],
        )


def encode_part(part: LaidPart, job: JobSpec, *, zero: bool = False) -> Generator[Operation, Any, Timed]:
    """Have one side encoded."""
    conditionings = yield Encode(part.texts, part.counts, job.clip_skip, job.emphasis, zero)
    return Timed(part.weight, part.ends, tuple(conditionings[number] for number in part.which))


def encode_parts(parts: tuple[LaidPart, ...], job: JobSpec) -> Generator[Operation, Any, tuple[Timed, ...]]:
    """Have every side of an `AND` encoded, one after the other."""
    timed: tuple[Timed, ...] = ()
    for part in parts:
        timed += ((yield from encode_part(part, job)),)
    return timed
