"""Values of files, checked one by one and together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latentfarm_shared.errors import InvalidField, UnknownName, UnreadableFile, cut
from latentfarm_shared.parameters import EmbeddingUse, short
from latentfarm_shared.specs import MAX_IMAGES, JobSpec, check_value
from pydantic import ValidationError

MAX_USES, MAX_DURATION = 1000, 40
DURATIONS = ("expires_in", "max_runtime", "keep")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def check_field(name: str, value: Any) -> None:
    """Check one field's value.

    Raises:
        InvalidField: with what is valid, and the nearest where there are names.
    """
    try:
        check_value(name, value)
    except UnknownName as error:
        raise InvalidField(name, str(error)) from error
    except ValueError as error:
        raise InvalidField(name, str(error).partition(": ")[2] or str(error)) from error


def check_whole(values: dict[str, Any]) -> None:
    """Check fields together, as a job.

    Raises:
        InvalidField: names the field.
    """
    uses = values.get("embeddings", [])
    check_uses(uses)
    try:
        JobSpec.check(values | {"embeddings": [EmbeddingUse.parse(u) if isinstance(u, str) else u for u in uses]})
    except UnknownName as error:
        raise InvalidField(error.kind, str(error)) from error


def refuse_too_many(total: int) -> None:
    """Refuse more images than a job may have.

    Raises:
        InvalidField: there are more.
    """
    if total > MAX_IMAGES:
        raise InvalidField("count", f"the file makes more than {MAX_IMAGES} images")


def check_uses(uses: Any) -> None:
    """Make sure that embeddings are asked for by a list.

    Raises:
        InvalidField: they are not.
    """
    if not isinstance(uses, list | tuple) or len(uses) > MAX_USES:
        raise InvalidField("embeddings", f"should be a list of up to {MAX_USES} names, got {short(uses)}")
    for use in uses:
        if not isinstance(use, str | dict | EmbeddingUse):
            raise InvalidField("embeddings", f"should be names such as EasyNegative:neg, got {short(use)}")
        if isinstance(use, dict):
            try:
                EmbeddingUse.model_validate(use)
            except ValidationError as error:
                raise InvalidField("embeddings", error.errors()[0]["msg"]) from error


def require_file(path: Path) -> None:
    """Make sure that reading a path comes to an end.

    Raises:
        UnreadableFile: it is a pipe, a device or a folder.
    """
    if not path.is_file() and path.exists():
        raise UnreadableFile(cut(str(path)), "is no plain file; read from a pipe with -")


def duration(name: str, value: object) -> float:
    """Read seconds, or a text such as `90m`, `12h`, `7d`.

    Raises:
        InvalidField: it is neither.
    """
    is_plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    text = value if isinstance(value, str) else short(value)
    found = _DURATION.fullmatch(text) if is_plain and len(text) < MAX_DURATION else None
    if found is None:
        raise InvalidField(name, f"should be seconds or like 90m, 12h, 7d, got {short(value)}")
    return float(found.group(1)) * _SECONDS[found.group(2)]
