"""Jobs: submit, plan, look, follow, steer."""

from __future__ import annotations

import json
import re
import secrets
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Depends, Header, HTTPException, Query, Request
from fastapi import Path as InPath
from fastapi.responses import Response, StreamingResponse
from fastapi.sse import format_sse_event
from latentfarm_shared.errors import FarmError, InvalidField
from latentfarm_shared.ledger import JobEvent, JobStatus
from latentfarm_shared.parameters import short
from latentfarm_shared.specs import JobSpec
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from latentfarm.api.answers import CausesAnswer, ImagePage, JobAnswer, JobPage, answer
from latentfarm.api.callers import Caller, Reader, Submitter
from latentfarm.api.problems import documented
from latentfarm.api.submitting import charged, check_job_id, digest_of, submit
from latentfarm.api.watch import News, Watch
from latentfarm.api.webhooks.hooks import HookRequest, Hooks
from latentfarm.jobs import Job
from latentfarm.planning import Plan
from latentfarm.views import ImageAnswer

MAX_WAIT_S = 300
IDLE_S = 15.0
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
EVENT_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Server-sent events."}
}
STILL_HERE = b": still here\n\n"
MAX_FILE = 256 * 2**20
_WAIT = re.compile(r"(?:^|[,;\s])wait(?:=(\d{1,6}))?(?:$|[,;\s])")

router = APIRouter(tags=["jobs"])
JobId = Annotated[
    str, InPath(max_length=64, pattern=r"^[\w-]+$", description="The job's id.", examples=["5f0c1d2e3b4a5968"])
]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=200,
        min_length=1,
        description="The same key with the same request again returns the first job.",
    ),
]
Prefer = Annotated[
    str | None,
    Header(max_length=200, description="`wait=N` holds the answer for up to N seconds until the job is over."),
]
DefaultLane = Annotated[Literal["interactive", "batch"] | None, Query(description="Where the file does not say.")]
DefaultModel = Annotated[str | None, Query(max_length=200, description="A checkpoint, where the file does not say.")]
EXAMPLES = {
    "one embedding": {
        "summary": "Four pictures of a character that an embedding stands for",
        "value": {"prompt": "masterpiece, corneo_dva", "embeddings": ["16-token-demo-neg:neg"], "seed": 43, "count": 4},
    },
    "a sweep": {
        "summary": "Every sampler with every CFG scale",
        "value": {
            "name": "samplers",
            "prompt": "a red circle",
            "lane": "batch",
            "axes": [{"field": "sampler", "values": ["Euler", "DDIM"]}, {"field": "cfg_scale", "values": [4, 7]}],
        },
    },
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/JobRequest"},
                "examples": EXAMPLES,
            }
        },
    }
}
Spec = Annotated[dict[str, Any], Body()]
"""A JobSpec, with an `id` if the client chooses one; checked by the farm, whose errors name field and nearest value."""


class JobRequest(JobSpec):
    """A job to submit."""

    id: str | None = Field(None, description="8 to 64 letters, digits, - and _; drawn if it is left out.")
    webhook: HookRequest | None = Field(None, description="An address that is told of this job.")


@dataclass(frozen=True)
class Followed:
    """A job that a client follows, having seen its events up to a version."""

    job: Job
    seen: int
    status: JobStatus


class FileAnswer(BaseModel):
    """The jobs of a file."""

    jobs: list[JobAnswer]


class EventAnswer(BaseModel):
    """What happened to a job since a version."""

    events: list[JobEvent]


def own(caller: Caller, job_id: str) -> Job:
    """Return a caller's own job; whoever administers the farm may have any.

    Raises:
        UnknownName: there is none, as far as the caller is to know.
    """
    return caller.farm.own_job(job_id, anybodys=caller.allows("admin"))


async def followed(
    caller: Reader,
    job: JobId,
    after: Annotated[int, Query(ge=0, le=10**12)] = 0,
    last: Annotated[str | None, Header(alias="Last-Event-ID", max_length=40)] = None,
) -> Followed:
    """Return the job that a stream of events is asked for, before the stream begins."""
    found = await run_in_threadpool(own, caller, job)
    status = await run_in_threadpool(found.status)
    seen = int(last) if last is not None and last.isdecimal() and len(last) < 16 else after
    if status.is_final and seen >= status.version:
        raise HTTPException(204)  # which tells a browser not to come back
    return Followed(found, seen, status)


def wait_of(prefer: str | None) -> int:
    """Return for how many seconds a client prefers to wait."""
    found = _WAIT.search(prefer or "")
    return 0 if found is None else min(int(found[1] or 60), MAX_WAIT_S)


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobAnswer,
    responses=documented(409, also={200: {"model": JobAnswer, "description": "The job is over."}}),
    openapi_extra=BODY,
)
async def submit_job(
    request: Request, caller: Submitter, spec: Spec, key: Key = None, prefer: Prefer = None
) -> Response:
    """Submit a job. 202 while it is rendered, 200 if it was over before the time to wait was."""
    job = await run_in_threadpool(_submit, request, caller, spec, key)
    watch: Watch = request.app.state.watch
    wait = wait_of(prefer)
    status = await watch.final(job.id, wait) if wait else await run_in_threadpool(job.status)
    found = JobAnswer.of(status)
    headers = {"location": found.urls.self, "etag": found.etag}
    headers |= {"preference-applied": f"wait={wait}"} if wait else {}
    return answer(found, 200 if status.is_final else 202, headers)


def _submit(request: Request, caller: Caller, values: dict[str, Any], key: str | None) -> Job:
    values = dict(values)
    job_id = values.pop("id", None)
    if job_id is not None and not isinstance(job_id, str):
        raise InvalidField("id", f"should be a text, got {short(job_id)}")
    digest = digest_of(values)
    told = _hook_of(values.pop("webhook", None))
    if key is not None:
        values["key"] = key
    spec = JobSpec.check(values)
    job_id = check_job_id(job_id) or secrets.token_hex(8)
    known = caller.farm.submitted(spec, job_id, digest)
    if known is not None or told is None:
        return known or submit(request.app.state.callers, caller, spec, job_id=job_id, request=digest)
    caller.farm.refuse_taken(job_id)
    hooks = Hooks(caller.farm)
    hook = hooks.create(caller.owner, told, job_id)  # first, so that nothing of the job is missed
    try:
        return submit(request.app.state.callers, caller, spec, job_id=job_id, request=digest)
    except FarmError:
        hooks.delete(hook)
        raise


def _hook_of(value: Any) -> HookRequest | None:
    """Return a webhook that a job asks for.

    Raises:
        InvalidField: it makes no sense.
    """
    if value is None:
        return None
    try:
        return HookRequest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["webhook", *(str(part) for part in first["loc"])])
        raise InvalidField(place, f"{first['msg'].lower()}, got {short(first['input'])}") from error


@router.post(
    "/jobs/files",
    status_code=202,
    response_model=FileAnswer,
    responses=documented(),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    max_body_size=MAX_FILE,
)
async def submit_file(
    request: Request,
    caller: Submitter,
    name: Annotated[str, Query(max_length=200, examples=["sweep.yaml"], description="Its ending tells what it is.")],
    *,
    anew: Annotated[bool, Query(description="Make new jobs instead of resuming those of the same file.")] = False,
    lane: DefaultLane = None,
    model: DefaultModel = None,
) -> Response:
    """Submit a sweep file or a table; the whole file is checked first. The same file again resumes."""
    with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
        path = await _received(request, Path(folder), name)
        jobs = await run_in_threadpool(_submit_file, request, caller, path, _defaults(lane, model), anew=anew)
        statuses = await run_in_threadpool(lambda: [JobAnswer.of(job.status()) for job in jobs])
    return answer(FileAnswer(jobs=statuses), 202)


def _defaults(lane: str | None, model: str | None) -> dict[str, str]:
    """Return what is meant where a file does not say."""
    return {name: value for name, value in (("lane", lane), ("model", model)) if value is not None}


def _submit_file(request: Request, caller: Caller, path: Path, defaults: dict[str, str], *, anew: bool) -> list[Job]:
    farm = caller.farm
    specs = farm.read_file(path, defaults).specs if caller.key and caller.key.images is not None else ()
    submitted = partial(farm.submit_file, path, anew=anew, defaults=defaults)
    return charged(request.app.state.callers, caller, specs, submitted)


async def _received(request: Request, folder: Path, name: str) -> Path:
    """Write a request's body to a file of this name.

    Raises:
        InvalidField: the name is none.
    """
    if "/" in name or "\\" in name or name.startswith(".") or not name.isprintable():
        raise InvalidField("name", "should be a file's name, such as sweep.yaml")
    path = folder / name
    try:
        with path.open("wb") as file:
            async for part in request.stream():
                file.write(part)
    except OSError as error:
        raise InvalidField("name", f"cannot be used ({error.strerror})") from error
    return path


@router.post("/plan", response_model=Plan, responses=documented(), openapi_extra=BODY)
def plan_job(caller: Reader, spec: Spec) -> Response:
    """Tell what a job would do, without submitting it."""
    values = {name: value for name, value in spec.items() if name != "id"}
    return answer(caller.farm.plan(JobSpec.check(values)))


@router.post(
    "/plan/files",
    response_model=Plan,
    responses=documented(),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
    max_body_size=MAX_FILE,
)
async def plan_file(
    request: Request,
    caller: Submitter,
    name: Annotated[str, Query(max_length=200)],
    lane: DefaultLane = None,
    model: DefaultModel = None,
) -> Response:
    """Tell what the jobs of a file would do, without submitting them."""
    with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
        path = await _received(request, Path(folder), name)
        found = await run_in_threadpool(
            lambda: caller.farm.plan(caller.farm.read_file(path, _defaults(lane, model)).specs)
        )
    return answer(found)


@router.get("/jobs", response_model=JobPage, responses=documented())
def list_jobs(
    caller: Reader,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[str | None, Query(pattern=r"^\d{1,15}$")] = None,
    state: Annotated[
        Literal["queued", "running", "paused", "succeeded", "failed", "canceled", "expired"] | None, Query()
    ] = None,
) -> Response:
    """List your jobs, the newest first."""
    ledger = caller.farm.ledger
    before = None if cursor is None else int(cursor)
    found: list[JobStatus] = []
    for _ in range(20):  # so many pages are looked at for one of a state
        page, before = ledger.jobs_before(limit - len(found), before, caller.owner)
        found += [status for status in page if state in (None, status.state)]
        if before is None or len(found) >= limit or state is None:
            break
    items = [JobAnswer.of(status) for status in found]
    return answer(JobPage(items=items, next=None if before is None else str(before)))


@router.get(
    "/jobs/{job}", response_model=JobAnswer, responses=documented(404, also={304: {"description": "Nothing changed."}})
)
def get_job(
    caller: Reader, job: JobId, if_none_match: Annotated[str | None, Header(max_length=500)] = None
) -> Response:
    """Return where a job stands; in constant time, however large it is."""
    found = JobAnswer.of(own(caller, job).status())
    if if_none_match is not None and found.etag in if_none_match:
        return Response(status_code=304, headers={"etag": found.etag})
    return answer(found, headers={"etag": found.etag, "cache-control": "private, no-cache"})


@router.get("/jobs/{job}/images", response_model=ImagePage, responses=documented(404))
def list_images(
    caller: Reader,
    job: JobId,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Annotated[str | None, Query(pattern=r"^\d{1,9}$")] = None,
) -> Response:
    """List a job's images, page by page."""
    found = own(caller, job)
    start = int(cursor or 0)
    items = [ImageAnswer.of(image) for image in found.iter_images(start, start + limit)]
    end = start + limit
    return answer(ImagePage(items=items, next=str(end) if end < found.spec.total else None))


@router.get("/jobs/{job}/history", response_model=EventAnswer, responses=documented(404))
def list_events(
    caller: Reader,
    job: JobId,
    after: Annotated[int, Query(ge=0, le=10**12)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> Response:
    """Return what happened since a version of the job's status, the oldest first."""
    return answer(EventAnswer(events=own(caller, job).events(after, limit)))


@router.get(
    "/jobs/{job}/events",
    response_class=StreamingResponse,
    responses=documented(404, also=EVENT_STREAM | {204: {"description": "Nothing more will happen."}}),
)
async def follow_job(request: Request, follows: Annotated[Followed, Depends(followed)]) -> Response:
    """Follow a job: `event` for each thing that happens, `status` behind them, `end` when nothing more will.

    A `gap` stands for what is too long ago to be known.

    An event's id is the job's version, so a stream that broke goes on where it ended.
    """
    news = _stream(request.app.state.watch, follows)
    return StreamingResponse(news, headers=STREAM_HEADERS, media_type="text/event-stream")


async def _stream(watch: Watch, follows: Followed) -> AsyncIterator[bytes]:
    state = follows.status.state
    async for news in watch.news(follows.job.id, follows.seen, IDLE_S):
        if news is None:
            yield STILL_HERE
        else:
            state = news.status.state
            news.encoded = news.encoded or _encoded(news)
            yield news.encoded
    yield format_sse_event(event="end", data_str=json.dumps({"state": state}))


def _encoded(news: News) -> bytes:
    """Return news as they are sent."""
    parts = []
    if news.events and news.events[0].version > news.after + 1:
        gap = {"from": news.after + 1, "to": news.events[0].version - 1}
        parts.append(format_sse_event(event="gap", data_str=json.dumps(gap)))
    parts += [
        format_sse_event(event="event", id=str(event.version), data_str=event.model_dump_json())
        for event in news.events
    ]
    parts.append(format_sse_event(event="status", data_str=JobAnswer.of(news.status).model_dump_json()))
    return b"".join(parts)


@router.get("/jobs/{job}/why", response_model=CausesAnswer, responses=documented(404))
def why(caller: Reader, job: JobId) -> Response:
    """Return why images of a job wait, each cause with a count and what would help."""
    own(caller, job)
    return answer(CausesAnswer(causes=caller.farm.why(job)))


@router.get(
    "/jobs/{job}/manifest",
    response_class=Response,
    responses=documented(404, also={200: {"content": {"application/x-ndjson": {}}, "description": "JSON lines."}}),
)
def manifest(caller: Reader, job: JobId, name: Literal["manifest", "failed"] = "manifest") -> Response:
    """Return a line for each image of a job that is over, or those that failed as jobs to submit again."""
    return Response(own(caller, job).manifest(name), media_type="application/x-ndjson")


Priority = Annotated[int, Body(embed=True, ge=-100, le=100, description="Above 0 goes before your other jobs.")]
Missing = Annotated[bool, Body(embed=True, description="Also what was canceled or has expired.")]


@router.post("/jobs/{job}/cancel", response_model=JobAnswer, responses=documented(404))
def cancel(caller: Submitter, job: JobId) -> Response:
    """Cancel what is not rendered yet; may be repeated."""
    return _told(caller, job, "cancel")


@router.post("/jobs/{job}/pause", response_model=JobAnswer, responses=documented(404))
def pause(caller: Submitter, job: JobId) -> Response:
    """Hand out no more images; what is in flight goes on."""
    return _told(caller, job, "pause")


@router.post("/jobs/{job}/resume", response_model=JobAnswer, responses=documented(404))
def resume(caller: Submitter, job: JobId) -> Response:
    """Go on after a pause."""
    return _told(caller, job, "resume")


@router.post("/jobs/{job}/approve", response_model=JobAnswer, responses=documented(404))
def approve(caller: Submitter, job: JobId) -> Response:
    """Go on behind the images that somebody was to see first."""
    return _told(caller, job, "approve")


@router.post("/jobs/{job}/retry", response_model=JobAnswer, responses=documented(404))
def retry(caller: Submitter, job: JobId, *, missing: Missing = False) -> Response:
    """Hand out again what failed."""
    found = own(caller, job)
    found.retry(missing=missing)
    return answer(JobAnswer.of(found.status()))


@router.post("/jobs/{job}/priority", response_model=JobAnswer, responses=documented(404))
def prioritise(caller: Submitter, job: JobId, priority: Priority) -> Response:
    """Put a job before or behind your others."""
    found = own(caller, job)
    found.prioritise(priority)
    return answer(JobAnswer.of(found.status()))


def _told(caller: Caller, job_id: str, order: str) -> Response:
    found = own(caller, job_id)
    getattr(found, order)()
    return answer(JobAnswer.of(found.status()))
