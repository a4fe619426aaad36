"""The strict contract: an embedding that a job asks for is applied, or the job is refused with the reason.

Explicit requests (`embeddings=[…]`, `embedding:NAME`, `<NAME>`) must exist and fit. A bare word that matches a name is
that embedding; one that looks like a misspelt name is refused; any other is text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from latentfarm_shared.errors import EmbeddingRefused, InvalidField, UnknownName
from latentfarm_shared.prompts.attention import parse_attention
from latentfarm_shared.prompts.chunks import Reading, chunk_prompt
from latentfarm_shared.prompts.language import parse_negative, parse_positive, split_and, strip_comments
from latentfarm_shared.prompts.matching import Mention, NameMatcher
from latentfarm_shared.prompts.passes import timelines
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord
from latentfarm_shared.specs import Compat, JobSpec, Side

_EXPLICIT = re.compile(r"(?<![\w-])embedding:(?P<comfy>[^\s,()\[\]<>:|]+)|<(?P<angle>[^<>:\n]+)>")
_EXTRA_NETWORK = re.compile(r"<(\w+):[^<>]*>")
_WORDS = re.compile(r"[^\s,.;!?()\[\]|:\"']+")
MAX_PARTS, MAX_CHARACTERS, MAX_CHUNKS = 32, 200_000, 1024
_CODE_LIKE = re.compile(r"[\d_-]")


@dataclass(frozen=True)
class Settled:
    """A spec whose prompts hold every embedding as a bare name, and the embeddings they use."""

    spec: JobSpec
    embeddings: tuple[EmbeddingRecord, ...]


def settle(
    spec: JobSpec, checkpoint: CheckpointRecord, known: Mapping[str, EmbeddingRecord], tokenizer: ClipTokenizer
) -> Settled:
    """Resolve every embedding a spec asks for; `known` is by name in lower case.

    Raises:
        UnknownName: an explicit or misspelt name; with the nearest names.
        EmbeddingRefused: an embedding made for another family of checkpoints.
        InvalidField: the prompt asks for something that is no embedding and not supported.
    """
    if spec.clip_skip > checkpoint.layers:
        raise InvalidField("clip_skip", f"model {checkpoint.name!r} takes 1 to {checkpoint.layers}")
    matcher = NameMatcher(tokenizer, known.values())
    used: dict[str, EmbeddingRecord] = {}
    prompts: dict[str, str] = {}
    for field, written in spec.prompts:
        side: Side = "negative" if _is_negative(field) else "positive"
        prompt, explicit = _replace_explicit(strip_comments(written), field, known, spec.compat)
        _refuse_too_much(prompt, field, spec, (tokenizer, matcher))
        mentioned = _mentions(prompt, field, matcher, spec)
        for use in (use for use in spec.embeddings if use.side == side):
            record = _lookup(use.name, known)
            explicit.append(record)
            if record not in mentioned:
                prompt = _with_word(prompt, _escape(record.name))
                mentioned.append(record)
        _refuse_near_misses(prompt, field, matcher, known, spec)
        mentioned = _mentions(prompt, field, matcher, spec)
        lost = next((record for record in explicit if record not in mentioned), None)
        if lost is not None:
            raise EmbeddingRefused(lost.name, f"its name is not a word of its own in {field}")
        for record in mentioned:
            _refuse_misfit(record, checkpoint)
            used[record.name.lower()] = record
        prompts[field] = prompt
    return Settled(spec.with_prompts(prompts), tuple(used.values()))


def _refuse_too_much(prompt: str, field: str, spec: JobSpec, layout: tuple[ClipTokenizer, NameMatcher]) -> None:
    """Refuse a prompt whose parts or changing texts would keep a device busy with nothing else."""
    if not _is_negative(field) and len(split_and(prompt)) > MAX_PARTS:
        raise InvalidField(field, f"has more than {MAX_PARTS} parts joined by AND")
    texts = list(_texts(prompt, field, spec))
    too_long = sum(map(len, texts)) > MAX_CHARACTERS
    if too_long or len(texts) * max(len(chunk_prompt(text, *layout)) for text in texts) > MAX_CHUNKS:
        raise InvalidField(
            field, "is too long for what changes in it; shorten it, or what stands around its alternations"
        )


def _is_negative(field: str) -> bool:
    return field.endswith("negative_prompt")


def _texts(prompt: str, field: str, spec: JobSpec) -> Iterator[str]:
    """Yield every distinct text a prompt goes through, in every pass that reads it."""
    seen: set[str] = set()
    parse = parse_negative if _is_negative(field) else parse_positive
    for timeline in timelines(spec, field):
        for part in parse(prompt, timeline):
            for entry in part.entries:
                if entry.text not in seen:
                    seen.add(entry.text)
                    yield entry.text


def _segments(prompt: str, field: str, spec: JobSpec) -> Iterator[str]:
    """Yield the text of every distinct segment of every text."""
    reading = Reading(attention=spec.emphasis != "None")
    texts = _texts(prompt, field, spec)
    yield from dict.fromkeys(segment.text for text in texts for segment in reading.segments(text))


def _with_word(prompt: str, word: str) -> str:
    """Add a word at the end of a prompt, or in front where the end belongs to a weight, an AND or an open bracket."""
    if not prompt.strip():
        return word
    after = f"{prompt}, {word}"
    plain = split_and(after) == [(after, 1.0)] and split_and(prompt) == [(prompt.rstrip(), 1.0)]
    return after if plain and parse_attention(after)[-1].weight == 1 else f"{word}, {prompt}"


def _replace_explicit(
    prompt: str, field: str, known: Mapping[str, EmbeddingRecord], compat: Collection[Compat]
) -> tuple[str, list[EmbeddingRecord]]:
    """Put bare names in place of explicit forms, apart from the words around; return the embeddings they name."""
    network = _EXTRA_NETWORK.search(prompt)
    if network and "ignore_extra_networks" not in compat:
        raise InvalidField(field, f"{network.group()!r}: {network.group(1)} networks are not supported; remove it")
    explicit: list[EmbeddingRecord] = []

    def bare(match: re.Match[str]) -> str:
        explicit.append(_lookup(match["comfy"] or match["angle"], known))
        before, after = prompt[: match.start()][-1:], prompt[match.end() :][:1]
        return f"{' ' * before.isalnum()}{_escape(explicit[-1].name)}{' ' * after.isalnum()}"

    return _EXPLICIT.sub(bare, prompt), explicit


def _lookup(name: str, known: Mapping[str, EmbeddingRecord]) -> EmbeddingRecord:
    record = known.get(name.strip().lower())
    if record is None:
        raise UnknownName.among("embedding", name.strip(), (item.name for item in known.values()))
    return record


def _mentions(prompt: str, field: str, matcher: NameMatcher, spec: JobSpec) -> list[EmbeddingRecord]:
    found: list[EmbeddingRecord] = []
    for text in _segments(prompt, field, spec):
        for item in matcher.split(text):
            if isinstance(item, Mention) and item.embedding not in found:
                found.append(item.embedding)
    return found


def _refuse_misfit(record: EmbeddingRecord, checkpoint: CheckpointRecord) -> None:
    if not record.fits(checkpoint.widths):
        has = ", ".join(f"{encoder} {width}" for encoder, width in sorted(record.widths.items()))
        needs = ", ".join(f"{encoder} {width}" for encoder, width in sorted(checkpoint.widths.items()))
        raise EmbeddingRefused(record.name, f"its vectors are {has}, but model {checkpoint.name!r} takes {needs}")


def _refuse_near_misses(
    prompt: str, field: str, matcher: NameMatcher, known: Mapping[str, EmbeddingRecord], spec: JobSpec
) -> None:
    words: dict[str, None] = {}
    for segment in _segments(prompt, field, spec):
        text = segment
        for item in matcher.split(text):
            if isinstance(item, Mention):
                text = _written(item.embedding.name).sub(" ", text)
        words |= dict.fromkeys(word for word in _WORDS.findall(text) if _CODE_LIKE.search(word))
    for word in words:
        near = _within_two_edits(word.lower(), known)
        if near:
            raise UnknownName("embedding", word, near)


def _written(name: str) -> re.Pattern[str]:
    """Match a name as prompts may write it: in any case, with or without spaces between its parts."""
    return re.compile(r"\s*".join(re.escape(c) for c in name if not c.isspace()), re.IGNORECASE)


def _within_two_edits(word: str, names: Iterable[str]) -> tuple[str, ...]:
    scored = sorted((edit_distance(word, name), name) for name in names if abs(len(word) - len(name)) <= 2)
    return tuple(name for distance, name in scored if 0 < distance <= 2 and distance * 2 < len(name))[:3]


def edit_distance(left: str, right: str) -> int:
    """Return the Levenshtein distance between two words."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def _escape(name: str) -> str:
    return re.sub(r"([()\[\]\\])", r"\\\1", name)
