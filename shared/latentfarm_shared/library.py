"""The farm's embeddings: contents by hash and versions of names in S3, where the truth is; an index of names in Redis.

    embeddings/objects/<content id>.safetensors            normalised tensors
    embeddings/files/<sha256>                              the files they came from
    embeddings/sources/<content id>/<file sha256>.json     what is known of each file
    embeddings/previews/<content id>.png                   the card's picture
    embeddings/names/<owner>/<name>/<number>.json          every version of a name, the highest number counts

Each is written once, with a condition, in this order; so whatever dies on the way leaves at worst a content without a
name. The index follows last, and is rebuilt from S3 by `reindex`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from latentfarm_shared.embeddings.files import EmbeddingFile, from_normalised
from latentfarm_shared.errors import EmbeddingInUse, InvalidField, UnknownName
from latentfarm_shared.ledger.ledger import Ledger, translated
from latentfarm_shared.records import EmbeddingRecord
from latentfarm_shared.storage import MissingObject, ObjectStore

NAMES, CHANGES = "lf:names", "lf:names:changes"
MAX_STORED_BYTES = 64 * 2**20
_VERSION = re.compile(r"(?P<name>.+)@(?P<version>[0-9a-fA-F]{8,64})")
_READERS = 16


class Source(BaseModel):
    """A file an embedding came from, and what was known of it. Its hashes are those of other programs."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    file_name: str
    file_sha256: str
    stem: str
    layout: str
    internal_name: str | None = None
    legacy_checksum: str | None = None
    size: int = 0
    origin: str = ""
    added: str = ""
    trained_words: tuple[str, ...] = ()
    base_model: str = ""
    licence: str = ""
    link: str = ""
    description: str = ""
    air: str = ""

    @property
    def autov2(self) -> str:
        """Civitai's AutoV2: ten digits of the file's sha256."""
        return self.file_sha256[:10]

    @property
    def ti_hash(self) -> str:
        """A1111's hash in `TI hashes`: twelve digits of the file's sha256."""
        return self.file_sha256[:12]


class NameRecord(BaseModel):
    """One version of a name: what it stands for, or whose `alias_of` it is (a key)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    state: Literal["active", "disabled", "removed"] = "active"
    record: EmbeddingRecord
    alias_of: str = ""
    by: str = ""


@dataclass(frozen=True)
class Details:
    """What comes with a file besides its tensors."""

    data: bytes = b""
    origin: str = ""
    kind: Literal["Model", "Negative"] | None = None
    allow_word: bool = False
    preview: bytes = b""
    trained_words: tuple[str, ...] = ()
    base_model: str = ""
    licence: str = ""
    link: str = ""
    description: str = ""
    air: str = ""


def object_key(content_id: str) -> str:
    """Return where an embedding's tensors lie."""
    return f"embeddings/objects/{content_id}.safetensors"


def preview_key(content_id: str) -> str:
    """Return where an embedding's picture lies."""
    return f"embeddings/previews/{content_id}.png"


def name_key(owner: str, name: str) -> str:
    """Return a name's key in the index; the farm's own names have no owner. Case does not count, as in prompts."""
    return f"{owner}/{name.strip().lower()}"


def check_name(name: str, kind: str) -> str:
    """Return a usable name, stripped.

    Raises:
        InvalidField: empty, too long, or holding characters that prompts or keys cannot.
    """
    name = name.strip()
    if not 1 <= len(name) <= 120 or not name.isprintable() or any(c in name for c in "/\\:<>@"):
        raise InvalidField(
            f"{kind} name", f"{name[:40]!r} should be 1 to 120 printable characters without / \\ : < > @"
        )
    return name


class EmbeddingLibrary:
    """Reads and writes embeddings. Safe to share between threads."""

    def __init__(self, ledger: Ledger, store: ObjectStore) -> None:
        """Use these two; nothing is sent yet."""
        self._ledger, self._store = ledger, store
        self._seen: tuple[bytes, dict[str, NameRecord]] = (b"", {})

    # ---- reading

    def names(self) -> dict[str, NameRecord]:
        """Return the latest version of every name, by key; read anew only when something changed."""
        version = self.last_change()
        with translated():
            if version != self._seen[0] or not version:
                entries = self._ledger.redis.hgetall(NAMES)
                self._seen = version, {key.decode(): _decode(key, text) for key, text in entries.items()}
        return self._seen[1]

    def last_change(self) -> bytes:
        """Return where the stream of changes stands."""
        with translated():
            last = self._ledger.redis.xrevrange(CHANGES, count=1)
        return last[0][0] if last else b""

    def changes(self, after: bytes, wait_ms: int) -> tuple[bytes, set[str]]:
        """Wait for names to change; return where to go on from, and their keys."""
        with translated():
            found = self._ledger.redis.xread({CHANGES: after or b"0"}, count=1000, block=wait_ms)
        entries = found[0][1] if found else []
        return (entries[-1][0] if entries else after), {fields[b"name"].decode() for _, fields in entries}

    def visible(self, owner: str = "") -> dict[str, EmbeddingRecord]:
        """Return every embedding `owner` can name, by name in lower case: their own, else, or once removed, the farm's.

        Those disabled or removed are among them, marked so.
        """
        names = self.names()
        found: dict[str, EmbeddingRecord] = {}
        for key in names:
            whose, _, lower = key.partition("/")
            if whose not in ("", owner):
                continue
            record, other = self._settled(key, names), found.get(lower)
            ranks = [(r.state != "removed", bool(r.owner)) for r in (record, other) if r is not None]
            if other is None or ranks[0] > ranks[1]:
                found[lower] = record
        return found

    @staticmethod
    def _settled(key: str, names: Mapping[str, NameRecord]) -> EmbeddingRecord:
        """Return what a name stands for now; an alias stands for what the other name does."""
        entry = names[key]
        target = names.get(entry.alias_of, entry)
        if entry.state != "active" or target is entry:
            return entry.record.model_copy(update={"state": entry.state})
        return target.record.model_copy(
            update={"name": entry.record.name, "owner": entry.record.owner, "state": target.state,
                    "allow_word": entry.record.allow_word}
        )  # fmt: skip

    def find(self, name: str, owner: str = "") -> EmbeddingRecord:
        """Return an embedding by `NAME`, or an older version of it by `NAME@<first digits of its content id or sha256>`.

        Raises:
            UnknownName: names the nearest.
        """
        known = self.visible(owner)
        versioned = _VERSION.fullmatch(name.strip())
        plain = versioned["name"] if versioned else name.strip()
        record = known.get(plain.lower())
        if record is None:
            raise UnknownName.among("embedding", plain, _active(known))
        if versioned is None:
            return record
        wanted = versioned["version"].lower()
        for version in self.history(record.owner, plain):
            if version.record.content_id.startswith(wanted) or version.record.file_sha256.startswith(wanted):
                return version.record.model_copy(update={"name": record.name, "state": record.state})
        raise UnknownName("version", name.strip())

    def history(self, owner: str, name: str) -> Iterator[NameRecord]:
        """Yield every version of a name, the newest first."""
        for key in sorted(self._store.keys(_folder(owner, name)), reverse=True):
            yield NameRecord.model_validate_json(self._store.get(key))

    def sources(self, content_id: str) -> list[Source]:
        """Return the files an embedding came from, the oldest first."""
        texts = [self._store.get(key) for key in self._store.keys(f"embeddings/sources/{content_id}/")]
        return sorted((Source.model_validate_json(text) for text in texts), key=lambda source: source.added)

    def tensors(self, record: EmbeddingRecord) -> EmbeddingFile:
        """Return an embedding's tensors."""
        return from_normalised(self.embedding_tensors(record), record)

    def embedding_tensors(self, record: EmbeddingRecord) -> bytes:
        """Return the normalised safetensors of an embedding."""
        return self._store.get(object_key(record.content_id))

    def original(self, file_sha256: str) -> bytes:
        """Return the bytes of a file an embedding came from."""
        return self._store.get(f"embeddings/files/{file_sha256}")

    def preview(self, content_id: str) -> bytes | None:
        """Return an embedding's picture, if it has one."""
        try:
            return self._store.get(preview_key(content_id))
        except MissingObject:
            return None

    def uses(self) -> list[str]:
        """Return content ids by how many jobs used them, the most used first."""
        with translated():
            return [name.decode() for name in self._ledger.redis.zrevrange("lf:used", 0, -1)]

    def use_count(self, content_id: str) -> int:
        """Return how many jobs ever used an embedding."""
        with translated():
            return int(self._ledger.redis.zscore("lf:used", content_id) or 0)

    def pins(self, key: str) -> int:
        """Return how many unfinished jobs use a name."""
        with translated():
            return int(self._ledger.redis.hget("lf:pins", key) or 0)

    # ---- writing

    def add(
        self,
        file: EmbeddingFile,
        name: str | None = None,
        details: Details | None = None,
        *,
        owner: str = "",
        by: str = "",
    ) -> EmbeddingRecord:
        """Store an embedding under a name, by default its file's stem, as a new version if the name is taken.

        The same content under the same name again changes nothing but adds the file to its sources. `by` says who asks,
        so that a repeated intake is known for one.

        Raises:
            InvalidField: the name cannot be used.
        """
        details = details or Details()
        name = check_name(name or file.stem, "embedding")
        self._put_content(file, details)
        before = self.names().get(name_key(owner, name))
        kind = details.kind or (before.record.kind if before else None) or self._told_kind(file)
        allowed = details.allow_word or (before is not None and before.record.allow_word)
        record = file.record(name).model_copy(update={"owner": owner, "kind": kind, "allow_word": allowed})
        return self._put_name(record, by=by)

    def _put_content(self, file: EmbeddingFile, details: Details) -> None:
        content_id = file.content_id
        self._store.put_once(object_key(content_id), file.normalised(), "application/octet-stream", content_id)
        if details.data and len(details.data) <= MAX_STORED_BYTES:
            sha256 = file.file_sha256
            self._store.put_once(f"embeddings/files/{sha256}", details.data, "application/octet-stream", sha256)
        source = Source(
            file_name=file.file_name or file.stem, file_sha256=file.file_sha256, stem=file.stem, layout=file.layout,
            internal_name=file.internal_name, legacy_checksum=file.legacy_checksum, size=len(details.data),
            origin=details.origin, added=datetime.now(UTC).isoformat(timespec="seconds"),
            trained_words=details.trained_words, base_model=details.base_model, licence=details.licence,
            link=details.link, description=details.description[:4000], air=details.air,
        )  # fmt: skip
        told = sum(bool(x) for x in (details.trained_words, details.base_model, details.link, details.licence))
        key = f"embeddings/sources/{content_id}/{file.file_sha256}.json"
        if told or not self._store.exists(key):
            self._store.put(key, source.model_dump_json().encode(), "application/json")
        if details.preview:
            self.put_preview(content_id, details.preview)

    def put_preview(self, content_id: str, png: bytes) -> None:
        """Make a picture the embedding's card."""
        self._store.put(preview_key(content_id), png, "image/png")

    @staticmethod
    def _told_kind(file: EmbeddingFile) -> Literal["Model", "Negative"]:
        """Guess what a file is for from its name, as people name them."""
        return (
            "Negative"
            if re.search(r"(^|[-_ .])neg(ative)?([-_ .\d]|$)|negative", file.stem, re.IGNORECASE)
            else "Model"
        )

    def alias(self, name: str, alias: str, *, owner: str = "", allow_word: bool = False) -> EmbeddingRecord:
        """Give an embedding a second name, which stands for whatever the first does.

        Raises:
            UnknownName: there is none of that name.
            InvalidField: the alias cannot be used, or is taken.
        """
        record = self._active(name, owner)
        alias = check_name(alias, "alias")
        taken = self.names().get(name_key(owner, alias))
        target = self.names()[name_key(record.owner, name)].alias_of or name_key(record.owner, name)
        if taken is not None and taken.state == "active" and taken.alias_of != target:
            raise InvalidField("alias", f"{alias!r} is an embedding already")
        update = {"name": alias, "owner": owner, "allow_word": allow_word}
        return self._put_name(record.model_copy(update=update), alias_of=target)

    def rename(self, name: str, new: str, *, owner: str = "", allow_word: bool = False) -> EmbeddingRecord:
        """Give an embedding another name; the old one is then refused, saying the new.

        Raises:
            UnknownName, InvalidField: as `alias`.
            EmbeddingInUse: an unfinished job uses the old name.
        """
        record = self._active(name, owner)
        new = check_name(new, "embedding")
        same = new.lower() == name.strip().lower()
        taken = self.names().get(name_key(owner, new))
        if taken is not None and taken.state == "active" and not same:
            raise InvalidField("name", f"{new!r} is an embedding already")
        update = {"name": new, "allow_word": record.allow_word or allow_word}
        renamed = self._put_name(record.model_copy(update=update))
        if not same:
            self.remove(name, owner=record.owner, reason=f"it was renamed to {new!r}")
        return renamed

    def disable(self, name: str, *, owner: str = "", reason: str = "", on: bool = False) -> EmbeddingRecord:
        """Refuse an embedding to new jobs, or with `on` let them have it again; jobs that have it keep it."""
        record = self.find(name, owner)
        if record.state == "removed":
            raise UnknownName.among("embedding", name, _active(self.visible(owner)))
        state: dict[str, str] = {"state": "active" if on else "disabled", "state_reason": "" if on else reason}
        alias = self.names()[name_key(record.owner, name)].alias_of
        return self._put_name(record.model_copy(update=state), alias_of=alias)

    def remove(self, name: str, *, owner: str = "", force: bool = False, reason: str = "") -> None:
        """Remove a name; its contents stay for the jobs that have them. One that an unfinished job uses is kept.

        Raises:
            UnknownName: there is none of that name.
            EmbeddingInUse: an unfinished job uses it, and `force` is not given.
        """
        record = self.find(name, owner)
        key = name_key(record.owner, name)
        users = self._ledger.take_name(key, force=force)
        if users and not force:
            raise EmbeddingInUse(record.name, users)
        if not self._is_taken_back(key):
            state = {"state": "removed", "state_reason": reason}
            self._put_name(record.model_copy(update=state), alias_of=self.names()[key].alias_of)

    def _is_taken_back(self, key: str) -> bool:
        """Tell whether S3 says already that a name is removed."""
        owner, _, lower = key.partition("/")
        latest = next(self.history(owner, lower), None)
        return latest is None or latest.state == "removed"

    def _active(self, name: str, owner: str) -> EmbeddingRecord:
        record = self.find(name, owner)
        if record.state != "active":
            raise UnknownName.among("embedding", name, _active(self.visible(owner)))
        return record

    def _put_name(self, record: EmbeddingRecord, alias_of: str = "", by: str = "") -> EmbeddingRecord:
        """Write the next version of a name on condition that nobody else did, then index it."""
        key = name_key(record.owner, record.name)
        latest = self.names().get(key)
        while True:
            number = latest.number + 1 if latest else 1
            entry = NameRecord(number=number, state=record.state, record=record, alias_of=alias_of, by=by)
            if latest and _says_the_same(latest, entry):
                entry = latest
                break
            text = entry.model_dump_json()
            digest = hashlib.sha256(text.encode()).hexdigest()
            if self._store.put_new(f"{_folder(record.owner, record.name)}{number:08d}.json", text.encode(), digest):
                break
            latest = next(self.history(record.owner, record.name), None)
        self._ledger.put_name(key, entry.number, entry.model_dump_json())
        return entry.record

    def reindex(self) -> int:
        """Rebuild the index in Redis from S3; return how many names there are."""
        latest: dict[str, str] = {}
        for key in sorted(self._store.keys("embeddings/names/")):
            latest[key.rpartition("/")[0]] = key
        with ThreadPoolExecutor(_READERS) as pool:
            for text in pool.map(self._store.get, latest.values()):
                entry = NameRecord.model_validate_json(text)
                self._ledger.put_name(
                    name_key(entry.record.owner, entry.record.name), entry.number, entry.model_dump_json()
                )
        return len(latest)


def _decode(key: bytes, text: bytes) -> NameRecord:
    try:
        return NameRecord.model_validate_json(text)
    except ValueError as error:
        raise InvalidField("index", f"{key.decode()!r} cannot be read; run 'latentfarm embeddings reindex'") from error


def _says_the_same(before: NameRecord, after: NameRecord) -> bool:
    """Tell whether a version would add nothing: the file it came from first stays the one it is known by."""
    kept = before.record.model_copy(update={field: getattr(after.record, field) for field in _OF_THE_FILE})
    return before.state == after.state and before.alias_of == after.alias_of and kept == after.record


_OF_THE_FILE = ("file_sha256", "internal_name", "layout")


def _active(known: Mapping[str, EmbeddingRecord]) -> list[str]:
    return [record.name for record in known.values() if record.state == "active"]


def _folder(owner: str, name: str) -> str:
    """Return where a name's versions lie; long ones by their hash, since keys have an end."""
    lower = quote(name.strip().lower(), safe="")
    short = lower if len(lower) <= 180 else "~" + hashlib.sha256(lower.encode()).hexdigest()
    return f"embeddings/names/{quote(owner, safe='') or '_farm'}/{short}/"


def side_details(text: str) -> dict[str, Any]:
    """Return what A1111's `.json`, or Civitai's description of a version (`.civitai.info`), says of an embedding.

    Raises:
        ValueError: it is no JSON object.
    """
    info = json.loads(text)
    if not isinstance(info, dict):
        raise ValueError("not an object")  # noqa: TRY004 - a JSON error like any other
    words = info.get("trainedWords") or info.get("activation text") or ()
    words = [part.strip() for part in words.split(",")] if isinstance(words, str) else words
    model, version = info.get("modelId"), info.get("id")
    own = isinstance(version, int) and isinstance(model, int)
    parent = info.get("model")
    found = {
        "trained_words": tuple(str(word)[:200] for word in words if word)[:50]
        if isinstance(words, list | tuple)
        else (),
        "base_model": str(info.get("baseModel") or info.get("sd version") or "")[:100],
        "description": str(info.get("description") or info.get("notes") or ""),
        "link": f"https://civitai.com/models/{model}?modelVersionId={version}" if own else "",
        "air": str(info.get("air") or ""),
        "licence": _licence(parent if isinstance(parent, dict) else {}),
    }
    negative = any(isinstance(f, dict) and f.get("type") == "Negative" for f in info.get("files") or ())
    return found | ({"kind": "Negative"} if negative else {})


def _licence(model: Mapping[str, Any]) -> str:
    """Return Civitai's permissions as one line, as far as they are known."""
    asked = ("allowCommercialUse", "allowNoCredit", "allowDerivatives", "allowDifferentLicense")
    return ", ".join(f"{name}: {model[name]}" for name in asked if name in model)
