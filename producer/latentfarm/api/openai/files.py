"""`files`: what batches read and write. Contents lie in S3, what is known of them in Redis, by owner."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, UploadFile
from fastapi import Path as InPath
from fastapi.responses import StreamingResponse
from latentfarm_shared.errors import InvalidField, UnknownName
from latentfarm_shared.ledger.ledger import translated
from latentfarm_shared.parameters import short
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from latentfarm.api.callers import Reader, Submitter
from latentfarm.api.problems import documented
from latentfarm.farm import DirectFarm

router = APIRouter(prefix="/files")
MAX_FILE = 200 * 2**20
PART = 2**20
PURPOSES = ("batch", "batch_output")
FileId = Annotated[str, InPath(max_length=64, description="The file's id.")]


class FileObject(BaseModel):
    """OpenAI's file; times in seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class Files:
    """An owner's files."""

    def __init__(self, farm: DirectFarm) -> None:
        """Look at those of this owner."""
        self._farm, self._redis = farm, farm.ledger.redis
        self._index = f"lf:openai:files:{farm.owner}"

    def _place(self, file_id: str) -> str:
        return f"files/{file_id}"

    def put(
        self, path: Path, name: str, purpose: str, expires_in: int | None = None, file_id: str | None = None
    ) -> FileObject:
        """Keep a file's content, then note that it is there; the same id again replaces it."""
        now = int(time.time())
        found = FileObject(
            id=file_id or f"file-{secrets.token_hex(12)}",
            bytes=path.stat().st_size,
            created_at=now,
            expires_at=None if expires_in is None else now + expires_in,
            filename=name,
            purpose=purpose,
        )
        self._farm.store.upload(self._place(found.id), path)
        with translated():
            self._redis.hset(self._index, found.id, found.model_dump_json())
        return found

    def get(self, file_id: str) -> FileObject:
        """Return what is known of a file.

        Raises:
            UnknownName: there is none, as far as this owner is to know.
        """
        with translated():
            text = self._redis.hget(self._index, file_id)
        found = None if text is None else FileObject.model_validate_json(text)
        if found is None or (found.expires_at is not None and found.expires_at < time.time()):
            raise UnknownName("file", file_id)
        return found

    def ls(self) -> list[FileObject]:
        """Return all, the newest first; those whose time is over are deleted on the way."""
        with translated():
            found = [FileObject.model_validate_json(text) for text in self._redis.hvals(self._index)]
        now = time.time()
        for file in found:
            if file.expires_at is not None and file.expires_at < now:
                self.delete(file.id)
        kept = [file for file in found if file.expires_at is None or file.expires_at >= now]
        return sorted(kept, key=lambda file: (-file.created_at, file.id))

    def download(self, file_id: str, path: Path) -> None:
        """Fetch a file's content."""
        self.get(file_id)
        self._farm.store.download(self._place(file_id), path)

    def parts(self, file: FileObject) -> Iterator[bytes]:
        """Yield a file's content piece by piece."""
        for start in range(0, file.bytes, PART):
            yield self._farm.store.get_part(self._place(file.id), start, min(PART, file.bytes - start))

    def delete(self, file_id: str) -> None:
        """Delete a file.

        Raises:
            UnknownName: there is none.
        """
        with translated():
            gone = self._redis.hdel(self._index, file_id)
        if not gone:
            raise UnknownName("file", file_id)
        self._farm.store.delete_all(self._place(file_id))


@router.post("", response_model=FileObject, responses=documented(), max_body_size=MAX_FILE)
async def upload(
    caller: Submitter,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[str, Form(max_length=40)],
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2_592_000)] = None,
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
) -> FileObject:
    """Upload a file of requests for a batch, up to 200 MB."""
    del anchor  # the only one there is
    if purpose != "batch":
        raise InvalidField("purpose", f"should be batch, got {short(purpose)}")
    name = Path((file.filename or "file.jsonl").replace("\\", "/")).name[:200]
    with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
        path = Path(folder) / "upload"
        with path.open("wb") as target:
            await run_in_threadpool(shutil.copyfileobj, file.file, target, PART)
        return await run_in_threadpool(Files(caller.farm).put, path, name, purpose, seconds)


@router.get("", responses=documented(404))
def list_files(
    caller: Reader,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=40)] = None,
) -> dict[str, Any]:
    """List your files."""
    found = [file for file in Files(caller.farm).ls() if purpose in (None, file.purpose)]
    return page_of(found if order == "desc" else found[::-1], after, limit)


def page_of(found: list[Any], after: str | None, limit: int, kind: str = "file") -> dict[str, Any]:
    """Return OpenAI's page of objects behind the one called `after`.

    Raises:
        UnknownName: there is no such object.
    """
    ids = [item.id for item in found]
    if after is not None and after not in ids:
        raise UnknownName(kind, after)
    start = 0 if after is None else ids.index(after) + 1
    page = found[start : start + limit]
    return {
        "object": "list",
        "data": [json.loads(item.model_dump_json()) for item in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": start + limit < len(found),
    }


@router.get("/{file_id}", response_model=FileObject, responses=documented(404))
def get_file(caller: Reader, file_id: FileId) -> FileObject:
    """Return what is known of a file."""
    return Files(caller.farm).get(file_id)


@router.get(
    "/{file_id}/content",
    response_class=StreamingResponse,
    responses=documented(404, also={200: {"content": {"application/binary": {}}, "description": "Its content."}}),
)
def content(caller: Reader, file_id: FileId) -> StreamingResponse:
    """Return a file's content."""
    files = Files(caller.farm)
    found = files.get(file_id)
    headers = {"content-length": str(found.bytes)}
    return StreamingResponse(files.parts(found), media_type="application/binary", headers=headers)


@router.delete("/{file_id}", responses=documented(404))
def delete(caller: Submitter, file_id: FileId) -> dict[str, Any]:
    """Delete a file."""
    Files(caller.farm).delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}
