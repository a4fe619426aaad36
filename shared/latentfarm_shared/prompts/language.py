"""A1111's whole prompt language, from the text a user wrote to the texts an encoder gets.

In A1111's order: comments go, extra networks go, `AND` splits, prompt editing makes a timetable; attention, `BREAK` and
chunks come after, in `attention` and `chunks`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from latentfarm_shared.prompts.editing import Entry, Timeline, timetable

_EXTRA_NETWORK = re.compile(r"<\w+:[^>]*>")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))$")


@dataclass(frozen=True)
class Part:
    """One side of an `AND`, with its weight and its texts over time."""

    weight: float
    entries: tuple[Entry, ...]


def strip_comments(prompt: str) -> str:
    """Remove what follows a `#` to the end of its line; a line of nothing else goes as a whole."""
    if "#" not in prompt:
        return prompt
    lines = ((line, line.partition("#")) for line in prompt.split("\n"))
    return "\n".join(before for line, (before, mark, _) in lines if before.strip() or not mark)


def strip_extra_networks(prompt: str) -> str:
    """Remove `<lora:…>` and its kind; `<name>` without a colon is text."""
    return _EXTRA_NETWORK.sub("", prompt)


def split_and(prompt: str) -> list[tuple[str, float]]:
    """Split on the upper-case word `AND`; each part may end in `:weight`, which a prompt without `AND` may too."""
    parts = []
    for piece in _AND.split(prompt):
        text = piece.rstrip()
        match = _WEIGHT.search(text)
        parts.append((text[: match.start()].rstrip(), float(match[1])) if match else (text, 1.0))
    return parts


def parse_positive(prompt: str, timeline: Timeline) -> tuple[Part, ...]:
    """Read a prompt; several parts if it says `AND`."""
    text = strip_extra_networks(strip_comments(prompt))
    return tuple(Part(weight, timetable(part, timeline)) for part, weight in split_and(text))


def parse_negative(prompt: str, timeline: Timeline) -> tuple[Part, ...]:
    """Read a negative prompt, in which `AND` is a word. Returns one part."""
    return (Part(1.0, timetable(strip_extra_networks(strip_comments(prompt)), timeline)),)
