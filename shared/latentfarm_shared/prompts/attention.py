"""A1111's attention syntax: `(x)`, `[x]`, `(x:1.2)`, escapes and `BREAK`, as weighted segments of text."""

from __future__ import annotations

import re
from dataclasses import dataclass

UP, DOWN = 1.1, 1 / 1.1
MAX_OPEN = 100  # of one kind at once; further ones are text
_OPENS = {")": "(", "]": "["}

_TOKEN = re.compile(
    r"""
    \\(?P<escaped>.)                                    # \( \) \[ \] \\ and any other escaped character
  | (?P<open>[(\[])
  | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)       # the end of (text:1.2)
  | (?P<close>[)\]])
  | (?P<text>[^\\()\[\]:]+)
  | (?P<other>.)                                        # a colon that ends no weight, a lone backslash
    """,
    re.VERBOSE | re.DOTALL,
)
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class Segment:
    """A run of text under one weight; `is_break` marks the end of a chunk and has no text."""

    text: str
    weight: float = 1.0
    is_break: bool = False


def parse_attention(prompt: str, *, break_as_word: bool = False) -> tuple[Segment, ...]:
    """Split a prompt into segments of one weight each.

    Brackets nest and multiply; an unclosed one applies to the end of the prompt, a stray closer is text. Behaviour
    of A1111 v1.10.1, except that `BREAK` counts inside brackets too. A1111 encodes it there as a word of negative
    weight, which `break_as_word` does as well.
    """
    pieces: list[_Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for match in _TOKEN.finditer(prompt):
        kind, value = match.lastgroup, match.group(match.lastgroup or 0)
        if kind == "open" and len(opened[value]) < MAX_OPEN:
            opened[value].append(len(pieces))
        elif kind == "weight" and opened["("]:
            _scale(pieces, opened["("].pop(), float(value))
        elif kind == "close" and opened[_OPENS[value]]:
            _scale(pieces, opened[_OPENS[value]].pop(), UP if value == ")" else DOWN)
        elif kind == "text":
            pieces += _split_breaks(value)
        else:
            pieces.append(_Piece(match.group() if kind == "weight" else value))
    for bracket, starts in opened.items():
        for start in starts:
            _scale(pieces, start, UP if bracket == "(" else DOWN)
    if break_as_word:
        pieces = [_as_word(piece) for piece in pieces]
    return _merge(pieces) or (Segment(""),)


@dataclass
class _Piece:
    """A segment in the making."""

    text: str
    weight: float = 1.0
    is_break: bool = False


def _as_word(piece: _Piece) -> _Piece:
    return _Piece("BREAK", -piece.weight) if piece.is_break and piece.weight != 1.0 else piece


def _scale(pieces: list[_Piece], start: int, factor: float) -> None:
    for index in range(start, len(pieces)):
        pieces[index].weight *= factor


def _split_breaks(text: str) -> list[_Piece]:
    first, *rest = _BREAK.split(text)
    if not rest:
        return [_Piece(text)]
    pieces = [_Piece(first.rstrip())]
    for part in rest[:-1]:
        pieces += [_Piece("", is_break=True), _Piece(part.strip())]
    return [*pieces, _Piece("", is_break=True), _Piece(rest[-1].lstrip())]


def _merge(pieces: list[_Piece]) -> tuple[Segment, ...]:
    """Join neighbours of one weight and drop what is empty."""
    merged: list[_Piece] = []
    for piece in pieces:
        if not piece.is_break and not piece.text:
            continue
        last = merged[-1] if merged else None
        if last and not last.is_break and not piece.is_break and last.weight == piece.weight:
            last.text += piece.text
        else:
            merged.append(piece)
    return tuple(Segment(piece.text, piece.weight, piece.is_break) for piece in merged)
