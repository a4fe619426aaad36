"""A1111's attention syntax: `(x)`, `[x]`, `(x:1.2)`, escapes and `BREAK`, as weighted segments of text."""

from __future__ import annotations

import re
from dataclasses import dataclass

UP, DOWN = 1.1, 1 / 1.1

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
_BREAK = re.compile(r"\s*\bBREAK\b\s*", re.DOTALL)


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
    pieces: list[Segment] = []
    opened: list[tuple[str, int]] = []
    for match in _TOKEN.finditer(prompt):
        kind, value = match.lastgroup, match.group(match.lastgroup or 0)
        if kind == "open":
            opened.append((value, len(pieces)))
        elif kind == "weight" and opened and opened[-1][0] == "(":
            _scale(pieces, opened.pop()[1], float(value))
        elif kind == "close" and opened and opened[-1][0] == {")": "(", "]": "["}[value]:
            _scale(pieces, opened.pop()[1], UP if value == ")" else DOWN)
        elif kind == "text":
            pieces += _split_breaks(value)
        else:
            pieces.append(Segment(match.group() if kind == "weight" else value))
    for bracket, start in reversed(opened):
        _scale(pieces, start, UP if bracket == "(" else DOWN)
    if break_as_word:
        pieces = [_as_word(piece) for piece in pieces]
    return _merge(pieces) or (Segment(""),)


def _as_word(piece: Segment) -> Segment:
    return Segment("BREAK", -piece.weight) if piece.is_break and piece.weight != 1.0 else piece


def _scale(pieces: list[Segment], start: int, factor: float) -> None:
    for index in range(start, len(pieces)):
        piece = pieces[index]
        pieces[index] = Segment(piece.text, piece.weight * factor, piece.is_break)


def _split_breaks(text: str) -> list[Segment]:
    parts = _BREAK.split(text)
    pieces = [Segment(parts[0])]
    for part in parts[1:]:
        pieces += [Segment("", is_break=True), Segment(part)]
    return pieces


def _merge(pieces: list[Segment]) -> tuple[Segment, ...]:
    merged: list[Segment] = []
    for piece in pieces:
        if not piece.is_break and not piece.text:
            continue
        last = merged[-1] if merged else None
        if last and not last.is_break and not piece.is_break and last.weight == piece.weight:
            merged[-1] = Segment(last.text + piece.text, last.weight)
        else:
            merged.append(piece)
    return tuple(merged)
