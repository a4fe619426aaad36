"""What is known of a file that an embedding came from: its hashes, and what sites and side files say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from latentfarm_shared.embeddings.files import EmbeddingFile

Kind = Literal["Model", "Negative"]


class About(BaseModel):
    """What others say of an embedding."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    trained_words: tuple[str, ...] = ()
    base_model: str = ""
    licence: str = ""
    link: str = ""
    description: str = ""
    air: str = ""

    def over(self, other: About) -> About:
        """Return what this says, and the other where this is silent."""
        said = {name: value for name, value in self.model_dump().items() if value}
        return About.model_validate(other.model_dump() | said)


NOTHING = About()


class Source(About):
    """A file an embedding came from. Its hashes are those other programs know it by; `added` is a time in UTC."""

    file_name: str
    file_sha256: str
    stem: str
    layout: str
    internal_name: str | None = None
    legacy_checksum: str | None = None
    size: int = 0
    origin: str = ""
    added: str = ""

    @classmethod
    def of(cls, file: EmbeddingFile, details: Details) -> Self:
        """Describe a file that is taken now."""
        return cls(
            **details.about.model_dump(),
            file_name=file.file_name or file.stem,
            file_sha256=file.file_sha256,
            stem=file.stem,
            layout=file.layout,
            internal_name=file.internal_name,
            legacy_checksum=file.legacy_checksum,
            size=len(details.data),
            origin=details.origin,
            added=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @property
    def about(self) -> About:
        """What others say of it, without the file."""
        return About.model_validate(self.model_dump())

    @property
    def autov2(self) -> str:
        """Civitai's AutoV2: ten digits of the file's sha256."""
        return self.file_sha256[:10]

    @property
    def ti_hash(self) -> str:
        """A1111's hash in `TI hashes`: twelve digits of the file's sha256."""
        return self.file_sha256[:12]


@dataclass(frozen=True)
class Details:
    """What comes with a file besides its tensors; `data` are its bytes, `preview` is a PNG."""

    data: bytes = b""
    origin: str = ""
    kind: Kind | None = None
    allow_word: bool = False
    preview: bytes = b""
    about: About = NOTHING


def read_side(text: str) -> tuple[About, Kind | None]:
    """Return what A1111's `.json`, or Civitai's description of a version (`.civitai.info`), says of an embedding.

    Raises:
        ValueError: it is no JSON object.
    """
    info = json.loads(text)
    if not isinstance(info, dict):
        raise ValueError("not an object")  # noqa: TRY004 - a JSON error like any other
    model, version, parent = info.get("modelId"), info.get("id"), info.get("model")
    is_version = isinstance(version, int) and isinstance(model, int)
    about = About(
        trained_words=_words(info),
        base_model=str(info.get("baseModel") or info.get("sd version") or "")[:100],
        description=str(info.get("description") or info.get("notes") or "")[:4000],
        link=f"https://civitai.com/models/{model}?modelVersionId={version}" if is_version else "",
        air=str(info.get("air") or "")[:200],
        licence=_licence(parent if isinstance(parent, dict) else {}),
    )
    files = info.get("files")
    negative = isinstance(files, list) and any(isinstance(f, dict) and f.get("type") == "Negative" for f in files)
    return about, "Negative" if negative else None


def _words(info: Mapping[str, Any]) -> tuple[str, ...]:
    words = info.get("trainedWords") or info.get("activation text") or ()
    words = words.split(",") if isinstance(words, str) else words
    if not isinstance(words, list | tuple):
        return ()
    return tuple(str(word).strip()[:200] for word in words if str(word).strip())[:50]


def _licence(model: Mapping[str, Any]) -> str:
    """Return Civitai's permissions as one line, as far as they are known."""
    asked = ("allowCommercialUse", "allowNoCredit", "allowDerivatives", "allowDifferentLicense")
    return ", ".join(f"{name}: {model[name]}" for name in asked if name in model)[:500]
