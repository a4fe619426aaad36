"""The farm's embeddings and checkpoints, as users add, look at, name and remove them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from latentfarm_shared.checkpoints import (
    SINGLE_FILE,
    describe_folder,
    describe_hub,
    describe_single_file,
    is_hub_id,
)
from latentfarm_shared.embeddings.arithmetic import combine, compare, near_duplicates
from latentfarm_shared.embeddings.export import FORMATS, exported
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.sandbox import NotAnEmbedding
from latentfarm_shared.errors import FarmError, InvalidField, UsageError
from latentfarm_shared.intake import Intake, embedding_paths, find_pairs
from latentfarm_shared.library import EmbeddingLibrary, check_name, name_key
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord
from latentfarm_shared.registry import Registry
from latentfarm_shared.settings import Settings
from latentfarm_shared.sources import Details, Kind, Source

from latentfarm.civitai import Civitai, is_civitai, without_secrets
from latentfarm.downloads import Downloader

READERS = 16


@dataclass(frozen=True)
class Taken:
    """What became of one file: the embeddings taken from it, or why it was refused."""

    source: str
    records: tuple[EmbeddingRecord, ...] = ()
    error: FarmError | None = None


@dataclass(frozen=True)
class EmbeddingCard:
    """All that is known of an embedding."""

    record: EmbeddingRecord
    norms: dict[str, list[float]]
    sources: list[Source]
    aliases: list[str]
    versions: list[str]
    pinned_by: int
    used_by: int
    resident_on: int
    duplicates: list[tuple[str, float]]
    has_preview: bool


class Embeddings:
    """Embeddings by name, in the name of one owner."""

    def __init__(self, library: EmbeddingLibrary, intake: Intake, settings: Settings) -> None:
        """Work on this library."""
        self.library, self._intake, self._settings = library, intake, settings

    @property
    def owner(self) -> str:
        """Whose names these are; empty for the farm's."""
        return self._intake.owner

    # ---- taking in

    def add(
        self, source: str | Path, name: str | None = None, *, allow_word: bool = False,
        kind: Kind | None = None,
    ) -> EmbeddingRecord:  # fmt: skip
        """Take the one embedding at a path or address, under `name` or its file's stem.

        `source` is a file of any known layout, an `https://` address, or something on Civitai (`civitai:VERSION`, a
        page's address, a hash). A name that is taken gets a new version. `allow_word` lets the name be a word that
        prompts use. It can be used by jobs submitted after this returns.

        Raises:
            NotAnEmbedding: it is no embedding; says what it is.
            InvalidField: the name, or the address, cannot be used.
            UnreadableFile, Unavailable: the address refuses, or does not answer.
        """
        found = self.add_all(source, name, allow_word=allow_word, kind=kind)
        error = next((taken.error for taken in found if taken.error is not None), None)
        if error is not None:
            raise error
        records = [record for taken in found for record in taken.records]
        if len(records) != 1:
            raise InvalidField("source", f"{source} holds {len(records)} embeddings; use add_all")
        return records[0]

    def add_all(
        self, source: str | Path, name: str | None = None, *, allow_word: bool = False,
        kind: Kind | None = None,
    ) -> list[Taken]:  # fmt: skip
        """Take every embedding at a path, which may be a folder, or at an address; a file that is refused stops none.

        Raises:
            InvalidField: a folder is given a name.
        """
        details = Details(allow_word=allow_word, kind=kind)
        text = str(source)
        if is_civitai(text, self._settings.civitai_url):
            return self._from_civitai(text, name, details)
        if text.startswith(("http://", "https://")):
            return [self._from_url(text, name, details)]
        path = Path(source)
        if path.is_dir():
            if name is not None:
                raise InvalidField("name", "goes with one file, not with a folder")
            return self._from_folder(path, details)
        return [self._from_file(path, name, replace(details, origin=text))]

    def add_upload(
        self, path: Path, file_name: str, name: str | None = None, *, allow_word: bool = False, kind: Kind | None = None
    ) -> list[Taken]:
        """Take what somebody sent under a file name, which lies at `path` meanwhile; errors speak of the name alone."""
        told = Details(allow_word=allow_word, kind=kind, origin=file_name)
        try:
            return [Taken(file_name, tuple(self._intake.take(path, name, told, file_name=file_name)))]
        except NotAnEmbedding as error:
            return [Taken(file_name, error=NotAnEmbedding(file_name, error.reason, error.refusal))]
        except UsageError as error:
            return [Taken(file_name, error=error)]

    def import_a1111(self, folder: str | Path, *, allow_word: bool = False) -> list[Taken]:
        """Take over A1111's `embeddings` folder, with what `.civitai.info`, `.json`, `.txt` and previews say."""
        return self._from_folder(Path(folder), Details(allow_word=allow_word), with_sides=True)

    def _from_file(self, path: Path, name: str | None, details: Details) -> Taken:
        try:
            return Taken(str(path), tuple(self._intake.take(path, name, details)))
        except UsageError as error:
            return Taken(str(path), error=error)

    def _from_folder(self, folder: Path, details: Details, *, with_sides: bool = False) -> list[Taken]:
        paths = embedding_paths(folder)
        if not paths:
            raise InvalidField("folder", f"{folder} holds no file that could be an embedding")
        taken: list[Taken] = []
        seen: dict[str, Path] = {}
        halves = self._pairs(paths)
        for path in (path for path in paths if path not in halves.values()):
            told = details
            if with_sides:
                own = self._intake.beside(path)
                told = replace(own, allow_word=details.allow_word, kind=details.kind or own.kind)
            if path.stem.lower() in seen:
                other = seen[path.stem.lower()]
                error = InvalidField("name", f"{path} and {other} have one name; give one of them another with --name")
                taken.append(Taken(str(path), error=error))
                continue
            seen[path.stem.lower()] = path
            if path in halves:
                taken.append(self._joined(path, halves[path], replace(told, origin=str(path))))
            else:
                taken.append(self._from_file(path, None, replace(told, origin=str(path))))
        return taken

    def _pairs(self, paths: Sequence[Path]) -> dict[Path, Path]:
        """Return the halves of SDXL embeddings that diffusers' trainer wrote to two files."""
        likely = {p for p in paths if p.with_name(f"{p.stem}_2{p.suffix}") in paths}
        likely |= {p.with_name(f"{p.stem}_2{p.suffix}") for p in likely}
        found = {}
        for path in likely:
            try:
                (found[path],) = self._intake.sandbox.read(path)
            except (UsageError, ValueError):
                continue
        return find_pairs(found)

    def _joined(self, path: Path, other: Path, details: Details) -> Taken:
        try:
            ((first,), data), ((second,), _) = self._intake.read(path), self._intake.read(other)
            joined = replace(first, tensors=first.tensors | second.tensors, layout="diffusers sdxl")
            record = self._intake.store(joined, joined.stem, replace(details, data=data))
        except UsageError as error:
            return Taken(str(path), error=error)
        return Taken(str(path), (record,))

    def _downloader(self) -> Downloader:
        return Downloader(max_bytes=self._settings.caps.file_bytes, allow_private=self._settings.allow_private_urls)

    def _from_url(self, url: str, name: str | None, details: Details) -> Taken:
        shown = without_secrets(url)
        try:
            with self._downloader().fetch(url) as fetched:
                told = replace(details, origin=shown)
                return Taken(shown, tuple(self._intake.take(fetched.path, name, told, file_name=fetched.file_name)))
        except FarmError as error:
            return Taken(shown, error=error)

    def _from_civitai(self, source: str, name: str | None, details: Details) -> list[Taken]:
        site = Civitai(self._downloader(), self._settings.civitai_url, self._settings.civitai_token)
        shown = without_secrets(source)
        try:
            files = site.files(source)
        except FarmError as error:
            return [Taken(shown, error=error)]
        taken = []
        for file in files:
            with site.preview(file) as picture:
                preview = b"" if picture is None else self._intake.sandbox.picture(picture)
            told = replace(
                file.details, allow_word=details.allow_word, kind=details.kind or file.details.kind, preview=preview
            )
            own = name if name is None or len(files) == 1 or told.kind == "Model" else f"{name}-neg"
            try:
                with site.fetch(file) as fetched:
                    taken.append(Taken(shown, tuple(self._intake.take(fetched.path, own, told, file_name=file.name))))
            except FarmError as error:
                taken.append(Taken(f"{shown} {file.name}", error=error))
        return taken

    # ---- looking

    def ls(self, *, everything: bool = False) -> list[EmbeddingRecord]:
        """Return all that can be named, by name; with `everything` those disabled and removed too."""
        known = self.library.visible(self.owner)
        return [record for _, record in sorted(known.items()) if everything or record.state == "active"]

    def family(self, embedding: EmbeddingRecord | EmbeddingFile) -> str:
        """Return sd1, sd2, sdxl or t5; else the family of a checkpoint here that has its widths; else unknown."""
        if embedding.family != "unknown":
            return embedding.family
        return next((c.family for c in self._intake.checkpoints() if c.widths == embedding.widths), "unknown")

    def show(self, name: str) -> EmbeddingRecord:
        """Return one, by `NAME` or `NAME@version`.

        Raises:
            UnknownName: there is none; names the nearest.
        """
        return self.library.find(name, self.owner)

    def card(self, name: str, resident_on: int = 0) -> EmbeddingCard:
        """Return all that is known of one.

        Raises:
            UnknownName: there is none; names the nearest.
        """
        record = self.show(name)
        file = self.library.tensors(record)
        key = name_key(record.owner, record.name)
        names = self.library.names()
        return EmbeddingCard(
            record=record,
            norms={e: [round(float(n), 4) for n in np.linalg.norm(t, axis=1)] for e, t in file.tensors.items()},
            sources=self.library.sources(record.content_id),
            aliases=[n.record.name for n in names.values() if n.alias_of == key and n.state == "active"],
            versions=[v.record.version for v in self.library.history(key) if v.state == "active"],
            pinned_by=self.library.pins(key),
            used_by=self.library.use_count(record.content_id),
            resident_on=resident_on,
            duplicates=[pair for pair in self.near(name) if pair[1] > 0.98],
            has_preview=self.library.preview(record.content_id) is not None,
        )

    def near(self, name: str) -> list[tuple[str, float]]:
        """Return embeddings with the same widths by likeness, the most alike first: 1 is the same.

        Likeness is the mean over an embedding's vectors of the best cosine among the other's.
        """
        record = self.show(name)
        others = [r for r in self.ls() if r.widths == record.widths and r.content_id != record.content_id]
        own = self.library.tensors(record)
        return near_duplicates(own, self._tensors(others))

    def _tensors(self, records: Sequence[EmbeddingRecord]) -> dict[str, EmbeddingFile]:
        """Return tensors by name, fetched side by side."""
        with ThreadPoolExecutor(READERS) as pool:
            files = pool.map(self.library.tensors, records)
            return {record.name: file for record, file in zip(records, files, strict=True)}

    def duplicates(self, least: float = 0.98) -> list[tuple[str, str, float]]:
        """Return pairs of embeddings whose likeness is `least` or more, the most alike first; aliases do not count."""
        records = self.ls()
        contents, pairs = self._tensors(records), []
        for number, record in enumerate(records):
            later = [
                r for r in records[number + 1 :] if r.widths == record.widths and r.content_id != record.content_id
            ]
            found = near_duplicates(contents[record.name], {r.name: contents[r.name] for r in later})
            pairs += [(record.name, other, score) for other, score in found if score >= least]
        return sorted(pairs, key=lambda pair: -pair[2])

    # ---- names

    def refuse_name(self, name: str, *, allow_word: bool = False) -> None:
        """Refuse a name that no embedding can have.

        Raises:
            InvalidField: says why.
        """
        check_name(name, "embedding")
        self._intake.refuse_word(name, Details(allow_word=allow_word))

    def alias(self, name: str, alias: str, *, allow_word: bool = False) -> EmbeddingRecord:
        """Give an embedding a second name; errors as EmbeddingLibrary.alias, and InvalidField for a word of prompts."""
        self._intake.refuse_word(alias, Details(allow_word=allow_word))
        return self.library.alias(name, alias, owner=self.owner, allow_word=allow_word)

    def rename(self, name: str, new: str, *, allow_word: bool = False) -> EmbeddingRecord:
        """Give an embedding another name; errors as EmbeddingLibrary.rename, and InvalidField for a word of prompts."""
        self._intake.refuse_word(new, Details(allow_word=allow_word))
        return self.library.rename(name, new, owner=self.owner, allow_word=allow_word)

    def rm(self, name: str, *, force: bool = False) -> None:
        """Remove a name; jobs that have the embedding keep it.

        Raises:
            UnknownName: there is none of that name.
            EmbeddingInUse: an unfinished job uses it, and `force` is not given.
        """
        self.library.remove(name, owner=self.owner, force=force)

    def disable(self, name: str, reason: str = "") -> EmbeddingRecord:
        """Refuse an embedding to new jobs."""
        return self.library.disable(name, owner=self.owner, reason=reason)

    def enable(self, name: str) -> EmbeddingRecord:
        """Let new jobs have a disabled embedding again."""
        return self.library.disable(name, owner=self.owner, on=True)

    # ---- making others

    def export(self, name: str, folder: str | Path, form: str = "safetensors") -> Path:
        """Write an embedding as a file for other programs: `a1111` (.pt), `safetensors`, `diffusers` or `original`.

        Raises:
            InvalidField: no such form, or the form cannot hold it.
        """
        if form not in (*FORMATS, "original"):
            raise InvalidField("format", f"{form!r} should be one of {', '.join((*FORMATS, 'original'))}")
        record = self.show(name)
        if form == "original":
            source = self.library.sources(record.content_id)[0]
            data, suffix = self.library.original(source.file_sha256), Path(source.file_name).suffix
        else:
            data, suffix = exported(self.library.tensors(record), record.name, form)
        path = Path(folder) / f"{record.name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def merge(self, formula: str, name: str, *, allow_word: bool = False) -> EmbeddingRecord:
        """Add, subtract and weigh embeddings, `a + 0.5*b - c`, and store the result; shorter ones end in zeros.

        Raises:
            InvalidField: the formula makes no sense, or mixes widths.
            UnknownName: it names an unknown embedding.
        """
        tensors = combine(formula, lambda part: self.library.tensors(self.show(part)))
        file = EmbeddingFile(name, "merged", None, "", tensors)
        file = replace(file, file_sha256=_digest(file.normalised()))
        details = Details(data=file.normalised(), origin=f"merge: {formula}", allow_word=allow_word)
        return self._intake.store(file, name, details)

    def diff(self, left: str, right: str) -> dict[str, object]:
        """Compare two embeddings vector by vector: cosines, distances, norms."""
        return compare(self.library.tensors(self.show(left)), self.library.tensors(self.show(right)))

    def inspect(self, path: str | Path) -> list[EmbeddingFile]:
        """Return what a file holds, without taking it.

        Raises:
            NotAnEmbedding: it is none; says what it is.
        """
        return self._intake.sandbox.read(Path(path))

    def reindex(self) -> int:
        """Rebuild the index of names in Redis from S3; return how many there are."""
        return self.library.reindex()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def parse_strengths(text: str) -> tuple[float, ...]:
    """Read `0:1.5:0.25` (from, to, step) or `0,0.5,1`.

    Raises:
        InvalidField: neither.
    """
    number = r"-?\d+(?:\.\d+)?"
    if match := re.fullmatch(rf"({number}):({number}):({number})", text.strip()):
        low, high, step = (float(part) for part in match.groups())
        count = int((high - low) / step + 1e-6) + 1 if step > 0 and high >= low else 0
        if 1 <= count <= 100:
            return tuple(round(low + i * step, 6) for i in range(count))
    elif re.fullmatch(rf"{number}(,\s*{number})*", text.strip()):
        return tuple(float(part) for part in text.split(","))
    raise InvalidField("strength", f"{text!r} should be FROM:TO:STEP, such as 0:1.5:0.25, or numbers with commas")


class Models:
    """Checkpoints by name."""

    def __init__(self, registry: Registry, hub_endpoint: str | None = None) -> None:
        """Work on this registry; `hub_endpoint` is another hub than the usual one."""
        self._registry, self._hub_endpoint = registry, hub_endpoint

    def add(self, source: str | Path, name: str | None = None, config: str | Path | None = None) -> CheckpointRecord:
        """Record a checkpoint: a diffusers folder, a `.safetensors` file, or a hub id (`owner/name[@revision]`).

        A single file in the original layout needs `config`, a diffusers folder of its family, of which configuration
        and tokenizer are used. Files are uploaded where the farm lacks them; of a hub's only the small ones.

        Raises:
            UnreadableFile: it is no such checkpoint; says what is missing.
            Unavailable: the hub does not answer.
        """
        folder = Path(source)
        if not folder.exists() and is_hub_id(str(source)):
            record, small = describe_hub(str(source), name, self._hub_endpoint)
            return self._registry.add_checkpoint(record, small)
        if folder.is_file():
            record = describe_single_file(folder, name or folder.stem, Path(config) if config else None)
            places = {f.path: (Path(config or "") / f.path, folder)[f.path == SINGLE_FILE] for f in record.files}
            return self._registry.add_checkpoint(record, [(f.sha256, places[f.path]) for f in record.files])
        record = describe_folder(folder, name or folder.absolute().name)
        return self._registry.add_checkpoint(record, [(f.sha256, folder / f.path) for f in record.files])

    def ls(self) -> list[CheckpointRecord]:
        """Return all, by name."""
        return [record for _, record in sorted(self._registry.checkpoints().items())]

    def show(self, name: str) -> CheckpointRecord:
        """Return one.

        Raises:
            UnknownName: there is none; names the nearest.
        """
        return self._registry.checkpoint(name)
