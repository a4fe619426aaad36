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
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from latentfarm_shared.embeddings.files import EmbeddingFile, from_normalised
from latentfarm_shared.errors import EmbeddingInUse, InvalidField, UnknownName
from latentfarm_shared.explicit import folded
from latentfarm_shared.ledger.ledger import Ledger, translated
from latentfarm_shared.records import EmbeddingRecord
from latentfarm_shared.sources import Details, Source
from latentfarm_shared.storage import MissingObject, ObjectStore

NAMES, CHANGES = "lf:names", "lf:names:changes"
MAX_STORED_BYTES = 64 * 2**20
_VERSION = re.compile(r"(?P<name>.+)@(?P<version>[0-9a-fA-F]{8,64})")
_SOUNDS_NEGATIVE = re.compile(r"(^|[-_ .])neg([-_ .\d]|$)|negative", re.IGNORECASE)
_READERS = 16


class NameRecord(BaseModel):
    """One version of a name: what it stands for, or whose `alias_of` it is (a key).

    `since` is when the name was first given, in seconds since 1970; `renamed_from` the key it had before; `by` who asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    state: Literal["active", "disabled", "removed"] = "active"
    record: EmbeddingRecord
    alias_of: str = ""
    renamed_from: str = ""
    since: float = 0.0
    by: str = ""

    def changed(self, **changes: Any) -> NameRecord:
        """Return the next version: the same but for some fields, of its record too."""
        own = {name: value for name, value in changes.items() if name in NameRecord.model_fields}
        rest = {name: value for name, value in changes.items() if name not in own}
        record = self.record.model_copy(update=rest | ({"state": own["state"]} if "state" in own else {}))
        return self.model_copy(update=own | {"number": self.number + 1, "record": record})


def object_key(content_id: str) -> str:
    """Return where an embedding's tensors lie."""
    return f"embeddings/objects/{content_id}.safetensors"


def preview_key(content_id: str) -> str:
    """Return where an embedding's picture lies."""
    return f"embeddings/previews/{content_id}.png"


def name_key(owner: str, name: str) -> str:
    """Return a name's key in the index; the farm's own names have no owner. Case and spaces count as little as in prompts."""
    return f"{owner}/{folded(name)}"


def check_owner(owner: str) -> str:
    """Return an owner whose names can be kept apart from others'.

    Raises:
        InvalidField: too long, or with characters that keys cannot hold.
    """
    if len(owner) > 100 or not owner.isprintable() or any(c.isspace() or c == "/" for c in owner):
        raise InvalidField("owner", f"{owner[:40]!r} should be at most 100 characters without spaces and /")
    return owner


def check_name(name: str, kind: str) -> str:
    """Return a usable name, stripped.

    Raises:
        InvalidField: empty, too long, or holding characters that prompts or keys cannot.
    """
    name = unicodedata.normalize("NFC", name.strip())
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

    def visible(self, owner: str = "", at: float | None = None) -> dict[str, EmbeddingRecord]:
        """Return every embedding `owner` can name, by folded name: their own, else, or once removed, the farm's.

        Those disabled or removed are among them, marked so. Names given after `at` (seconds since 1970) are left out.
        """
        names = {key: entry for key, entry in self.names().items() if at is None or entry.since <= at}
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
        record = known.get(folded(plain))
        if record is None:
            raise UnknownName.among("embedding", plain, _active(known))
        if versioned is None:
            return record
        wanted = versioned["version"].lower()
        key = name_key(record.owner, plain)
        for version in self.history(self.names()[key].alias_of or key):
            if version.record.content_id.startswith(wanted) or version.record.file_sha256.startswith(wanted):
                return version.record.model_copy(update={"name": record.name, "state": record.state})
        raise UnknownName("version", name.strip())

    def history(self, key: str) -> Iterator[NameRecord]:
        """Yield every version of a name, the newest first, under the names it had before too."""
        seen: set[str] = set()
        while key and key not in seen:
            seen.add(key)
            version = None
            for place in sorted(self._store.keys(_folder(key)), reverse=True):
                version = NameRecord.model_validate_json(self._store.get(place))
                yield version
            key = version.renamed_from if version is not None else ""

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
        fresh = file.record(name).model_copy(update={"owner": owner})

        def version(before: NameRecord | None) -> NameRecord:
            kind = details.kind or (before.record.kind if before else self._told_kind(file))
            allowed = details.allow_word or (before is not None and before.record.allow_word)
            record = fresh.model_copy(update={"kind": kind, "allow_word": allowed})
            if before is None:
                return NameRecord(number=1, record=record, since=time.time(), by=by)
            if (by and before.by == by) or _says_the_same(before, record):
                return before
            return NameRecord(number=before.number + 1, record=record, since=before.since, by=by)

        return self._change(name_key(owner, name), version).record

    def _put_content(self, file: EmbeddingFile, details: Details) -> None:
        content_id = self.keep(file)
        if details.data and len(details.data) <= MAX_STORED_BYTES:
            sha256 = file.file_sha256
            self._store.put_once(f"embeddings/files/{sha256}", details.data, "application/octet-stream", sha256)
        self._put_source(f"embeddings/sources/{content_id}/{file.file_sha256}.json", Source.of(file, details))
        if details.preview:
            self.put_preview(content_id, details.preview)

    def _put_source(self, key: str, source: Source) -> None:
        """Write down what is known of a file; what was known before stays where this says nothing."""
        known = source
        with suppress(MissingObject):
            before = Source.model_validate_json(self._store.get(key))
            known = before.model_copy(update=source.about.over(before.about).model_dump())
        self._store.put(key, known.model_dump_json().encode(), "application/json")

    def keep(self, file: EmbeddingFile) -> str:
        """Store an embedding's tensors without a name; return their content id."""
        content_id = file.content_id
        self._store.put_once(object_key(content_id), file.normalised(), "application/octet-stream", content_id)
        return content_id

    def put_preview(self, content_id: str, png: bytes) -> None:
        """Make a picture the embedding's card."""
        self._store.put(preview_key(content_id), png, "image/png")

    @staticmethod
    def _told_kind(file: EmbeddingFile) -> Literal["Model", "Negative"]:
        """Guess what a file is for from its name, as people name them."""
        return "Negative" if _SOUNDS_NEGATIVE.search(file.stem) else "Model"

    def alias(self, name: str, alias: str, *, owner: str = "", allow_word: bool = False) -> EmbeddingRecord:
        """Give an embedding a second name, which stands for whatever the first does.

        Raises:
            UnknownName: there is none of that name.
            InvalidField: the alias cannot be used, or is taken.
        """
        record = self.find(_unversioned(name), owner)
        key, target = name_key(owner, check_name(alias, "alias")), name_key(record.owner, name)
        target = self.names()[target].alias_of or target
        if record.state != "active" or key == target:
            raise UnknownName.among("embedding", name, _active(self.visible(owner)))
        named = record.model_copy(update={"name": alias.strip(), "owner": owner, "allow_word": allow_word})

        def version(before: NameRecord | None) -> NameRecord:
            if before is None:
                return NameRecord(number=1, record=named, alias_of=target, since=time.time())
            if before.state == "active" and not before.alias_of:
                raise InvalidField("alias", f"{alias!r} is an embedding already")
            return NameRecord(number=before.number + 1, record=named, alias_of=target, since=before.since)

        return self._change(key, version).record

    def rename(self, name: str, new: str, *, owner: str = "", allow_word: bool = False) -> EmbeddingRecord:
        """Give an embedding another name; the old one is then refused, saying the new. Aliases and versions go along.

        Raises:
            UnknownName: `owner` has none of that name.
            InvalidField: the new name cannot be used, or is taken.
            EmbeddingInUse: an unfinished job uses the old name.
        """
        old, key = name_key(owner, _unversioned(name)), name_key(owner, check_name(new, "embedding"))
        entry = self._own(name, owner)

        def version(before: NameRecord | None) -> NameRecord:
            if before is not None and before.state == "active" and key != old:
                if before.record.content_id == entry.record.content_id and before.renamed_from == old:
                    return before  # asked for again
                raise InvalidField("name", f"{new!r} is an embedding already")
            named = {"name": new.strip(), "allow_word": entry.record.allow_word or allow_word}
            record = entry.record.model_copy(update=named)
            number, since = (before.number + 1, before.since) if before else (1, time.time())
            moved = old if key != old else entry.renamed_from
            return NameRecord(number=number, record=record, alias_of=entry.alias_of, renamed_from=moved, since=since)

        if key != old:
            self._take(old, force=False)
        try:
            renamed = self._change(key, version).record
        except InvalidField:
            self._ledger.put_name(old, entry.number, entry.model_dump_json(), anew=True)  # it stays what it was
            raise
        if key != old:
            self._tombstone(old, f"it was renamed to {new.strip()!r}")
            for alias, other in self.names().items():
                if other.alias_of == old:
                    self._change(alias, lambda before: before.changed(alias_of=key) if before else before)
        return renamed

    def disable(self, name: str, *, owner: str = "", reason: str = "", on: bool = False) -> EmbeddingRecord:
        """Refuse an embedding to new jobs, or with `on` let them have it again; jobs that have it keep it.

        Raises:
            UnknownName: `owner` has none of that name.
        """
        self._own(name, owner, disabled=True)
        state = {"state": "active" if on else "disabled", "state_reason": "" if on else reason}

        def version(before: NameRecord | None) -> NameRecord | None:
            if before is None or before.state == "removed":
                raise UnknownName("embedding", name)
            return before if before.state == state["state"] == "active" else before.changed(**state)

        return self._change(name_key(owner, name), version).record

    def remove(self, name: str, *, owner: str = "", force: bool = False) -> None:
        """Remove a name; its contents stay for the jobs that have them. One that an unfinished job uses is kept.

        Raises:
            UnknownName: `owner` has none of that name.
            EmbeddingInUse: an unfinished job uses it, and `force` is not given.
        """
        key = name_key(owner, _unversioned(name))
        entry = self.names().get(key)
        if entry is None or (entry.state == "removed" and self._in_store(key, entry)):
            raise UnknownName.among("embedding", name.strip(), _active(self.visible(owner)))
        self._take(key, force=force)
        self._tombstone(key, "")

    def _in_store(self, key: str, entry: NameRecord) -> bool:
        """Tell whether S3 knows a version of the index; a removal may have been cut off before it did."""
        latest = next(self.history(key), None)
        return latest is not None and latest.state == entry.state

    def _own(self, name: str, owner: str, *, disabled: bool = False) -> NameRecord:
        """Return the version of a name that an owner may change, which is their own and not somebody else's.

        Raises:
            UnknownName: there is none.
        """
        entry = self.names().get(name_key(owner, _unversioned(name)))
        if entry is None or entry.state == "removed" or (entry.state == "disabled" and not disabled):
            raise UnknownName.among("embedding", name.strip(), _active(self.visible(owner)))
        return entry

    def _take(self, key: str, *, force: bool) -> None:
        """Take a name out of use, in one transition with the look at who uses it."""
        users = self._ledger.take_name(key, force=force)
        if users and not force:
            raise EmbeddingInUse(key.partition("/")[2], users)

    def _tombstone(self, key: str, reason: str) -> None:
        """Write down that a name is removed, unless somebody has given it anew since it was taken."""
        taken = self.names().get(key)

        def version(before: NameRecord | None) -> NameRecord | None:
            if before is None or before.state == "removed" or (taken and before.number > taken.number):
                return before
            return before.changed(state="removed", state_reason=reason)

        self._change(key, version)

    def _change(self, key: str, decide: Callable[[NameRecord | None], NameRecord | None]) -> NameRecord:
        """Write the version of a name that `decide` makes of the latest one, on condition that nobody else did; index it."""
        latest = self.names().get(key) or next(self.history(key), None)
        if latest is not None and latest.state == "removed":
            latest = next(self.history(key), latest)  # the index may be ahead of a removal that was cut off
        while True:
            entry = decide(latest)
            if entry is None:
                raise UnknownName("embedding", key.partition("/")[2])
            text = entry.model_dump_json()
            if entry is latest or self._is_written(key, entry.number, text):
                self._ledger.put_name(key, entry.number, text)
                return entry
            latest = next(self._versions(key), None)

    def _is_written(self, key: str, number: int, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self._store.put_new(f"{_folder(key)}{number:08d}.json", text.encode(), digest)

    def _versions(self, key: str) -> Iterator[NameRecord]:
        """Yield the versions written under one name itself, the newest first."""
        for place in sorted(self._store.keys(_folder(key)), reverse=True):
            yield NameRecord.model_validate_json(self._store.get(place))

    def reindex(self) -> int:
        """Rebuild the index in Redis from S3, where the truth is; return how many names there are."""
        latest: dict[str, str] = {}
        for place in sorted(self._store.keys("embeddings/names/")):
            latest[place.rpartition("/")[0]] = place
        with ThreadPoolExecutor(_READERS) as pool:
            for text in pool.map(self._store.get, latest.values()):
                entry = NameRecord.model_validate_json(text)
                key = name_key(entry.record.owner, entry.record.name)
                self._ledger.put_name(key, entry.number, entry.model_dump_json(), anew=True)
        return len(latest)


def _unversioned(name: str) -> str:
    """Return a name to be changed.

    Raises:
        InvalidField: it names one of its versions, which are what they are.
    """
    if _VERSION.fullmatch(name.strip()):
        raise InvalidField("name", f"{name!r} is a version; versions cannot be changed, only the name without it")
    return name


def _decode(key: bytes, text: bytes) -> NameRecord:
    try:
        return NameRecord.model_validate_json(text)
    except ValueError as error:
        raise InvalidField("index", f"{key.decode()!r} cannot be read; run 'latentfarm embeddings reindex'") from error


def _says_the_same(before: NameRecord, record: EmbeddingRecord) -> bool:
    """Tell whether a version would add nothing: the file it came from first stays the one it is known by."""
    kept = before.record.model_copy(update={field: getattr(record, field) for field in _OF_THE_FILE})
    return before.state == "active" and not before.alias_of and kept == record


_OF_THE_FILE = ("file_sha256", "internal_name", "layout")


def _active(known: Mapping[str, EmbeddingRecord]) -> list[str]:
    return [record.name for record in known.values() if record.state == "active"]


def _folder(key: str) -> str:
    """Return where a name's versions lie; long ones by their hash, since keys have an end."""
    owner, _, lower = key.partition("/")
    quoted = quote(lower, safe="")
    short = quoted if len(quoted) <= 180 else "~" + hashlib.sha256(quoted.encode()).hexdigest()
    whose = "of-" + quote(owner, safe="") if owner else "farm"
    return f"embeddings/names/{whose}/{short}/"
