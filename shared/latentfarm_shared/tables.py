"""Rows and wildcard files that jobs were frozen to, in the store by their content: written once, read in pieces."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from latentfarm_shared.errors import RenderError
from latentfarm_shared.specs import JobSpec, Rows, Wildcard
from latentfarm_shared.storage import MissingObject, Store
from latentfarm_shared.sweeps.axes import Point

CHUNK_ROWS = 5000
CHUNKS_HELD = 4
LEVEL = 1


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
        """Freeze a wildcard's lines."""
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
            found = [str(chunk) for chunk in json.loads(self._get(rows.index))["chunks"]]
            with self._guard:
                self._indexes[rows.index] = found
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
        return found

    def _get(self, sha256: str) -> bytes:
        try:
            data = self._store.get(_key(sha256))
        except MissingObject as error:
            raise RenderError(f"the job's table {sha256[:12]} is gone from the store") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RenderError(f"the store holds something else than the job's table {sha256[:12]}")
        return data


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
        self._chunks: list[str] = []
        self.total = 0

    def add(self, row: Mapping[str, object]) -> None:
        """Add a row."""
        self._lines.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")))
        self.total += 1
        if len(self._lines) == CHUNK_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._lines:
            self._chunks.append(self._put(gzip.compress("\n".join(self._lines).encode(), LEVEL, mtime=0)))
            self._lines = []

    def close(self) -> Rows:
        """Write the rest and the index; return what a job names."""
        self._flush()
        index = {"chunks": self._chunks, "rows": CHUNK_ROWS, "total": self.total}
        return Rows(name=self._name, total=self.total, chunk=CHUNK_ROWS, index=self._put(json.dumps(index).encode()))
