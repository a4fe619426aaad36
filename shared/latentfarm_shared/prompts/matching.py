"""Find embedding names in token ids, as A1111 does: on tokens, case-insensitive, the longest name first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import EmbeddingRecord


@dataclass(frozen=True)
class Word:
    """One plain token of a segment."""

    token: int


@dataclass(frozen=True)
class Mention:
    """An embedding found in a segment, standing for `vectors` tokens."""

    embedding: EmbeddingRecord


class NameMatcher:
    """Matches the names of one job's lock. Two names that tokenize alike: the first given wins."""

    def __init__(self, tokenizer: ClipTokenizer, embeddings: Iterable[EmbeddingRecord]) -> None:
        """Index the names by their first token, longest first."""
        self._tokenizer = tokenizer
        self._by_first: dict[int, list[tuple[list[int], EmbeddingRecord]]] = {}
        for embedding in embeddings:
            ids = tokenizer.encode(embedding.name)
            if ids:
                self._by_first.setdefault(ids[0], []).append((ids, embedding))
        for candidates in self._by_first.values():
            candidates.sort(key=lambda item: -len(item[0]))

    def stands_in(self, ids: list[int]) -> bool:
        """Tell whether a name stands anywhere in a text's tokens."""
        return any(first in self._by_first and self._longest(ids, at) is not None for at, first in enumerate(ids))

    def split(self, text: str) -> list[Word | Mention]:
        """Tokenize a segment's text and put a mention in place of every name in it."""
        ids = self._tokenizer.encode(text)
        found: list[Word | Mention] = []
        at = 0
        while at < len(ids):
            match = self._longest(ids, at)
            if match is None:
                found.append(Word(ids[at]))
                at += 1
            else:
                found.append(Mention(match[1]))
                at += len(match[0])
        return found

    def _longest(self, ids: list[int], at: int) -> tuple[list[int], EmbeddingRecord] | None:
        for candidate in self._by_first.get(ids[at], ()):
            if ids[at : at + len(candidate[0])] == candidate[0]:
                return candidate
        return None
