"""`images/generations`, at once or as a stream, and the models there are."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Body, Header, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, Response, StreamingResponse
from latentfarm_shared.errors import FarmError, RenderError, UnknownName
from latentfarm_shared.ledger import Ledger
from latentfarm_shared.records import CheckpointRecord
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from latentfarm.api.callers import Reader, Submitter
from latentfarm.api.links import Links
from latentfarm.api.openai.requests import Wanted, wanted
from latentfarm.api.problems import addressed, documented, openai_style, problem_of
from latentfarm.api.submitting import digest_of, submit
from latentfarm.api.waits import LATER, Gone, Repeats, later, waited
from latentfarm.jobs import FarmImage, Job, WaitTimeout

router = APIRouter()
MAX_WAIT_S = 3600
CLOSED_REQUEST = 499
LOOK_S = 0.5
NO_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ImagesRequest"}}},
    }
}


class Drawn(Protocol):
    """Images that were asked for together."""

    @property
    def id(self) -> str:
        """Their job."""
        ...

    @property
    def images(self) -> list[FarmImage]:
        """How they stand now."""
        ...

    @property
    def created(self) -> float:
        """When they were asked for, in seconds since 1970."""
        ...


@dataclass(frozen=True)
class Order:
    """A request that was taken: its images, and how they are handed over."""

    job: Drawn
    wanted: Wanted
    base: str
    links: Links
    ledger: Ledger


@router.post("/images/generations", responses=documented(500, 504, also=LATER), openapi_extra=BODY, response_model=None)
async def generate(
    request: Request,
    caller: Submitter,
    body: Annotated[dict[str, Any], Body()],
    retries: Annotated[str | None, Header(alias="x-stainless-retry-count", max_length=10)] = None,
    wait: Annotated[int | None, Header(alias="X-Farm-Wait", ge=0, le=MAX_WAIT_S)] = None,
) -> Response:
    """Draw pictures. A client that was cut off and retries gets the job it started.

    With `X-Farm-Wait: N` the answer comes after N seconds at most: 202 with the job, which goes on.
    """
    limit = MAX_WAIT_S if wait is None else wait
    asked = await run_in_threadpool(wanted, body, caller.farm)
    repeats: Repeats = request.app.state.repeats
    held = repeats.held(
        caller,
        f"openai:{digest_of(body)}",
        lambda job_id: submit(request.app.state.callers, caller, asked.spec, job_id=job_id),
        is_retry=retries not in (None, "0"),
    )
    base = str(request.base_url).rstrip("/")
    if asked.stream:
        job = await held.__aenter__()  # left by the answer, whether the stream begins or not
        order = Order(job, asked, base, request.app.state.links, caller.farm.ledger)
        return _HeldStream(held, _streamed(request, job, order, limit))
    try:
        async with held as job:
            status = await waited(request, request.app.state.watch, job.id, limit)
            if not status.is_final and wait is not None:
                return later(job)
            if not status.is_final:
                raise WaitTimeout(job.id, limit)
            answer = await run_in_threadpool(
                answer_of, Order(job, asked, base, request.app.state.links, caller.farm.ledger)
            )
    except Gone:
        return Response(status_code=CLOSED_REQUEST)
    return JSONResponse(answer, headers={"x-farm-job-id": job.id})


class _HeldStream(StreamingResponse):
    """A stream that holds its request until it was sent, or the client is gone."""

    def __init__(self, held: AbstractAsyncContextManager[Job], content: AsyncIterator[bytes]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        except BaseException as error:
            await self._held.__aexit__(type(error), error, error.__traceback__)
            raise
        await self._held.__aexit__(None, None, None)


def answer_of(order: Order, link_s: int | None = None) -> dict[str, Any]:
    """Return OpenAI's answer for a job that is over.

    Raises:
        RenderError: an image failed, or the job was canceled.
    """
    images = order.job.images
    for image in images:
        _require(image)
    spec = order.wanted
    return {
        "created": int(order.job.created),
        "data": [picture_of(order, image, link_s) for image in images],
        "background": "opaque",
        "output_format": spec.form,
        "quality": spec.quality,
        "size": spec.size,
        "farm": {
            "job_id": order.job.id,
            "seeds": [image.seed for image in images],
            "infotexts": [image.parameters for image in images],
            "warnings": list(spec.warnings),
        },
    }


def _require_all(drawn: Drawn) -> None:
    for image in drawn.images:
        _require(image)


def _require(image: FarmImage) -> None:
    if image.state == "failed":
        raise RenderError((image.error or {}).get("message", "an image failed"))
    if image.state != "succeeded":
        raise RenderError(f"the job is {image.state}")


def picture_of(order: Order, image: FarmImage, link_s: int | None = None) -> dict[str, Any]:
    """Return a picture as a request wants it: in base64, or as an address that works without a key for a while."""
    if order.wanted.as_url:
        path = order.links.path(image.job, image.index, *([] if link_s is None else [link_s]))
        return {"url": order.base + path}
    return {"b64_json": base64.b64encode(_converted(image.png(), order.wanted)).decode()}


def _converted(png: bytes, asked: Wanted) -> bytes:
    """Return a picture in the format asked for."""
    if asked.form == "png":
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").save(out, asked.form.upper(), quality=max(1, asked.compression))
    return out.getvalue()


async def _streamed(request: Request, job: Job, order: Order, limit: float) -> AsyncIterator[bytes]:
    """Yield each picture as it is done; what goes wrong is told in the stream, for it has begun."""
    told, until, partials = set[int](), time.monotonic() + limit, _Partials()
    try:
        while True:
            status = await run_in_threadpool(job.status)
            for image in await run_in_threadpool(lambda: [i for i in job.images if i.index not in told]):
                if image.state == "succeeded":
                    told.add(image.index)
                    yield await run_in_threadpool(_completed, order, image)
            if status.is_final:
                break
            if time.monotonic() > until:
                raise WaitTimeout(job.id, limit)
            for partial in await run_in_threadpool(partials.news, order):
                yield partial
            await waited_for_news(request, job.id, status.version)
        await run_in_threadpool(_require_all, job)
    except FarmError as error:
        problem = problem_of(error)
        story = {"type": "error"} | openai_style(problem, problem.model_dump(exclude_none=True))
        yield f"event: error\ndata: {json.dumps(story)}\n\n".encode()


async def waited_for_news(request: Request, job: str, version: int) -> None:
    """Wait until something happened to a job since a version."""
    watch = request.app.state.watch
    tail = await watch.tail(job)
    with watch.followed(tail):
        if tail.status.version == version:
            await tail.moved(LOOK_S)


class _Partials:
    """What images in flight look like, as often as a request asked to see them."""

    def __init__(self) -> None:
        self._sent: dict[int, int] = {}

    def news(self, order: Order) -> list[bytes]:
        """Return events for images that went far enough since the last."""
        most, ledger = order.wanted.partial_images, order.ledger
        if not most:
            return []
        ledger.look(order.job.id)
        found = []
        for index, story in ledger.in_flight(order.job.id).items():
            sent, steps = self._sent.get(index, 0), float(story.get("steps", 0) or 1)
            is_due = float(story.get("step", 0)) / steps >= (sent + 1) / (most + 1)
            seen = ledger.seen(order.job.id, index) if is_due and sent < most else None
            if seen is not None:
                self._sent[index] = sent + 1
                found.append(_event("partial_image", order.wanted, seen, partial_image_index=sent))
        return found


def _completed(order: Order, image: FarmImage) -> bytes:
    farm = {"job_id": order.job.id, "seed": image.seed, "infotext": image.parameters}
    return _event("completed", order.wanted, image.png(), usage=NO_USAGE, farm=farm)


def _event(kind: str, asked: Wanted, png: bytes, **more: Any) -> bytes:
    event = {
        "type": f"image_generation.{kind}",
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": asked.form,
        "quality": asked.quality,
        "size": asked.size,
        "b64_json": base64.b64encode(_converted(png, asked)).decode(),
    } | more
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


@router.get("/models", responses=documented())
def models(caller: Reader) -> dict[str, Any]:
    """List the checkpoints as models."""
    return {"object": "list", "data": [_model(record) for record in caller.farm.models.ls()]}


@router.get("/models/{model:path}", responses=documented(404))
def model(caller: Reader, model: Annotated[str, InPath(max_length=200)]) -> dict[str, Any]:
    """Return one checkpoint as a model."""
    known = {record.name: record for record in caller.farm.models.ls()}
    if model not in known:
        with addressed():
            raise UnknownName.among("model", model, known)
    return _model(known[model])


def _model(record: CheckpointRecord) -> dict[str, Any]:
    return {"id": record.name, "object": "model", "created": 0, "owned_by": "latentfarm", "family": record.family}
