"""What is written down of a batch, in Redis."""

from __future__ import annotations

import time
from typing import Any, Literal

from latentfarm_shared.errors import UnknownName
from latentfarm_shared.ledger.ledger import translated
from pydantic import BaseModel
from redis import WatchError

from latentfarm.api.webhooks.watcher import enqueue
from latentfarm.farm import DirectFarm

OPEN = "lf:openai:batches:open"
Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
FINAL = ("failed", "completed", "expired", "cancelled")


class LineError(BaseModel):
    """What is wrong with a line of a batch's file."""

    code: str
    line: int | None
    message: str
    param: str | None = None


class LineErrors(BaseModel):
    """Everything that is wrong with a file."""

    object: Literal["list"] = "list"
    data: list[LineError]


class RequestCounts(BaseModel):
    """How many requests there are, and what became of them."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(BaseModel):
    """OpenAI's batch; times in seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: LineErrors | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] | None = None


class Record(BaseModel):
    """A batch, and what it needs to go on; `jobs` are the farm's."""

    batch: Batch
    owner: str
    key: str | None = None
    jobs: tuple[str, ...] = ()
    base: str = ""

    def changed(self, **values: Any) -> Record:
        """Return the record with other values of the batch."""
        return self.model_copy(update={"batch": self.batch.model_copy(update=values)})


class Batches:
    """The farm's batches."""

    def __init__(self, farm: DirectFarm) -> None:
        """Keep them in this farm's Redis."""
        self._farm, self._redis = farm, farm.ledger.redis

    @staticmethod
    def _key(batch_id: str) -> str:
        return f"lf:openai:batch:{batch_id}"

    def put(self, record: Record, instead_of: Status | None = None) -> bool:
        """Write a batch down, and whether it is still under way; False if its status is not `instead_of` any more.

        Who wants to hear of its end is told in the same transaction.
        """
        batch = record.batch
        with translated(), self._redis.pipeline() as pipe:
            if instead_of is not None:
                pipe.watch(self._key(batch.id))
                if self.get(batch.id).batch.status != instead_of:
                    return False
                pipe.multi()
            pipe.set(self._key(batch.id), record.model_dump_json())
            pipe.zadd(f"lf:openai:batches:{record.owner}", {batch.id: batch.created_at})
            (pipe.srem if batch.status in FINAL else pipe.sadd)(OPEN, batch.id)
            if batch.status in FINAL:
                enqueue(self._farm, pipe, record.owner, f"batch.{batch.status}", batch.id)
            try:
                pipe.execute()
            except WatchError:
                return False
        return True

    def get(self, batch_id: str, owner: str | None = None) -> Record:
        """Return a batch, if it is this owner's.

        Raises:
            UnknownName: there is none, as far as the owner is to know.
        """
        with translated():
            text = self._redis.get(self._key(batch_id))
        record = None if text is None else Record.model_validate_json(text)
        if record is None or owner not in (None, record.owner):
            raise UnknownName("batch", batch_id)
        return record

    def ls(self, owner: str) -> list[Batch]:
        """Return an owner's batches, the newest first."""
        with translated():
            names = self._redis.zrevrange(f"lf:openai:batches:{owner}", 0, 9999)
            texts = self._redis.mget([self._key(name.decode()) for name in names]) if names else []
        return [Record.model_validate_json(text).batch for text in texts if text is not None]

    def unfinished(self) -> list[str]:
        """Return the batches that are under way."""
        with translated():
            return sorted(name.decode() for name in self._redis.smembers(OPEN))


def now() -> int:
    """Return the time as OpenAI tells it."""
    return int(time.time())
