"""Sums, differences and likeness of embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.pickles import Array
from latentfarm_shared.errors import InvalidField

_TERM = re.compile(
    r"\s*(?P<sign>[+-])?\s*(?:(?P<weight>\d+(?:\.\d+)?|\.\d+)\s*\*\s*)?"
    r"(?:'(?P<quoted>[^']+)'|(?P<name>[^\s+*'](?:[^\s+*']|\s+(?![+*-]|\d*\.?\d+\s*\*))*))"
    r"(?:\s*\*\s*(?P<after>\d+(?:\.\d+)?|\.\d+))?\s*"
)


def combine(formula: str, find: Callable[[str], EmbeddingFile]) -> dict[str, Array]:
    """Return the tensors of `a + 0.5*b - c`; names that hold operators or spaces may stand in single quotes.

    A sign inside a name needs no quotes unless spaces stand around it. The result has as many vectors as the longest.

    Raises:
        InvalidField: the formula makes no sense, or its embeddings are for different encoders.
    """
    total: dict[str, Array] = {}
    for weight, name in parse_formula(formula):
        tensors = find(name).tensors
        if total and {e: t.shape[1] for e, t in total.items()} != {e: t.shape[1] for e, t in tensors.items()}:
            raise InvalidField("formula", f"{name!r} is for another family than what stands before it")
        for encoder, tensor in tensors.items():
            before = total.get(encoder, np.zeros_like(tensor))
            rows = max(len(before), len(tensor))
            total[encoder] = _padded(before, rows) + np.float32(weight) * _padded(tensor, rows)
    if not all(np.isfinite(tensor).all() for tensor in total.values()):
        raise InvalidField("formula", "the result is not finite; use smaller weights")
    return total


def parse_formula(formula: str) -> list[tuple[float, str]]:
    """Return the weighted names of a formula, in order.

    Raises:
        InvalidField: it is none.
    """
    terms: list[tuple[float, str]] = []
    at = 0
    while at < len(formula):
        match = _TERM.match(formula, at)
        if match is None or (terms and not match["sign"]) or (match["weight"] and match["after"]):
            raise InvalidField("formula", f"{formula[at:][:40]!r} should be like a + 0.5*b - c")
        weight = float(match["weight"] or match["after"] or 1) * (-1 if match["sign"] == "-" else 1)
        terms.append((weight, (match["quoted"] or match["name"]).strip()))
        at = match.end()
    if not terms:
        raise InvalidField("formula", "is empty; it should be like a + 0.5*b - c")
    return terms


def compare(left: EmbeddingFile, right: EmbeddingFile) -> dict[str, object]:
    """Return, for each encoder both have, the cosine and distance of vectors in the same place, and the likeness."""
    table: dict[str, object] = {"same": left.content_id == right.content_id}
    for encoder in left.tensors.keys() & right.tensors.keys():
        a, b = left.tensors[encoder], right.tensors[encoder]
        if a.shape[1] != b.shape[1]:
            continue
        rows = min(len(a), len(b))
        table[encoder] = {
            "vectors": [len(a), len(b)],
            "cosines": [round(float(x), 4) for x in _cosines(a[:rows], b[:rows])],
            "distances": [round(float(x), 4) for x in np.linalg.norm(a[:rows] - b[:rows], axis=1)],
            "norms": [round(float(np.linalg.norm(x, axis=1).mean()), 4) for x in (a, b)],
        }
    if left.widths == right.widths:
        table["likeness"] = round(likeness(left, right), 4)
    return table


def likeness(left: EmbeddingFile, right: EmbeddingFile) -> float:
    """Return how alike two embeddings are: the mean over vectors of the best cosine in the other, the lower side."""
    scores = []
    for encoder, a in left.tensors.items():
        table = _unit(a) @ _unit(right.tensors[encoder]).T
        scores.append(min(table.max(1).mean(), table.max(0).mean()))
    return float(np.mean(scores))


def near_duplicates(own: EmbeddingFile, others: Mapping[str, EmbeddingFile]) -> list[tuple[str, float]]:
    """Return other embeddings by likeness, the most alike first."""
    scored = [(name, round(likeness(own, other), 4)) for name, other in others.items()]
    return sorted(scored, key=lambda pair: -pair[1])


def _padded(tensor: Array, rows: int) -> Array:
    return np.pad(tensor, ((0, rows - len(tensor)), (0, 0)))


def _unit(tensor: Array) -> Array:
    unit: Array = tensor / np.maximum(np.linalg.norm(tensor, axis=1, keepdims=True), 1e-12)
    return unit


def _cosines(left: Array, right: Array) -> Array:
    cosines: Array = (_unit(left) * _unit(right)).sum(1)
    return cosines
