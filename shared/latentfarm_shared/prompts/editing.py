"""A1111's prompt editing `[from:to:when]`, `[to:when]`, `[from::when]` and alternation `[a|b]`, as a timetable of texts.

A bracket that is none of these stays as it is written, for the attention parser to read. Behaviour of A1111 v1.10.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_DEPTH = 100  # brackets in brackets; deeper ones are text

_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
_NUMBER = re.compile(r"\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*")


@dataclass(frozen=True)
class Timeline:
    """What numbers in a prompt mean.

    `steps` are those of the pass the timetable is for, counted as calls of the model. In a hires pass, `before` are the
    steps of the first pass: whole numbers count on from it, and fractions from 1.0 to 2.0 address the hires pass. `old`
    is A1111's reading before v1.6.0: a number below 1 is a fraction, and a hires pass reuses the first one's numbers.
    """

    steps: int
    before: int | None = None
    old: bool = False

    @property
    def length(self) -> int:
        """How many steps the timetable covers."""
        return self.before if self.old and self.before is not None else self.steps

    def when(self, number: str) -> int:
        """Return the last step that shows what stands before the change."""
        value = float(number)
        if self.old:
            value = value * self.length if value < 1 else value
        elif "." in number:
            value = (value - (self.before is not None)) * self.steps
        else:
            value -= self.before or 0
        return int(max(min(value, self.length), -1))


@dataclass(frozen=True)
class _Edit:
    before: _Prompt
    after: _Prompt
    number: str


@dataclass(frozen=True)
class _Alternation:
    options: tuple[_Prompt, ...]


_Prompt = tuple["str | _Edit | _Alternation", ...]


@dataclass(frozen=True)
class Entry:
    """A text and the last step it is shown at; steps count from 1."""

    end_at_step: int
    text: str


def timetable(prompt: str, timeline: Timeline) -> tuple[Entry, ...]:
    """Return the texts a prompt goes through; one entry if it never changes."""
    tree = _parse(prompt)
    ends = sorted({timeline.length, *_ends(tree, timeline)})
    return tuple(Entry(end, _at(tree, end, timeline)) for end in ends)


def _ends(tree: _Prompt, timeline: Timeline) -> Iterator[int]:
    """Yield every step after which a text changes."""
    for item in tree:
        if isinstance(item, _Edit):
            when = timeline.when(item.number)
            if when >= 1:
                yield when
            yield from _ends(item.before, timeline)
            yield from _ends(item.after, timeline)
        elif isinstance(item, _Alternation):
            yield from range(1, timeline.length + 1)


def _at(tree: _Prompt, step: int, timeline: Timeline) -> str:
    """Return the text at a step."""
    text = ""
    for item in tree:
        if isinstance(item, str):
            text += item
        elif isinstance(item, _Edit):
            text += _at(item.before if step <= timeline.when(item.number) else item.after, step, timeline)
        else:
            text += _at(item.options[(step - 1) % len(item.options)], step, timeline)
    return text


def _parse(prompt: str) -> _Prompt:
    """Read a prompt; a bracket that does not close or makes no sense is text."""
    if "[" not in prompt:
        return (prompt,)
    reader = _Reader(prompt)
    items: list[str | _Edit | _Alternation] = []
    while reader.at < len(prompt):
        start = reader.at
        found = reader.item()
        if found is None:
            reader.at = start + 1
            found = (prompt[start],)
        items += found
    return tuple(items)


class _Reader:
    """Reads a prompt from `at` on; a method that finds nothing returns None and may leave `at` anywhere."""

    def __init__(self, prompt: str) -> None:
        self.prompt, self.at = prompt, 0
        self._depth = 0
        self._failed: set[int] = set()  # where no bracket could be read, so that none is tried twice

    def item(self) -> _Prompt | None:
        """Read a run of text or one bracket."""
        start = self.at
        if start in self._failed or self._depth > MAX_DEPTH:
            return None
        char = self.prompt[start]
        if char in "([":
            self._depth += 1
            found = self._round() if char == "(" else self._square()
            self._depth -= 1
        else:
            match = _PLAIN.match(self.prompt, start)
            self.at = match.end() if match else start
            found = (match.group(),) if match else None
        if found is None:
            self._failed.add(start)
        return found

    def _prompt(self) -> _Prompt | None:
        """Read items up to a character that ends a part of a bracket; None at the end of the text."""
        items: list[str | _Edit | _Alternation] = []
        while self.at < len(self.prompt):
            if self.prompt[self.at] in ":|])":
                return tuple(items)
            found = self.item()
            if found is None:
                return None
            items += found
        return None

    def _round(self) -> _Prompt | None:
        """Read `(x)` or `(x:y)`."""
        parts, separator = self._parts(")")
        if not parts or separator == "|" or len(parts) > 2:
            return None
        return "(", *parts[0], *((":", *parts[1]) if len(parts) == 2 else ()), ")"

    def _square(self) -> _Prompt | None:
        """Read `[x]`, an edit or an alternation."""
        parts, separator = self._parts("]")
        if not parts:
            return None
        if separator == "|":
            return (_Alternation(tuple(parts)),)
        if len(parts) == 1:
            return "[", *parts[0], "]"
        number = "".join(item for item in parts[-1] if isinstance(item, str))
        if len(parts) > 3 or len(parts[-1]) != 1 or not _NUMBER.fullmatch(number):
            return None
        before: _Prompt = parts[0] if len(parts) == 3 else ()
        return (_Edit(before, parts[-2], number.strip()),)

    def _parts(self, end: str) -> tuple[list[_Prompt], str]:
        """Read prompts up to the closing bracket, with one kind of separator; no prompts if that cannot be."""
        self.at += 1
        parts: list[_Prompt] = []
        separator = ""
        while True:
            part = self._prompt()
            if part is None:
                return [], separator
            parts.append(part)
            char = self.prompt[self.at]
            self.at += 1
            if char == end:
                return parts, separator
            if char not in ":|" or char != (separator or char):
                return [], separator
            separator = char
