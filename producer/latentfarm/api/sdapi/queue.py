"""`/agent-scheduler/v1`: the queue extension's API, for reading, queueing, canceling, requeueing and results."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from fastapi import Path as InPath
from fastapi.responses import Response
from latentfarm_shared.errors import InvalidField, UnknownName
from latentfarm_shared.ledger import JobStatus

from latentfarm.api.callers import Caller, Reader, Submitter
from latentfarm.api.problems import documented
from latentfarm.api.sdapi.requests import MOST
from latentfarm.api.sdapi.tasks import Tasks
from latentfarm.api.sdapi.txt2img import submit_task
from latentfarm.jobs import Job

router = APIRouter(prefix="/agent-scheduler/v1", tags=["Agent Scheduler"], responses=documented())
STATES = {
    "queued": "pending", "paused": "pending", "running": "running", "succeeded": "done", "failed": "failed",
    "canceled": "interrupted", "expired": "interrupted",
}  # fmt: skip
PAGES = 10
Task = Annotated[str, InPath(max_length=200, description="The id a task was queued under.")]
Limit = Annotated[int, Query(ge=1, le=500)]
Offset = Annotated[int, Query(ge=0, le=5000)]


def _model(job: Job, status: JobStatus, position: int | None = None) -> dict[str, Any]:
    """Return a task as the extension describes it; times in milliseconds."""
    spec = job.spec
    return {
        "id": status.id,
        "api_task_id": status.id,
        "api_task_callback": None,
        "name": status.name or spec.prompt[:60],
        "type": "txt2img",
        "status": STATES[status.state],
        "params": json.dumps(spec.model_dump(mode="json", exclude_defaults=True), ensure_ascii=False),
        "priority": int(status.created * 1000),
        "position": position,
        "result": None,
        "bookmarked": False,
        "created_at": int(status.created * 1000),
        "updated_at": int((status.finished_at or status.created) * 1000),
    }


def _own(caller: Caller, task: str) -> Job:
    """Return a caller's task by its id or by the one it was queued under.

    Raises:
        UnknownName: there is none, as far as the caller is to know.
    """
    return Tasks(caller).find(task) or caller.farm.own_job(task)


def _failed(reason: object) -> dict[str, Any]:
    return {"success": False, "message": str(reason)}


@router.post(
    "/queue/txt2img",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Txt2ImgRequest"}}},
        }
    },
)
def queue_txt2img(request: Request, caller: Submitter, body: Annotated[dict[str, Any], Body()]) -> dict[str, str]:
    """Queue a task; the answer has its id at once."""
    if body.get("callback_url"):
        raise InvalidField("callback_url", "is not supported; ask for the task's state, or set up a webhook")
    return {"task_id": submit_task(request, caller, body).id}


@router.get("/queue")
def queue(caller: Reader, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
    """Return your tasks that are running or wait."""
    found = Tasks(caller).unfinished()
    running = next((status.id for status in found if status.state == "running"), None)
    waiting = [status for status in found if status.id != running]
    page = waiting[offset : offset + limit]
    return {
        "current_task_id": running,
        "pending_tasks": [_model(caller.farm.own_job(s.id), s, offset + place) for place, s in enumerate(page, 1)],
        "total_pending_tasks": len(waiting),
        "paused": bool(waiting) and all(status.state == "paused" for status in waiting),
    }


@router.get("/history")
def history(
    caller: Reader, status: Annotated[str, Query(max_length=20)] = "all", limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """Return your tasks that are over, the newest first."""
    found = [s for s in _tasks(caller) if s.is_final and status in ("all", STATES[s.state])]
    page = found[offset : offset + limit]
    return {"tasks": [_model(caller.farm.own_job(s.id), s) for s in page], "total": len(found)}


def _tasks(caller: Caller) -> Iterator[JobStatus]:
    """Yield the jobs a caller's owner submitted through A1111's API, the newest first, as far back as pages go."""
    before = None
    for _ in range(PAGES):
        page, before = caller.farm.ledger.jobs_before(500, before, caller.owner)
        yield from (status for status in page if "a1111" in status.tags)
        if before is None:
            return


@router.get("/task/{task:path}/position")
def position(caller: Reader, task: Task) -> dict[str, Any]:
    """Return where a task stands among yours that wait."""
    try:
        job = _own(caller, task)
    except UnknownName as error:
        return _failed(error)
    waiting = [status.id for status in Tasks(caller).unfinished()]
    place = waiting.index(job.id) if job.id in waiting else None
    return {"success": True, "data": {"status": STATES[job.status().state], "position": place}}


@router.get("/task/{task:path}/results", response_model=None)
def results(caller: Reader, task: Task, *, zip: Annotated[bool, Query()] = False) -> dict[str, Any] | Response:  # noqa: A002 - its name there
    """Return a task's pictures and their texts, or all in one archive."""
    try:
        job = _own(caller, task)
    except UnknownName as error:
        return _failed(error)
    if job.spec.total > MOST:
        return _failed(f"a job of more than {MOST} images has its results at /api/v1/jobs/{job.id}/images")
    images = [image for image in job.images if image.state == "succeeded"]
    if zip:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for image in images:
                archive.writestr(f"{image.index:05d}-{image.seed}.png", image.png())
        return Response(packed.getvalue(), media_type="application/zip")
    data = [
        {"image": "data:image/png;base64," + base64.b64encode(i.png()).decode(), "infotext": i.parameters}
        for i in images
    ]
    return {"success": True, "data": data}


@router.post("/task/{task:path}/requeue")
def requeue(caller: Submitter, task: Task) -> dict[str, Any]:
    """Draw again what failed or was canceled."""
    try:
        job = _own(caller, task)
    except UnknownName as error:
        return _failed(error)
    job.retry(missing=True)
    Tasks(caller).note(job)
    return {"success": True, "message": "Task is requeued", "task_id": job.id}


@router.post("/task/requeue-failed")
def requeue_failed(caller: Submitter) -> dict[str, Any]:
    """Draw again what failed in any of your tasks."""
    for status in _tasks(caller):
        if status.state == "failed":
            job = caller.farm.own_job(status.id)
            job.retry()
            Tasks(caller).note(job)
    return {"success": True, "message": "Failed tasks are requeued"}


@router.get("/task/{task:path}")
def get_task(caller: Reader, task: Task) -> dict[str, Any]:
    """Return a task."""
    try:
        job = _own(caller, task)
    except UnknownName as error:
        return _failed(error)
    return {"success": True, "data": _model(job, job.status())}


@router.delete("/task/{task:path}")
def delete_task(caller: Submitter, task: Task) -> dict[str, Any]:
    """Cancel a task; pictures that are drawn stay."""
    try:
        job = _own(caller, task)
    except UnknownName as error:
        return _failed(error)
    job.cancel()
    return {"success": True, "message": "Task is canceled"}


@router.post("/queue/pause")
def pause(caller: Submitter) -> dict[str, Any]:
    """Pause your tasks that wait; what is in flight goes on."""
    for status in Tasks(caller).unfinished():
        caller.farm.ledger.pause(status.id)
    return {"success": True, "message": "Queue is paused"}


@router.post("/queue/resume")
def resume(caller: Submitter) -> dict[str, Any]:
    """Let your tasks go on."""
    for status in Tasks(caller).unfinished():
        caller.farm.ledger.resume(status.id)
    return {"success": True, "message": "Queue is resumed"}


@router.post("/queue/clear")
def clear(caller: Submitter) -> dict[str, Any]:
    """Cancel your tasks that are not over."""
    for status in Tasks(caller).unfinished():
        caller.farm.ledger.cancel(status.id)
    return {"success": True, "message": "Queue is cleared"}
