"""Explicit requests for embeddings in a prompt's text, `embedding:NAME` and `<NAME>`, and names as prompts write them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator
from functools import lru_cache

_EXPLICIT = re.compile(r"(?<![\w-])embedding:(?P<comfy>[^\s,()\[\]<>:|]+)|<(?P<angle>[^<>:\n]+)>")
_EMPTY_BRACKETS = re.compile(r"(?<!\\)[(\[]\s*(:\s*-?[\d.]+\s*)?(?<!\\)[)\]]")
_LONELY_COMMAS = re.compile(r"(,\s*)+(?=,|$)|^(\s*,)+\s*")


def requested(text: str) -> Iterator[str]:
    """Yield the names that a text asks for explicitly, with their versions."""
    for match in _EXPLICIT.finditer(text):
        yield (match["comfy"] or match["angle"]).strip()


def folded(name: str) -> str:
    """Return what two ways to write one name have in common, as prompts are read: case and spaces do not count.

    Spaces count between words, not beside punctuation: `bad - artist` is `bad-artist`, `bad artist` is not.
    """
    spaced = " ".join(unicodedata.normalize("NFC", name).lower().split())
    return re.sub(r" ?([^\w ]) ?", r"\1", spaced)


def plain_name(name: str) -> str:
    """Return a name without its version."""
    return name.partition("@")[0].strip()


def escape(name: str) -> str:
    """Return a name as prompts write it: brackets and backslashes escaped."""
    return re.sub(r"([()\[\]\\])", r"\\\1", name)


def bare(text: str, without: Collection[str] = ()) -> str:
    """Put bare names in place of explicit requests, apart from the words around; nothing for names that are `without`.

    Names in `without` are in lower case, without version.
    """
    taken_out = False

    def replaced(match: re.Match[str]) -> str:
        nonlocal taken_out
        name = plain_name(match["comfy"] or match["angle"])
        if name.lower() in without:
            taken_out = True
            return ""
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        return f"{' ' * before.isalnum()}{escape(name)}{' ' * after.isalnum()}"

    found = _EXPLICIT.sub(replaced, text)
    return tidied(found) if taken_out else found


def removed(text: str, words: Collection[str]) -> str:
    """Take words out of a text where they stand on their own, and the commas and brackets they leave empty."""
    for word in sorted(words, key=len, reverse=True):
        text, count = standing(word).subn("", text)
        text = tidied(text) if count else text
    return text


def tidied(text: str) -> str:
    """Remove brackets with nothing in them and commas that separate nothing."""
    text = _EMPTY_BRACKETS.sub("", text).strip()
    return _LONELY_COMMAS.sub("", text).strip()


@lru_cache(maxsize=4096)
def standing(name: str) -> re.Pattern[str]:
    """Match a name that stands on its own, as prompts may write it: in any case, escaped, with spaces between its parts."""
    parts = (re.escape(escape(c)) if escape(c) == c else rf"\\?{re.escape(c)}" for c in name if not c.isspace())
    return re.compile(r"(?<![\w-])" + r"\s*".join(parts) + r"(?![\w-])", re.IGNORECASE)


def weighed(text: str, name: str, weight: float) -> str:
    """Return a text in which a name is weighed as `(NAME:weight)`; a weight of 1 leaves it alone."""
    if weight == 1:
        return text
    number = f"{weight:.4f}".rstrip("0").rstrip(".")
    return standing(name).sub(lambda match: f"({match[0]}:{number})", text)
