"""The one way embeddings enter the farm: read in the sandbox, checked against caps, widths and vocabularies, stored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.sandbox import NotAnEmbedding, Sandbox, opened
from latentfarm_shared.errors import InvalidField
from latentfarm_shared.library import EmbeddingLibrary
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord
from latentfarm_shared.registry import Registry
from latentfarm_shared.sources import About, Details, read_side
from latentfarm_shared.vocabularies import Vocabularies

KNOWN_WIDTHS = frozenset({768, 1024, 1280, 4096})
EXTENSIONS = (".pt", ".bin", ".safetensors", ".pti", ".png", ".webp", ".avif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


class Intake:
    """Takes files into a farm's library."""

    def __init__(
        self,
        library: EmbeddingLibrary,
        registry: Registry,
        vocabularies: Vocabularies,
        sandbox: Sandbox,
        owner: str = "",
    ) -> None:
        """Take them in the name of `owner`, empty for the farm."""
        self.library, self.sandbox, self.owner = library, sandbox, owner
        self._registry, self._vocabularies = registry, vocabularies

    def read(
        self, path: Path, name: str | None = None, file_name: str | None = None
    ) -> tuple[list[EmbeddingFile], bytes]:
        """Return the embeddings in a file, and its bytes if they are worth keeping.

        `file_name` is what the file is really called, if `path` is only where it lies.

        Raises:
            NotAnEmbedding: it is none, or none the farm takes.
        """
        with opened(path) as file:
            small = os.fstat(file.fileno()).st_size <= self.sandbox.caps.file_bytes
            data = file.read() if small else b""
            file.seek(0)
            digest = hashlib.sha256(data).hexdigest() if small else hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            found = self.sandbox.read_open(file, file_name or path.name, digest)
        for item in found:
            self._check(item, path, name)
        return found, data

    def _check(self, file: EmbeddingFile, path: Path, name: str | None) -> None:
        if file.needs_name and name is None:
            reason = "NEEDS_NAME: a bare tensor, which does not say what it is called; give it a name"
            raise NotAnEmbedding(str(path), reason, "NEEDS_NAME")
        if not KNOWN_WIDTHS.issuperset(file.widths.values()):
            registered = [record.widths for record in self.checkpoints()]
            if file.widths not in registered:
                has = ", ".join(map(str, file.widths.values()))
                reason = f"BAD_SHAPE: no checkpoint of the farm and no known family has vectors of width {has}"
                raise NotAnEmbedding(str(path), reason, "BAD_SHAPE")

    def checkpoints(self) -> list[CheckpointRecord]:
        """Return the farm's checkpoints."""
        return list(self._registry.checkpoints().values())

    def take(
        self,
        path: Path,
        name: str | None = None,
        details: Details | None = None,
        by: str = "",
        file_name: str | None = None,
    ) -> list[EmbeddingRecord]:
        """Read a file and store what it holds, under `name` or the file's stem.

        Raises:
            NotAnEmbedding: it is none, or none the farm takes; says what it is.
            InvalidField: the name cannot be used.
        """
        found, data = self.read(path, name, file_name)
        if name is not None and len(found) > 1:
            raise InvalidField("name", f"{path} holds {len(found)} embeddings, so one name is not enough")
        details = replace(details or Details(), data=data)
        for item in found:
            self.refuse_word(name or item.stem, details)
        return [self.library.add(item, name, details, owner=self.owner, by=by) for item in found]

    def beside(self, path: Path) -> Details:
        """Return what the files beside an embedding say of it: `.civitai.info`, A1111's `.json` and `.txt`, a preview."""
        about, kind = About(), None
        for suffix in (".civitai.info", ".json"):
            try:
                said, meant = read_side(path.with_name(path.stem + suffix).read_text(encoding="utf-8-sig"))
            except (OSError, ValueError, RecursionError):
                continue
            about, kind = about.over(said), kind or meant
        text = path.with_suffix(".txt")
        if text.is_file():
            about = about.over(About(description=text.read_text(encoding="utf-8", errors="replace")[:4000]))
        return Details(origin=str(path), kind=kind, preview=self._preview(path), about=about)

    def _preview(self, path: Path) -> bytes:
        for suffix in (*PICTURES, *(".preview" + picture for picture in PICTURES)):
            picture = path.with_name(path.stem + suffix)
            if picture != path and picture.is_file():
                return self.sandbox.picture(picture)
        return b""

    def store(self, file: EmbeddingFile, name: str, details: Details, by: str = "") -> EmbeddingRecord:
        """Store an embedding that was made here.

        Raises:
            InvalidField: the name cannot be used.
        """
        self.refuse_word(name, details)
        return self.library.add(file, name, details, owner=self.owner, by=by)

    def refuse_word(self, name: str, details: Details) -> None:
        """Refuse a name that prompts use as a word, unless that is wanted.

        Raises:
            InvalidField: it is one word of a checkpoint's vocabulary.
        """
        model = None if details.allow_word else self._vocabularies.knowing(name.strip())
        if model is not None:
            raise InvalidField(
                "name", f"{name!r} is a word that prompts for model {model!r} use; choose another, or pass --allow-word"
            )


def embedding_paths(folder: Path) -> list[Path]:
    """Return the files in a folder, and in those below, that A1111 would try to load, in order of their paths."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path for path in paths if is_candidate(path))


def is_candidate(path: Path) -> bool:
    """Tell whether A1111 would try to load a file of this name; previews and side files it passes over."""
    return path.suffix.lower() in EXTENSIONS and path.with_suffix("").suffix.lower() != ".preview"


def find_pairs(found: Mapping[Path, EmbeddingFile]) -> dict[Path, Path]:
    """Return which files are halves of one SDXL embedding, as diffusers' trainer writes them: `NAME` and `NAME_2`."""

    def are_halves(first: EmbeddingFile, second: EmbeddingFile) -> bool:
        widths = set(first.widths.values()), set(second.widths.values())
        return widths == ({768}, {1280}) and first.vectors == second.vectors

    others = {path: path.with_name(f"{path.stem}_2{path.suffix}") for path in found}
    return {path: other for path, other in others.items() if other in found and are_halves(found[path], found[other])}
