"""Images: what is known of one, its picture, and links that work without a key for a while."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi import Path as InPath
from fastapi.responses import Response
from latentfarm_shared.errors import UnknownName

from latentfarm.api.answers import LinkAnswer, answer
from latentfarm.api.callers import Caller, Reader
from latentfarm.api.problems import documented
from latentfarm.api.v1.jobs import JobId, own
from latentfarm.jobs import FarmImage
from latentfarm.views import ImageAnswer

router = APIRouter(tags=["images"])
Index = Annotated[int, InPath(ge=0, le=999_999, description="Which image of the job it is, from 0.")]
PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "The picture."}}


def image_of(caller: Caller, job_id: str, index: int) -> FarmImage:
    """Return an image of a caller's own job.

    Raises:
        UnknownName: there is none, as far as the caller is to know.
    """
    found = next(own(caller, job_id).iter_images(index, index + 1), None)
    if found is None:
        raise UnknownName("image", f"{job_id}/{index}")
    return found


@router.get(
    "/jobs/{job}/images/{index}.png",
    response_class=Response,
    responses=documented(404, 409, also=PNG | {304: {"description": "You have it."}}),
)
def picture(
    caller: Reader, job: JobId, index: Index, if_none_match: Annotated[str | None, Header(max_length=500)] = None
) -> Response:
    """Return a picture. What is published never changes."""
    found = image_of(caller, job, index)
    etag = f'"{job}-{index}"'
    if found.state == "succeeded" and if_none_match is not None and etag in if_none_match:
        return Response(status_code=304, headers={"etag": etag})
    headers = {"etag": etag, "cache-control": "private, max-age=31536000, immutable"}
    return Response(found.png(), media_type="image/png", headers=headers)


@router.get("/jobs/{job}/images/{index}", response_model=ImageAnswer, responses=documented(404))
def get_image(caller: Reader, job: JobId, index: Index) -> Response:
    """Return what is known of one image."""
    return answer(ImageAnswer.of(image_of(caller, job, index)))


@router.get("/jobs/{job}/images/{index}/link", response_model=LinkAnswer, responses=documented(404, 409))
def link(caller: Reader, job: JobId, index: Index, expires_in: Annotated[int, Query(ge=1, le=3600)] = 300) -> Response:
    """Return an address of the picture that whoever has it can read for so many seconds."""
    found = image_of(caller, job, index)
    found.require()
    url = caller.farm.store.link(found.key, expires_in)
    return answer(LinkAnswer(url=url, expires_in=expires_in), headers={"cache-control": "no-store"})
