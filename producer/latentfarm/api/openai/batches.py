"""`batches`: files of requests, drawn as jobs in the batch lane, answered with files."""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Query, Request
from fastapi import Path as InPath
from latentfarm_shared.errors import InvalidField, UnknownName
from pydantic import BaseModel, Field

from latentfarm.api.callers import Reader, Submitter
from latentfarm.api.openai.batch_records import Batch, Batches, Record, now
from latentfarm.api.openai.files import Files, page_of
from latentfarm.api.problems import documented
from latentfarm.jobfiles.values import duration

router = APIRouter(prefix="/batches")
BatchId = Annotated[str, InPath(max_length=64, description="The batch's id.")]


class NewBatch(BaseModel):
    """A batch to begin."""

    input_file_id: str = Field(max_length=64)
    endpoint: Literal["/v1/images/generations"]
    completion_window: str = Field("24h", max_length=10, pattern=r"^\d{1,4}[hd]$")
    metadata: dict[str, str] | None = Field(None, max_length=16)


@router.post("", response_model=Batch, responses=documented(404))
def create(request: Request, caller: Submitter, body: Annotated[NewBatch, Body()]) -> Batch:
    """Begin a batch of a file that was uploaded."""
    file = Files(caller.farm).get(body.input_file_id)
    if file.purpose != "batch":
        raise InvalidField("input_file_id", "should be a file with the purpose batch")
    at = now()
    batch = Batch(
        id=f"batch_{secrets.token_hex(12)}",
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        created_at=at,
        expires_at=at + int(duration("completion_window", body.completion_window)),
        metadata=body.metadata,
    )
    key = caller.key.id if caller.key else None
    base = str(request.base_url).rstrip("/")
    Batches(caller.farm).put(Record(batch=batch, owner=caller.owner, key=key, base=base))
    caller.farm.ledger.acknowledge()
    return batch


@router.get("", responses=documented(404))
def list_batches(
    caller: Reader,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """List your batches, the newest first."""
    return page_of(list(Batches(caller.farm).ls(caller.owner)), after, limit, "batch")


@router.get("/{batch_id}", response_model=Batch, responses=documented(404))
def get_batch(caller: Reader, batch_id: BatchId) -> Batch:
    """Return a batch."""
    return Batches(caller.farm).get(batch_id, caller.owner).batch


@router.post("/{batch_id}/cancel", response_model=Batch, responses=documented(404))
def cancel(caller: Submitter, batch_id: BatchId) -> Batch:
    """Cancel what is not drawn yet; what is drawn will be in the output file."""
    batches = Batches(caller.farm)
    record = batches.get(batch_id, caller.owner)
    before, at = record.batch.status, now()
    if before not in ("validating", "in_progress"):
        return record.batch
    record = record.changed(status="cancelling", cancelling_at=at)
    if not batches.put(record, instead_of=before):  # it has just gone on
        return cancel(caller, batch_id)
    for job in record.jobs:
        with suppress(UnknownName):
            caller.farm.ledger.cancel(job)
    return record.batch
