"""Embeddings: list, look at, take in, name, remove."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, File, Form, Query, UploadFile
from fastapi import Path as InPath
from fastapi.responses import Response
from latentfarm_shared.errors import InvalidField, UnknownName
from latentfarm_shared.parameters import short
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from latentfarm.api.answers import answer
from latentfarm.api.callers import Librarian, Reader
from latentfarm.api.problems import addressed, documented, problem_of
from latentfarm.library import Taken
from latentfarm.views import EmbeddingAnswer

router = APIRouter(tags=["embeddings"])
MAX_UPLOAD = 32 * 2**20
SOURCES = ("https://", "http://", "civitai:")
Name = Annotated[str, InPath(max_length=200, description="NAME, or NAME@version.", examples=["corneo_dva"])]
Kind = Literal["Model", "Negative"]


class EmbeddingPage(BaseModel):
    """Embeddings by name."""

    items: list[EmbeddingAnswer]


class EmbeddingCardAnswer(BaseModel):
    """All that is known of an embedding; `norms` are those of its vectors, by encoder."""

    embedding: EmbeddingAnswer
    family: str
    norms: dict[str, list[float]]
    aliases: list[str]
    versions: list[str]
    pinned_by: int
    used_by: int
    duplicates: list[tuple[str, float]]
    has_preview: bool


class TakenAnswer(BaseModel):
    """What became of each file: the embeddings taken from it, or why it was refused."""

    items: list[dict[str, Any]]


@router.get("/embeddings", response_model=EmbeddingPage, responses=documented())
def list_embeddings(
    caller: Reader, *, everything: Annotated[bool, Query(description="Also what is disabled or removed.")] = False
) -> Response:
    """List the embeddings you can name: your own and the farm's."""
    found = caller.farm.embeddings.ls(everything=everything)
    return answer(EmbeddingPage(items=[EmbeddingAnswer.of(record) for record in found]))


@router.get("/embeddings/{name}", response_model=EmbeddingCardAnswer, responses=documented(404))
def get_embedding(caller: Reader, name: Name) -> Response:
    """Return all that is known of an embedding."""
    with addressed():
        card = caller.farm.embeddings.card(name)
        if card.record.state == "removed":
            raise UnknownName("embedding", name)
    return answer(
        EmbeddingCardAnswer(
            embedding=EmbeddingAnswer.of(card.record),
            family=caller.farm.embeddings.family(card.record),
            norms=card.norms,
            aliases=card.aliases,
            versions=card.versions,
            pinned_by=card.pinned_by,
            used_by=card.used_by,
            duplicates=card.duplicates,
            has_preview=card.has_preview,
        )
    )


@router.get(
    "/embeddings/{name}/preview",
    response_class=Response,
    responses=documented(404, also={200: {"content": {"image/png": {}}, "description": "The picture of its card."}}),
)
def get_preview(caller: Reader, name: Name) -> Response:
    """Return the picture of an embedding's card."""
    with addressed():
        record = caller.farm.embeddings.show(name)
        found = caller.farm.library.preview(record.content_id)
        if found is None:
            raise UnknownName("preview", name)
    return Response(found, media_type="image/png")


@router.post(
    "/embeddings", status_code=201, response_model=TakenAnswer, responses=documented(), max_body_size=MAX_UPLOAD
)
async def upload(
    caller: Librarian,
    file: Annotated[UploadFile, File(description="A file of any layout met in the wild.")],
    name: Annotated[str | None, Form(max_length=200)] = None,
    kind: Annotated[Kind | None, Form()] = None,
    *,
    allow_word: Annotated[bool, Form(description="The name may be a word that prompts use.")] = False,
) -> Response:
    """Take in an embedding's file; jobs submitted after this can name it."""
    stem = Path((file.filename or "embedding.pt").replace("\\", "/")).name or "embedding.pt"
    with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
        path = Path(folder) / "upload"
        path.write_bytes(await file.read())
        found = await run_in_threadpool(
            lambda: caller.farm.embeddings.add_upload(path, stem, name, allow_word=allow_word, kind=kind)
        )
    return _taken(found)


@router.post("/embeddings/import", status_code=201, response_model=TakenAnswer, responses=documented())
def import_embedding(
    caller: Librarian,
    source: Annotated[
        str,
        Body(
            embed=True, max_length=2000, examples=["civitai:1234"], description="An https address, or civitai:VERSION."
        ),
    ],
    name: Annotated[str | None, Body(embed=True, max_length=200)] = None,
    kind: Annotated[Kind | None, Body(embed=True)] = None,
    *,
    allow_word: Annotated[bool, Body(embed=True)] = False,
) -> Response:
    """Take in an embedding from an address or from Civitai."""
    if not source.startswith(SOURCES):
        raise InvalidField("source", f"should begin with https:// or civitai:, got {short(source)}")
    return _taken(caller.farm.embeddings.add_all(source, name, allow_word=allow_word, kind=kind))


def _taken(found: Sequence[Taken]) -> Response:
    """Tell what became of files; one that was refused alone is an error."""
    first = found[0].error
    if first is not None and len(found) == 1:
        raise first
    items: list[dict[str, Any]] = [
        {"source": taken.source, "embeddings": [EmbeddingAnswer.of(r).model_dump() for r in taken.records]}
        | ({"error": problem_of(taken.error).model_dump(exclude_none=True)} if taken.error else {})
        for taken in found
    ]
    return answer(TakenAnswer(items=items), 201)


@router.post("/embeddings/{name}/alias", response_model=EmbeddingAnswer, responses=documented(404))
def alias(
    caller: Librarian,
    name: Name,
    alias: Annotated[str, Body(embed=True, min_length=1, max_length=200)],
    *,
    allow_word: Annotated[bool, Body(embed=True)] = False,
) -> Response:
    """Give an embedding a second name."""
    with addressed():
        caller.farm.embeddings.show(name)
    return answer(EmbeddingAnswer.of(caller.farm.embeddings.alias(name, alias, allow_word=allow_word)))


@router.delete("/embeddings/{name}", status_code=204, responses=documented(404, 409))
def remove(
    caller: Librarian,
    name: Name,
    *,
    force: Annotated[bool, Query(description="Although an unfinished job uses it; that job keeps it.")] = False,
) -> Response:
    """Remove a name; jobs that have the embedding keep it."""
    with addressed():
        caller.farm.embeddings.rm(name, force=force)
    return Response(status_code=204)
