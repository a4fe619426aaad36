"""Lay a prompt out in chunks of 75 tokens between start and end, as A1111 does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from latentfarm_shared.prompts.attention import Segment, parse_attention
from latentfarm_shared.prompts.matching import Mention, NameMatcher
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import EmbeddingRecord

CHUNK = 75
COMMA_BACKTRACK = 20
FILLER = 0


@dataclass(frozen=True)
class Placement:
    """Where rows of an embedding go: rows `first_row` and on of `embedding` from `position` (start token is 0) on."""

    position: int
    embedding: EmbeddingRecord
    first_row: int
    rows: int


@dataclass(frozen=True)
class Chunk:
    """One call of the text encoder: `tokens` and `weights` are 77 long; the end token stands after `length` tokens."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    placements: tuple[Placement, ...]
    length: int = CHUNK

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that decides how it is encoded."""
        placed = tuple((p.position, p.embedding.content_id, p.first_row, p.rows) for p in self.placements)
        return self.tokens, self.weights, placed


@dataclass(frozen=True)
class Reading:
    """How a prompt's text is read: whether attention is, and which of A1111's faults are reproduced."""

    attention: bool = True
    break_as_word: bool = False
    leave_vectors_behind: bool = False

    def segments(self, text: str) -> tuple[Segment, ...]:
        """Split a text into segments of one weight each."""
        return parse_attention(text, break_as_word=self.break_as_word) if self.attention else (Segment(text),)


@dataclass
class _Open:
    """The chunk being filled. `atoms` maps a start index to the placement there."""

    tokens: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    placements: list[tuple[int, EmbeddingRecord, int, int]] = field(default_factory=list)
    last_comma: int = -1

    @property
    def room(self) -> int:
        return CHUNK - len(self.tokens)

    def add_token(self, token: int, weight: float) -> None:
        self.tokens.append(token)
        self.weights.append(weight)

    def add_rows(self, embedding: EmbeddingRecord, first: int, rows: int, weight: float) -> None:
        self.placements.append((len(self.tokens), embedding, first, rows))
        self.tokens += [FILLER] * rows
        self.weights += [weight] * rows

    def split_off(self, at: int, *, leave_vectors: bool) -> _Open:
        """Move everything from index `at` on into a new chunk, embeddings with their rows (A1111 leaves those)."""
        rest = _Open(self.tokens[at:], self.weights[at:])
        if not leave_vectors:
            rest.placements = [(start - at, e, first, rows) for start, e, first, rows in self.placements if start >= at]
            self.placements = [placement for placement in self.placements if placement[0] < at]
        del self.tokens[at:], self.weights[at:]
        return rest


PLAIN_READING = Reading()


def chunk_prompt(
    text: str, tokenizer: ClipTokenizer, matcher: NameMatcher, reading: Reading = PLAIN_READING
) -> tuple[Chunk, ...]:
    """Lay out one text in one or more chunks, padded with the end token.

    An embedding is never torn unless it is longer than a chunk, in which case it starts a chunk of its own.
    When a chunk is full, what follows the last comma within 20 tokens moves on, embeddings with it (A1111 leaves
    their vectors behind, a known fault).
    """
    layout = _Layout(tokenizer, reading)
    for segment in reading.segments(text):
        if segment.is_break:
            layout.close()
            continue
        for item in matcher.split(segment.text):
            if isinstance(item, Mention):
                layout.embedding(item.embedding, segment.weight)
            else:
                layout.token(item.token, segment.weight)
    return tuple(_seal(part, tokenizer) for part in layout.finish())


def chunk_texts(
    texts: Sequence[str], tokenizer: ClipTokenizer, matcher: NameMatcher, reading: Reading = PLAIN_READING
) -> tuple[tuple[Chunk, ...], ...]:
    """Lay out the texts of one timetable, all with as many chunks as the longest, the rest empty."""
    laid = [chunk_prompt(text, tokenizer, matcher, reading) for text in texts]
    empty = _seal(_Open(), tokenizer)
    longest = max(len(chunks) for chunks in laid)
    return tuple(chunks + (empty,) * (longest - len(chunks)) for chunks in laid)


class _Layout:
    def __init__(self, tokenizer: ClipTokenizer, reading: Reading) -> None:
        self._comma, self._leave_vectors = tokenizer.comma_id, reading.leave_vectors_behind
        self._done: list[_Open] = []
        self._open = _Open()

    def close(self) -> None:
        self._done.append(self._open)
        self._open = _Open()

    def token(self, token: int, weight: float) -> None:
        if token == self._comma:
            if self._open.room == 0:
                self.close()
            self._open.add_token(token, weight)
            self._open.last_comma = len(self._open.tokens)
            return
        if self._open.room == 0:
            comma = self._open.last_comma
            backtrack = comma >= 0 and len(self._open.tokens) - comma <= COMMA_BACKTRACK
            rest = self._open.split_off(comma, leave_vectors=self._leave_vectors) if backtrack else _Open()
            self._done.append(self._open)
            self._open = rest
        self._open.add_token(token, weight)

    def embedding(self, embedding: EmbeddingRecord, weight: float) -> None:
        if embedding.vectors > self._open.room and self._open.tokens:
            self.close()
        first = 0
        while first < embedding.vectors:
            if self._open.room == 0:
                self.close()
            rows = min(self._open.room, embedding.vectors - first)
            self._open.add_rows(embedding, first, rows, weight)
            first += rows

    def finish(self) -> list[_Open]:
        if self._open.tokens or not self._done:
            self.close()
        return self._done


def _seal(part: _Open, tokenizer: ClipTokenizer) -> Chunk:
    padding = CHUNK - len(part.tokens) + 1
    return Chunk(
        tokens=(tokenizer.start_id, *part.tokens, *[tokenizer.end_id] * padding),
        weights=(1.0, *part.weights, *[1.0] * padding),
        placements=tuple(Placement(start + 1, e, first, rows) for start, e, first, rows in part.placements),
        length=len(part.tokens),
    )
