"""The strict contract: an embedding that a job asks for is applied, or the job is refused with the reason.

Explicit requests (`embeddings=[…]`, `embedding:NAME`, `<NAME>`) must exist and fit. A bare word that matches a name is
that embedding; one that looks like a misspelt name is refused; any other is text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from latentfarm_shared.errors import EmbeddingRefused, InvalidField, UnknownName, UsageError, nearest
from latentfarm_shared.explicit import bare, folded, plain_name, requested, standing
from latentfarm_shared.parameters import EmbeddingUse, Side
from latentfarm_shared.prompts.attention import parse_attention
from latentfarm_shared.prompts.chunks import Reading, chunk_prompt
from latentfarm_shared.prompts.language import parse_negative, parse_positive, split_and, strip_comments
from latentfarm_shared.prompts.matching import Mention, NameMatcher
from latentfarm_shared.prompts.passes import timelines
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import CheckpointRecord, Dropped, EmbeddingRecord, Lock
from latentfarm_shared.specs import NO_DATA, Data, ImageSpec, JobSpec
from latentfarm_shared.sweeps.axes import Axis, Point
from latentfarm_shared.sweeps.dynamic import texts

_EXTRA_NETWORK = re.compile(r"<(\w+):[^<>]*>")
_WORDS = re.compile(r"[^\s,.;!?()\[\]|:\"']+")
MAX_PARTS, MAX_CHARACTERS, MAX_CHUNKS = 32, 200_000, 1024
MAX_CHECKED = 10_000
PLAIN_LENGTH = 1000
PLAIN_FIELDS = frozenset(
    {
        "prompt",
        "negative_prompt",
        "seed",
        "cfg_scale",
        "variation_seed",
        "steps",
        "sampler",
        "schedule",
        "width",
        "height",
    }
)
_MARKS = re.compile(r"[<>()\[\]{}\\#]|embedding:|\bAND\b|\bBREAK\b")
_CODE_LIKE = re.compile(r"[\d_-]")
_PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+")
MAX_WORDS = 1_000_000


@dataclass(frozen=True)
class Settled:
    """A spec whose prompts hold every embedding as a bare name, the embeddings they use, and those they do without."""

    spec: JobSpec
    embeddings: tuple[EmbeddingRecord, ...]
    dropped: tuple[Dropped, ...] = ()


def settle(
    spec: JobSpec,
    checkpoint: CheckpointRecord,
    known: Mapping[str, EmbeddingRecord],
    tokenizer: ClipTokenizer,
    others: Sequence[CheckpointRecord] = (),
) -> Settled:
    """Resolve every embedding a spec asks for in every prompt its axes make; `known` is by name in lower case.

    Raises:
        UnknownName: an explicit or misspelt name; with the nearest names.
        EmbeddingRefused: an embedding that is disabled, removed or made for another family of checkpoints.
        InvalidField: the prompt asks for something that is no embedding and not supported.
    """
    return Contract(checkpoint, known, tokenizer, others).settle(spec)


class Contract:
    """What a job may ask of one checkpoint, given the names its owner knows. Safe to keep for many jobs.

    `others` are checkpoints that a refusal may recommend. `lookup` finds older versions, `NAME@version`.
    """

    def __init__(
        self,
        checkpoint: CheckpointRecord,
        known: Mapping[str, EmbeddingRecord],
        tokenizer: ClipTokenizer,
        others: Sequence[CheckpointRecord] = (),
        lookup: Callable[[str], EmbeddingRecord] | None = None,
    ) -> None:
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.known = {folded(record.name): record for record in known.values()}
        self._others, self._lookup = others, lookup
        self.matcher = NameMatcher(tokenizer, [r for r in known.values() if self._is_name(r)])
        self._names = [name for name, record in self.known.items() if record.state == "active"]
        self._harmless: set[str] = set()
        self._pieces: dict[str, list[int]] = {}

    def _is_name(self, record: EmbeddingRecord) -> bool:
        """Tell whether a bare word means the embedding.

        A word of the vocabulary does if that is allowed, until the embedding is removed or disabled.
        """
        return not self.is_word(record) or (record.allow_word and record.state == "active")

    def is_word(self, record: EmbeddingRecord) -> bool:
        """Tell whether a name is one word of the checkpoint's vocabulary, which prompts use as that word."""
        return len(self.tokenizer.encode(record.name)) == 1

    def find(self, name: str) -> EmbeddingRecord:
        """Return what an explicit request names.

        Raises:
            UnknownName: with the nearest names.
        """
        plain = name.strip()
        record = self.known.get(folded(plain))
        if record is None and "@" in plain and self._lookup is not None:
            return self._lookup(plain)
        if record is None:
            raise UnknownName.among("embedding", plain, self.usable())
        return record

    def usable(self) -> list[str]:
        """Return the names that would be applied."""
        fitting = [r.name for r in self.known.values() if r.state == "active" and r.fits(self.checkpoint.widths)]
        return fitting or [r.name for r in self.known.values() if r.state == "active"]

    def why_not(self, record: EmbeddingRecord, *, explicit: bool = False) -> str | None:
        """Return why an embedding cannot be applied; None if it can."""
        if record.state != "active":
            return f"it is {record.state}" + (f"; {record.state_reason}" if record.state_reason else "")
        if explicit and self.is_word(record) and not record.allow_word:
            return "its name is a word of the model's vocabulary; add it under another name, or with --allow-word"
        if record.fits(self.checkpoint.widths):
            return None
        has, needs = _widths(record.widths), _widths(self.checkpoint.widths)
        reason = f"its vectors are {has} ({record.family}), but model {self.checkpoint.name!r} takes {needs}"
        homes = [c.name for c in self._others if record.fits(c.widths)][:3]
        instead = nearest(record.name, (n for n in self.usable() if n.lower() != record.name.lower()))
        fitting = instead if any(r.fits(self.checkpoint.widths) for r in self.known.values()) else ()
        reason += f"; it fits {' and '.join(map(repr, homes))}" if homes else ""
        return reason + (f"; what would fit: {', '.join(map(repr, fitting))}" if fitting else "")

    def settle(self, spec: JobSpec, data: Data = NO_DATA) -> Settled:
        """Resolve every embedding a spec asks for, at every point of its axes and in every row.

        Raises:
            UnknownName, EmbeddingRefused, InvalidField: as `settle`.
        """
        self._refuse_clip_skip(spec)
        if spec.pack is not None:
            _refuse_changing(spec)
        asked = _with_uses(self, spec)
        first = _Settlement(self, asked, data)
        first.check_all()
        final = asked.model_copy(update={"without": tuple(sorted(first.unwanted))})
        last = first
        if first.unwanted:
            last = _Settlement(self, final, data, first.dropped)
            last.check_all()
        _refuse_idle_strength(final)
        return Settled(
            final if final.is_sweep else final.drawn(), tuple(last.used.values()), tuple(last.dropped.values())
        )

    def says_nothing(self, prompt: str) -> bool:
        """Tell whether in a short prompt no name stands, no word looks like one, and there is no syntax.

        False says that it has to be read properly. Pieces are CLIP's own: what one comes to does not depend on the others.
        """
        if len(prompt) > PLAIN_LENGTH or not prompt.isascii() or _MARKS.search(prompt):
            return False
        unknown = set(_WORDS.findall(prompt)) - self._harmless
        if any(_CODE_LIKE.search(word) and _within_two_edits(word.lower(), self._names) for word in unknown):
            return False
        if len(self._harmless) < MAX_WORDS:
            self._harmless |= unknown
        return not self.matcher.stands_in(
            [token for piece in _PIECES.findall(prompt.lower()) for token in self._ids(piece)]
        )

    def _ids(self, piece: str) -> list[int]:
        """Return the tokens of one piece, kept for the next text."""
        found = self._pieces.get(piece)
        if found is None:
            found = self.tokenizer.encode(piece)
            if len(self._pieces) < MAX_WORDS:
                self._pieces[piece] = found
        return found

    def _refuse_clip_skip(self, spec: JobSpec) -> None:
        swept = [int(value) for axis in spec.swept if axis.field == "clip_skip" for value in axis.items]
        swept += [int(point["clip_skip"]) for point in spec.include if "clip_skip" in point]
        self.refuse_clip_skip(max((spec.clip_skip, *swept)))

    def refuse_clip_skip(self, value: int) -> None:
        """Refuse to skip more layers than the encoder has.

        Raises:
            InvalidField: it is more.
        """
        if value > self.checkpoint.layers:
            raise InvalidField("clip_skip", f"model {self.checkpoint.name!r} takes 1 to {self.checkpoint.layers}")

    def applied_in(self, job: JobSpec) -> dict[str, list[str]]:
        """Return, by name in lower case, the prompts of a job without axes in which embeddings stand."""
        where: dict[str, list[str]] = {}
        for field, prompt in job.prompts:
            for record in self.mentions(prompt, field, job):
                where.setdefault(record.name.lower(), []).append(field)
        return where

    def mentions(self, prompt: str, field: str, job: JobSpec) -> list[EmbeddingRecord]:
        """Return the embeddings that one prompt of a job means, through everything it goes through."""
        found: list[EmbeddingRecord] = []
        for text in _segments(prompt, field, job):
            for item in self.matcher.split(text):
                if isinstance(item, Mention) and item.embedding not in found:
                    found.append(item.embedding)
        return found


def _widths(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{encoder} {width}" for encoder, width in sorted(widths.items()))


def _with_uses(contract: Contract, spec: JobSpec) -> JobSpec:
    """Return the spec without comments, and with what `embeddings` asks for as explicit requests in its prompts."""

    def written(field: str, text: str) -> str:
        text = strip_comments(text)
        if field.startswith("replace:"):
            return text
        there = {plain_name(name).lower() for name in requested(text)}
        there |= {record.name.lower() for record in contract.mentions(bare(text), field, spec)}
        for use in spec.embeddings:
            if _side_of(use, contract) == _side(field) and plain_name(use.name).lower() not in there:
                text = with_word(text, f"<{use.name}>")
                there.add(plain_name(use.name).lower())
        return text

    return _each_text(spec, written)


def _side_of(use: EmbeddingUse, contract: Contract) -> Side:
    """Return which prompt an embedding belongs in: the one asked for, else the one its kind is for."""
    if use.side is not None:
        return use.side
    try:
        return "negative" if contract.find(use.name).kind == "Negative" else "positive"
    except UnknownName:
        return "positive"


class _Settlement:
    """One job on its way through the contract: what it uses, what it does without, which words are to go."""

    def __init__(
        self, contract: Contract, spec: JobSpec, data: Data, dropped: Mapping[str, Dropped] | None = None
    ) -> None:
        self._contract, self._spec, self._data = contract, spec, data
        self.used: dict[str, EmbeddingRecord] = {}
        self.dropped: dict[str, Dropped] = dict(dropped or {})
        self.unwanted: set[str] = set(spec.without)
        self._versions: dict[str, EmbeddingRecord] = {}
        self._seen: set[tuple[object, ...]] = set()
        self._changes = any("[" in text for _, text in _all_texts(spec))

    def check_all(self) -> None:
        """Check what every point of the axes and every row asks for."""
        for point in _points(self._spec):
            self._check_point(point)
        if self._spec.rows is not None:
            self._check_rows(self._spec.rows.total)

    def _check_rows(self, total: int) -> None:
        """Check every row at every point, or, where that is too much, at the first: the rest is checked when claimed."""
        points = (
            list(_points(self._spec)) if self._spec.text_variants <= MAX_CHECKED else [next(iter(_points(self._spec)))]
        )
        for number in range(total):
            try:
                for point in points:
                    self._check_point(self._data.row(number) | point)
            except InvalidField as error:
                raise InvalidField(error.field, error.reason, number + 1) from error
            except UsageError as error:
                raise InvalidField("prompt", str(error), number + 1) from error

    def _check_point(self, point: Point) -> None:
        """Check the prompts of one point, in every text its templates may come to."""
        if self._is_plain(point):
            return
        self._contract.refuse_clip_skip(int(point.get("clip_skip", 1)))
        nodes = self._spec.templates(point, self._data)
        made = [[(field, text) for text in texts(node, MAX_CHECKED)] for field, node in nodes.items()]
        for number in range(max(map(len, made), default=1)):
            chosen = dict(pairs[min(number, len(pairs) - 1)] for pairs in made)
            requests = self._spec.requested_at(point, chosen)
            asked = {field: self._requests(field, text) for field, text in requests.prompts}
            job = self._spec.at(point, chosen)
            for field, prompt in job.prompts:
                key = field, prompt, job.steps, job.sampler
                if key not in self._seen:
                    self._seen.add(key)
                    self._check(job, field, prompt, asked[field])

    def _is_plain(self, point: Point) -> bool:
        """Tell whether a point changes nothing but words of which none can mean an embedding; seen at a glance."""
        swept = point.keys() & {"prompt", "negative_prompt"}
        if self._changes and point.keys() & {"steps", "sampler"}:
            return False
        if self._spec.rows is None or self._spec.dynamic != "off" or not point.keys() <= PLAIN_FIELDS or not self._seen:
            return False
        return all(self._contract.says_nothing(str(point[field])) for field in swept)

    def _requests(self, field: str, text: str) -> list[EmbeddingRecord]:
        """Return what a text asks for explicitly and may have."""
        network = _EXTRA_NETWORK.search(text)
        if network and "ignore_extra_networks" not in self._spec.compat:
            raise InvalidField(field, f"{network.group()!r}: {network.group(1)} networks are not supported; remove it")
        found = (self._asked(name, field) for name in requested(text))
        return [record for record in found if record is not None]

    def _asked(self, name: str, field: str) -> EmbeddingRecord | None:
        """Return what an explicit request names; None if the job does without."""
        try:
            record = self._contract.find(name)
        except UnknownName as error:
            self._do_without(f"<{plain_name(name)}>", field, error)
            return None
        reason = self._contract.why_not(record, explicit=True)
        if reason is not None:
            self._do_without(f"<{plain_name(name)}>", field, EmbeddingRefused(record.name, reason))
            return None
        before = self._versions.setdefault(record.name.lower(), record)
        if before.content_id != record.content_id:
            raise EmbeddingRefused(record.name, "the job asks for two versions of it; one job takes one")
        return record

    def _check(self, job: JobSpec, field: str, prompt: str, explicit: Sequence[EmbeddingRecord]) -> None:
        """Note what one prompt uses, and refuse what it should not ask for."""
        contract = self._contract
        _refuse_too_much(prompt, field, job, (contract.tokenizer, contract.matcher))
        mentioned = contract.mentions(prompt, field, job)
        names = {record.name.lower() for record in mentioned}
        lost = next((record for record in explicit if record.name.lower() not in names), None)
        if lost is not None:
            raise EmbeddingRefused(lost.name, f"its name is not a word of its own in {field}")
        for record in mentioned:
            reason = contract.why_not(record)
            if reason is None:
                self.used[record.name.lower()] = self._versions.get(record.name.lower(), record)
            else:
                self._do_without(record.name, field, EmbeddingRefused(record.name, reason))
        for word, near in _near_misses(prompt, field, contract, job):
            self._do_without(word, field, UnknownName("embedding", word, near))

    def _do_without(self, word: str, field: str, error: UsageError) -> None:
        """Refuse the job, unless it may do without; a word in angle brackets is an explicit request."""
        if self._spec.on_missing == "fail":
            raise error
        name = word.strip("<>")
        self.dropped.setdefault(f"{field}/{name.lower()}", Dropped(name=name, field=field, reason=str(error)))
        if self._spec.on_missing == "drop":
            self.unwanted.add(word.lower())


def _each_text(spec: JobSpec, change: Callable[[str, str], str]) -> JobSpec:
    """Return the spec with every text that its prompts and axes hold changed; `change` takes a field and its text."""
    changed = spec.with_prompts({field: change(field, text) for field, text in spec.prompts})

    def of_axes(axes: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(
            axis.model_copy(update={"values": tuple(change(axis.field, str(value)) for value in axis.items)})
            if axis.is_text and axis.kind != "strength"
            else axis
            for axis in axes
        )

    include = tuple(
        {field: change(field, str(value)) if field.endswith("prompt") else value for field, value in point.items()}
        for point in spec.include
    )
    return changed.model_copy(update={"axes": of_axes(spec.axes), "zipped": of_axes(spec.zipped), "include": include})


def _points(spec: JobSpec) -> Iterator[Point]:
    """Yield every point at which prompts say something else; with too many of them, each value beside the others' first.

    Where prompts change while a picture is drawn, steps and sampler decide what is reached.
    """
    changing = any("[" in text for _, text in _all_texts(spec))
    kept = {a.field for a in spec.swept if a.is_text or (changing and a.field in ("steps", "sampler"))}
    first = {axis.field: axis.items[0] for axis in spec.swept}
    columns = [column for column in spec.grid.columns if kept & set(column.fields)]
    if math.prod(len(column) for column in columns) <= MAX_CHECKED:
        for rows in product(*(range(len(column)) for column in columns)):
            point = dict(first)
            for column, row in zip(columns, rows, strict=True):
                point |= column.at(row)
            yield point
    else:
        for column in columns:
            for row in range(len(column)):
                yield first | column.at(row)
    yield from spec.include


def _all_texts(spec: JobSpec) -> Iterator[tuple[str, str]]:
    yield from spec.prompts
    for axis in spec.swept:
        if axis.is_text and axis.kind != "strength":
            yield from ((axis.field, str(value)) for value in axis.items)
    for point in spec.include:
        yield from ((field, str(value)) for field, value in point.items() if field.endswith("prompt"))


def _refuse_idle_strength(spec: JobSpec) -> None:
    """Refuse a strength that no prompt has a use for.

    Raises:
        InvalidField: the name stands nowhere.
    """
    for axis in spec.swept:
        texts = (bare(text) for _, text in _all_texts(spec))
        if axis.kind == "strength" and not any(standing(axis.subject).search(text) for text in texts):
            raise InvalidField("axes", f"{axis.field}: {axis.subject!r} stands in none of the prompts")


def combination_misses(image: ImageSpec, lock: Lock, contract: Contract) -> list[str]:
    """Return the embeddings that one image of a large sweep means and its job's lock does not hold.

    Sweeps of more than MAX_CHECKED prompts are checked value by value when submitted, and image by image when claimed,
    with the names there were when the job was submitted.
    """
    locked = {record.name.lower() for record in lock.embeddings} | {dropped.name.lower() for dropped in lock.dropped}
    return [name for name in contract.applied_in(image.job) if name not in locked]


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


def _refuse_changing(spec: JobSpec) -> None:
    """Refuse to pack a prompt that says different things at different steps, or several at once.

    Raises:
        InvalidField: it does.
    """
    parts = split_and(spec.prompt)
    if len(parts) > 1 or parts[0][1] != 1 or len(list(_texts(spec.prompt, "prompt", spec))) > 1:
        raise InvalidField("prompt", "cannot be packed: it uses AND, or changes while the picture is drawn")


def _side(field: str) -> Side:
    return "negative" if _is_negative(field) else "positive"


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


def with_word(prompt: str, word: str) -> str:
    """Add a word at the end of a prompt, or in front where the end belongs to a weight, an AND or an open bracket."""
    if not prompt.strip():
        return word
    after = f"{prompt}, {word}"
    plain = split_and(after) == [(after, 1.0)] and split_and(prompt) == [(prompt.rstrip(), 1.0)]
    return after if plain and parse_attention(after)[-1].weight == 1 else f"{word}, {prompt}"


def _near_misses(prompt: str, field: str, contract: Contract, spec: JobSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield words that look like misspelt names, with the names they look like."""
    words: dict[str, None] = {}
    for segment in _segments(prompt, field, spec):
        text = segment
        mentioned = {item.embedding.name for item in contract.matcher.split(segment) if isinstance(item, Mention)}
        for name in sorted(mentioned, key=len, reverse=True):  # a short name may stand in a long one
            text = _without(name, text)
        words |= dict.fromkeys(word for word in _WORDS.findall(text) if _CODE_LIKE.search(word))
    if words:
        names = [name for name, record in contract.known.items() if record.state == "active"]
        for word in words:
            near = _within_two_edits(word.lower(), names)
            if near:
                yield word, tuple(contract.known[name].name for name in near)


def _without(name: str, text: str) -> str:
    """Take a name out of a text as prompts may write it: in any case, with or without spaces between its parts.

    Where it stands as a word, words around it that hold the same letters are left alone.
    """
    written = r"\s*".join(re.escape(c) for c in name if not c.isspace())
    found, count = re.subn(rf"(?<!\w){written}(?!\w)", " ", text, flags=re.IGNORECASE)
    return found if count else re.sub(written, " ", text, flags=re.IGNORECASE)


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
