"""Embeddings in memory: up to a budget, the most used first, the least recently used given up, never one in use."""

from typing import Any

import numpy as np
import pytest
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.errors import RenderError
from latentfarm_shared.library import NameRecord
from latentfarm_shared.records import EmbeddingRecord
from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.residents import Residents

WIDTH, BYTES = 128, 4 * 128


class Shelf:
    """Embeddings of one vector by number; counts what was fetched."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    @staticmethod
    def file(number: int) -> EmbeddingFile:
        rows = np.full((1, WIDTH), number, np.float32)
        return EmbeddingFile(f"e-{number}", "kohya", None, "0" * 64, {"clip_l": rows})

    def record(self, number: int) -> EmbeddingRecord:
        return self.file(number).record()

    def embedding_tensors(self, record: EmbeddingRecord) -> bytes:
        self.fetched.append(record.name)
        return self.file(int(record.name.removeprefix("e-"))).normalised()


def test_least_recently_used_is_given_up_but_never_one_in_use() -> None:
    shelf = Shelf()
    bank = EmbeddingBank(shelf, 3 * BYTES)
    records = [shelf.record(number) for number in range(6)]
    with bank.using(records[:1]):
        for record in records[1:4]:
            bank.hold(record)
        assert bank.resident() == [records[i].content_id for i in (0, 2, 3)]
        assert float(bank.rows(records[0], "clip_l")[0, 0]) == 0
    bank.hold(records[2])
    bank.hold(records[4])

    assert bank.resident() == [records[i].content_id for i in (3, 2, 4)]
    assert not bank.has_room(records[5])


def test_what_is_not_what_its_hash_says_is_refused() -> None:
    shelf = Shelf()
    bank = EmbeddingBank(shelf)
    wrong = shelf.record(1).model_copy(update={"content_id": "f" * 64})

    with pytest.raises(RenderError, match="other tensors"):
        bank.hold(wrong)

    assert len(bank) == 0


class Library:
    """Names and uses, as a library tells them."""

    def __init__(self, records: list[EmbeddingRecord], used: list[str]) -> None:
        self._entries = {f"/{r.name}": NameRecord(number=1, record=r) for r in records}
        self._used, self.news = used, set[str]()

    def last_change(self) -> bytes:
        return b"1-0"

    def uses(self) -> list[str]:
        return self._used

    def names(self) -> dict[str, NameRecord]:
        return self._entries

    def changes(self, after: bytes, wait_ms: int) -> tuple[bytes, set[str]]:
        return after, self.news


class Ledger:
    """Keeps what a worker reported."""

    def __init__(self) -> None:
        self.reported: list[str] = []

    def report_residents(self, worker: str, content_ids: list[str]) -> None:
        self.reported = content_ids


def test_the_most_used_are_there_from_the_start_and_news_come_in() -> None:
    shelf, ledger = Shelf(), Ledger()
    records = [shelf.record(number) for number in range(6)]
    wide = records[5].model_copy(update={"name": "e-5", "widths": {"clip_l": 768}})
    used = [records[i].content_id for i in (4, 2)]
    library: Any = Library([*records[:5], wide], used)
    bank = EmbeddingBank(shelf, 3 * BYTES)
    residents = Residents(bank, library, ledger, "w")  # type: ignore[arg-type]

    residents.preload([{"clip_l": WIDTH}])

    assert shelf.fetched == ["e-4", "e-2", "e-0"]
    assert ledger.reported == [records[i].content_id for i in (4, 2, 0)]
    library.news = {"/e-3"}
    residents.follow()
    assert ledger.reported == [records[i].content_id for i in (2, 0, 3)]
