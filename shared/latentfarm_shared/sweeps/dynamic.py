"""Dynamic prompts: `{a|b}`, weights `{3::a|b}`, several of them `{2$$a|b|c}` or `{1-2$$ and $$a|b|c}`, wildcards `__name__`.

The syntax is that of the sd-dynamic-prompts extension. A template is parsed once; its texts are numbered, so that any one
can be made without the others, and drawn at random from a seed. A backslash before a brace or bar makes it plain.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

MAX_DEPTH = 8
MAX_NODES = 200_000
MAX_TEXT = 200_000
MAX_SETS = 100_000
_WILDCARD = re.compile(r"__([^\s_](?:[^\n{}|,]{0,100}?[^\s_])??)__")
_WEIGHT = re.compile(r"\s*(\d+(?:\.\d+)?)::")
_COUNT = re.compile(r"\s*(\d{1,3})?(-)?(\d{1,3})?\$\$")
Wildcards = Callable[[str], Sequence[str]]


class Node:
    """Part of a template: how many texts it stands for, which is which, and one at random."""

    count: int = 1
    longest: int = 0
    """How many characters its longest text may have."""
    choices: int = 1
    """How many texts, by `nth`, show every choice at least once."""

    def at(self, _number: int) -> str:
        """Return one of the texts by its number."""
        raise NotImplementedError

    def draw(self, _source: random.Random) -> str:
        """Return one of the texts at random."""
        raise NotImplementedError

    def nth(self, _number: int) -> str:
        """Return a text in which every choice takes its option of this number, counting round."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Node):
    """Plain text."""

    text: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "longest", len(self.text))

    def at(self, _number: int) -> str:
        """Return the text."""
        return self.text

    def draw(self, _source: random.Random) -> str:
        """Return the text."""
        return self.text

    def nth(self, _number: int) -> str:
        """Return the text."""
        return self.text


class Run(Node):
    """Parts one after the other; the last counts fastest."""

    def __init__(self, parts: Sequence[Node]) -> None:
        self.parts = tuple(parts)
        self.count = math.prod(part.count for part in parts)
        self.longest = sum(part.longest for part in parts)
        self.choices = max((part.choices for part in parts), default=1)

    def at(self, number: int) -> str:
        """Return the parts' texts joined."""
        return "".join(self.texts_at(number))

    def texts_at(self, number: int) -> list[str]:
        """Return the parts' texts."""
        found = []
        for part in reversed(self.parts):
            number, place = divmod(number, part.count)
            found.append(part.at(place))
        return found[::-1]

    def draw(self, source: random.Random) -> str:
        """Draw every part."""
        return "".join(part.draw(source) for part in self.parts)

    def nth(self, number: int) -> str:
        """Return every part's."""
        return "".join(part.nth(number) for part in self.parts)


class Choice(Node):
    """`least` to `most` of some options, each with a weight, joined by a separator, in the order they stand."""

    def __init__(
        self, options: Sequence[Node], weights: Sequence[float], least: int = 1, most: int = 1, separator: str = ", "
    ) -> None:
        self.options, self.weights, self.separator = tuple(options), tuple(weights), separator
        self.least, self.most = min(least, len(options)), min(most, len(options))
        if not all(map(math.isfinite, weights)) or sum(weight > 0 for weight in weights) < self.most:
            raise ValueError(f"{self.most} options should have a weight above 0")
        self._sets = [
            chosen for size in range(self.least, self.most + 1) for chosen in combinations(range(len(options)), size)
        ]
        self._sizes = [math.prod(self.options[place].count for place in chosen) for chosen in self._sets]
        self.count = sum(self._sizes)
        self.longest = self.most * (max(option.longest for option in options) + len(separator))
        self.choices = len(options) * max(option.choices for option in options)

    def at(self, number: int) -> str:
        """Return the text of one set of options."""
        for chosen, size in zip(self._sets, self._sizes, strict=True):
            if number < size:
                return self.separator.join(Run([self.options[p] for p in chosen]).texts_at(number))
            number -= size
        raise IndexError(number)

    def draw(self, source: random.Random) -> str:
        """Draw options without taking one twice."""
        left, chosen = list(range(len(self.options))), []
        for _ in range(source.randint(self.least, self.most)):
            (place,) = source.choices(left, [self.weights[p] for p in left])
            left.remove(place)
            chosen.append(place)
        return self.separator.join(self.options[place].draw(source) for place in sorted(chosen))

    def nth(self, number: int) -> str:
        """Return an option, or as many as there may be from it on."""
        rounds, place = divmod(number, len(self.options))
        places = [(place + k) % len(self.options) for k in range(max(self.most, 1))]
        return self.separator.join(self.options[p].nth(rounds) for p in sorted(places))


class Budget:
    """How much of a template there may be, wildcards in wildcards and combinations included; and wildcards read already."""

    def __init__(self) -> None:
        self.nodes, self.sets = MAX_NODES, MAX_SETS
        self.known: dict[str, Node] = {}

    def spend(self, nodes: int = 0, sets: int = 0) -> None:
        """Take from what is left.

        Raises:
            ValueError: nothing is.
        """
        self.nodes, self.sets = self.nodes - nodes, self.sets - sets
        if self.nodes < 0 or self.sets < 0:
            raise ValueError("its choices and wildcards make too much of it; write fewer of them")


def parse(template: str, wildcards: Wildcards, depth: int = 0, budget: Budget | None = None) -> Node:
    """Parse a template; a wildcard's lines are templates too.

    Raises:
        ValueError: a brace is left open, a count makes no sense, or wildcards go round in circles.
        KeyError: there is no such wildcard.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"wildcards stand in wildcards more than {MAX_DEPTH} deep")
    node = _Parser(template, wildcards, depth, budget or Budget()).sequence(stops="")
    if node.longest > MAX_TEXT:
        raise ValueError(f"it may come to more than {MAX_TEXT} characters")
    return node


class _Parser:
    def __init__(self, text: str, wildcards: Wildcards, depth: int, budget: Budget) -> None:
        self._text, self._wildcards, self._depth, self._at = text, wildcards, depth, 0
        self._budget = budget

    def sequence(self, stops: str) -> Node:
        """Read up to one of `stops`, or to the end."""
        parts: list[Node] = []
        plain = ""
        while self._at < len(self._text) and self._text[self._at] not in stops:
            letter, wildcard = self._text[self._at], _WILDCARD.match(self._text, self._at)
            if letter == "\\" and self._text[self._at + 1 : self._at + 2] in ("{", "}", "|"):
                plain += self._text[self._at + 1]
                self._at += 2
            elif letter == "{" or wildcard:
                parts, plain = [*parts, Text(plain)], ""
                parts.append(self._lines_of(wildcard) if wildcard else self._choice())
            else:
                plain += letter
                self._at += 1
        parts = [part for part in [*parts, Text(plain)] if not (isinstance(part, Text) and not part.text)]
        return parts[0] if len(parts) == 1 else Run(parts)

    def _lines_of(self, found: re.Match[str]) -> Node:
        self._at = found.end()
        name = found.group(1)
        if name not in self._budget.known:
            lines = self._wildcards(name)
            self._budget.spend(len(lines), len(lines))
            nodes = [parse(line, self._wildcards, self._depth + 1, self._budget) for line in lines]
            self._budget.known[name] = Choice(nodes, [1.0] * len(lines))
        return self._budget.known[name]

    def _choice(self) -> Node:
        began = self._at
        self._at += 1
        least, most, separator = self._how_many(began)
        options, weights = [], []
        while True:
            weight = _WEIGHT.match(self._text, self._at)
            if weight:
                self._at = weight.end()
            weights.append(float(weight.group(1)) if weight else 1.0)
            options.append(self.sequence(stops="|}"))
            if self._at >= len(self._text):
                raise ValueError(f"column {began + 1}: the brace is never closed")
            self._at += 1
            if self._text[self._at - 1] == "}":
                break
        if not sum(weights):
            raise ValueError(f"column {began + 1}: every weight is 0")
        sizes = range(min(least, len(options)), min(most, len(options)) + 1)
        self._budget.spend(len(options), sum(math.comb(len(options), size) for size in sizes))
        return Choice(options, weights, least, most, separator)

    def _how_many(self, began: int) -> tuple[int, int, str]:
        found = _COUNT.match(self._text, self._at)
        if not found:
            return 1, 1, ", "
        low, dash, high = found.groups()
        least = int(low) if low else 0
        most = int(high) if high else (255 if dash else least)
        if not (low or high) or least > most or (most > 8 and dash is None):
            raise ValueError(f"column {began + 1}: {found.group().strip()!r} should be like 2$$ or 1-3$$")
        self._at = found.end()
        end = self._text.find("$$", self._at)
        bars = [place for place in (self._text.find("|", self._at), self._text.find("}", self._at)) if place >= 0]
        if end < 0 or any(place < end for place in bars):
            return least, most, ", "
        separator, self._at = self._text[self._at : end], end + 2
        return least, most, separator


def names_in(template: str) -> list[str]:
    """Return the wildcards a template names."""
    return list(dict.fromkeys(_WILDCARD.findall(template)))


def texts(node: Node, most: int) -> Iterator[str]:
    """Yield every text of a template, or, if there are more than `most`, enough to show every choice."""
    if node.count <= most:
        yield from (node.at(number) for number in range(node.count))
    else:
        yield from dict.fromkeys(islice((node.nth(number) for number in range(node.choices)), most))
