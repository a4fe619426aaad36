"""Which embeddings a worker has in memory: those most used up to its budget at the start, then whatever changes.

Names are followed through a stream in Redis, so that an embedding is here a moment after it was added; one that a job
needs and that is not here is fetched when the job is claimed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from latentfarm_shared.errors import FarmError
from latentfarm_shared.ledger import Ledger
from latentfarm_shared.library import EmbeddingLibrary
from latentfarm_shared.logs import log
from latentfarm_shared.records import EmbeddingRecord

from latentfarm_worker.bank import EmbeddingBank

FOLLOW_MS = 2000


class Residents:
    """Keeps a bank filled and says what is in it."""

    def __init__(self, bank: EmbeddingBank, library: EmbeddingLibrary, ledger: Ledger, worker: str) -> None:
        """Fetch nothing yet."""
        self._bank, self._library, self._ledger, self._worker = bank, library, ledger, worker
        self._widths: list[dict[str, int]] = []
        self._after = b""
        self._guard = threading.Lock()

    def preload(self, widths: Iterable[dict[str, int]]) -> None:
        """Fetch what fits checkpoints of these widths, the most used first, as far as the budget goes."""
        with self._guard:
            self._widths = list(widths)
            self._after = self._library.last_change()
            rank = {content_id: place for place, content_id in enumerate(self._library.uses())}
            names = self._library.names().values()
            records = [entry.record for entry in names if entry.state == "active" and not entry.alias_of]
            for record in sorted(records, key=lambda r: rank.get(r.content_id, len(rank))):
                if self._is_wanted(record) and self._bank.has_room(record):
                    self._hold(record)
        self.report()

    def follow(self) -> None:
        """Wait for names to change, for two seconds at most, and fetch what they stand for now."""
        self._after, keys = self._library.changes(self._after, FOLLOW_MS)
        names = self._library.names() if keys else {}
        for key in keys:
            entry = names.get(key)
            if entry and entry.state == "active" and not entry.alias_of and self._is_wanted(entry.record):
                self._hold(entry.record)
        self.report()

    def report(self) -> None:
        """Tell the farm what is in memory."""
        self._ledger.report_residents(self._worker, self._bank.resident())

    def _is_wanted(self, record: EmbeddingRecord) -> bool:
        return any(record.fits(widths) for widths in self._widths)

    def _hold(self, record: EmbeddingRecord) -> None:
        """Fetch one; a job that needs what cannot be had will say so."""
        try:
            self._bank.hold(record)
        except FarmError as error:
            log.warning("embedding cannot be fetched", embedding=record.name, error=str(error), worker=self._worker)
