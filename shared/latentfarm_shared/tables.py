"""Rows and wildcard files that jobs were frozen to, in the store by their content: written once, read in pieces."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from latentfarm_shared.errors import InvalidField, RenderError
from latentfarm_shared.parameters import printable, short
from latentfarm_shared.specs import JobSpec, Rows, Wildcard
from latentfarm_shared.storage import MissingObject, Store
from latentfarm_shared.sweeps.axes import Point

CHUNK_ROWS = 5000
CHUNKS_HELD = 4
LEVEL = 1
PIECE_BYTES = 2**20
MAX_WILDCARD_LINE, WILDCARD_HELD = 20_000, 200


def _key(sha256: str) -> str:
    return f"tables/{sha256[:2]}/{sha256}"


class TableStore:
    """Writes and reads tables. Safe to share between threads; holds the pieces read last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._held: OrderedDict[str, list[Point]] = OrderedDict()
        self._indexes: dict[str, list[str]] = {}
        self._lines: dict[str, list[str]] = {}
        self._guard = threading.Lock()

    def writer(self, name: str) -> RowWriter:
        """Return what freezes rows, one after the other; the same rows again write nothing new."""
        return RowWriter(name, self.put)

    def put_wildcard(self, name: str, lines: Iterable[str]) -> Wildcard:
        """Freeze a wildcard's lines.

        Raises:
            InvalidField: it has no name, or lines that cannot stand in a prompt.
        """
        lines = list(lines)
        if not 1 <= len(name.strip()) <= 200 or not name.isprintable():
            raise InvalidField("wildcards", f"{short(name)} should be a name of up to 200 printable characters")
        for line in lines:
            if not line.strip() or len(line) > MAX_WILDCARD_LINE:
                raise InvalidField("wildcards", f"{name}: a line should have 1 to {MAX_WILDCARD_LINE} characters")
            try:
                printable(line)
            except ValueError as error:
                raise InvalidField("wildcards", f"{name}: a line {error}") from error
        return Wildcard(name=name, sha256=self.put("\n".join(lines).encode()))

    def put(self, data: bytes) -> str:
        """Write an object by its content; return its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._store.put_once(_key(sha256), data, "application/octet-stream", sha256)
        return sha256

    def of(self, spec: JobSpec) -> JobData:
        """Return what a job was frozen to."""
        return JobData(self, spec)

    def row(self, rows: Rows, number: int) -> Point:
        """Return one row.

        Raises:
            RenderError: what the store holds is not what was frozen.
        """
        if not 0 <= number < rows.total:
            raise IndexError(number)
        place, offset = divmod(number, rows.chunk)
        return self._chunk(self._index(rows)[place])[offset]

    def _index(self, rows: Rows) -> list[str]:
        with self._guard:
            found = self._indexes.get(rows.index)
        if found is None:
            index = json.loads(self._get(rows.index))
            found = [str(chunk) for chunk in index["chunks"]]
            if (index["rows"], index["total"]) != (rows.chunk, rows.total):
                raise RenderError(f"the job's table {rows.index[:12]} has other rows than the job says")
            with self._guard:
                self._indexes[rows.index] = found
                _forget_oldest(self._indexes)
        return found

    def _chunk(self, sha256: str) -> list[Point]:
        with self._guard:
            if sha256 in self._held:
                self._held.move_to_end(sha256)
                return self._held[sha256]
        rows = [json.loads(line) for line in gzip.decompress(self._get(sha256)).splitlines()]
        with self._guard:
            self._held[sha256] = rows
            if len(self._held) > CHUNKS_HELD:
                self._held.popitem(last=False)
        return rows

    def lines(self, wildcard: Wildcard) -> list[str]:
        """Return a wildcard's lines."""
        with self._guard:
            found = self._lines.get(wildcard.sha256)
        if found is None:
            found = self._get(wildcard.sha256).decode().splitlines()
            with self._guard:
                self._lines[wildcard.sha256] = found
                _forget_oldest(self._lines)
        return found

    def _get(self, sha256: str) -> bytes:
        try:
            data = self._store.get(_key(sha256))
        except MissingObject as error:
            raise RenderError(f"the job's table {sha256[:12]} is gone from the store") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RenderError(f"the store holds something else than the job's table {sha256[:12]}")
        return data


def _forget_oldest(held: dict[str, list[str]]) -> None:
    if len(held) > WILDCARD_HELD:
        del held[next(iter(held))]


class JobData:
    """The rows and wildcards of one job."""

    def __init__(self, tables: TableStore, spec: JobSpec) -> None:
        self._tables, self._spec = tables, spec

    @cached_property
    def _wildcards(self) -> dict[str, Wildcard]:
        return {wildcard.name.lower(): wildcard for wildcard in self._spec.wildcards}

    def row(self, number: int) -> Point:
        """Return a row, the fields it sets."""
        if self._spec.rows is None:
            raise IndexError(number)
        return self._tables.row(self._spec.rows, number)

    def wildcard(self, name: str) -> list[str]:
        """Return the lines of a wildcard. Raises KeyError."""
        return self._tables.lines(self._wildcards[name.lower()])


class RowWriter:
    """Freezes rows in chunks, so that memory stays flat; a table of one row is not written at all."""

    def __init__(self, name: str, put: Callable[[bytes], str]) -> None:
        self._name, self._put = name, put
        self._lines: list[str] = []
        self._size, self._packed = 0, b""
        self._chunks: list[str] = []
        self.total = 0

    def add(self, row: Mapping[str, object]) -> None:
        """Add a row."""
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
        self._lines.append(line)
        self._size += len(line)
        self.total += 1
        if self._size > PIECE_BYTES:
            self._pack()
        if self.total % CHUNK_ROWS == 0:
            self._flush()

    def _pack(self) -> None:
        """Compress what is held; pieces put together are one file."""
        if self._lines:
            self._packed += gzip.compress(("\n".join(self._lines) + "\n").encode(), LEVEL, mtime=0)
            self._lines, self._size = [], 0

    def _flush(self) -> None:
        self._pack()
        if self._packed:
            self._chunks.append(self._put(self._packed))
            self._packed = b""

    def close(self) -> Rows:
        """Write the rest and the index; return what a job names."""
        self._flush()
        index = {"chunks": self._chunks, "rows": CHUNK_ROWS, "total": self.total}
        return Rows(name=self._name, total=self.total, chunk=CHUNK_ROWS, index=self._put(json.dumps(index).encode()))
