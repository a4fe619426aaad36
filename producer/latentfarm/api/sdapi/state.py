"""Progress, interrupt and settings, of the caller alone: another key's work is neither seen nor stopped."""

from __future__ import annotations

import base64
import time
import zlib
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from latentfarm_shared.a1111 import spec_from_request
from pydantic import BaseModel

from latentfarm.api.callers import Caller, Reader, Submitter
from latentfarm.api.problems import documented
from latentfarm.api.sdapi.requests import resolve_model, supported_settings, title_of
from latentfarm.api.sdapi.tasks import Tasks, fraction, task_of
from latentfarm.api.sdapi.txt2img import default_model
from latentfarm.farm import DirectFarm

router = APIRouter(tags=["A1111"], responses=documented())
AHEAD = 200


class TaskQuestion(BaseModel):
    """Which task is asked for."""

    id_task: str = ""
    id_live_preview: int = -1
    live_preview: bool = True


@router.get("/sdapi/v1/progress")
def progress(caller: Reader, *, skip_current_image: Annotated[bool, Query()] = False) -> dict[str, Any]:
    """Return how far your tasks are, all together; 0 and no job when nothing is under way."""
    statuses = Tasks(caller).unfinished()
    flights = {status.id: caller.farm.ledger.in_flight(status.id) for status in statuses}
    total = sum(status.total for status in statuses)
    done = sum(fraction(status, flights[status.id]) * status.total for status in statuses)
    share = done / total if total else 0.0
    began = min((status.created for status in statuses), default=time.time())
    flight = next((f for found in flights.values() for f in found.values()), {})
    left = total - sum(status.finished for status in statuses)
    seen = None if skip_current_image else _seen(caller.farm, flights)
    return {
        "progress": round(share, 4),
        "eta_relative": _eta(share, time.time() - began),
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": task_of(statuses[0], caller.farm.own_job(statuses[0].id)) if statuses else "",
            "job_count": left,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(began)) if statuses else "0",
            "job_no": sum(status.finished for status in statuses),
            "sampling_step": int(flight.get("step", 0)),
            "sampling_steps": int(flight.get("steps", 0)),
        },
        "current_image": None if seen is None else base64.b64encode(seen).decode(),
        "textinfo": str(flight.get("stage", "waiting in queue")) if statuses else None,
        "current_task": task_of(statuses[0], caller.farm.own_job(statuses[0].id)) if statuses else None,
    }


def _seen(farm: DirectFarm, flights: dict[str, dict[int, Any]]) -> bytes | None:
    """Return what the first image in flight looks like so far, and ask for more of it."""
    job = next((job for job, found in flights.items() if found), None)
    if job is None:
        return None
    farm.ledger.look(job)
    return farm.ledger.seen(job, min(flights[job]))


def _eta(share: float, seconds: float) -> float:
    return round(seconds / share - seconds, 2) if share > 0.01 else 0.0


@router.post("/internal/progress")
def task_progress(caller: Reader, question: TaskQuestion) -> dict[str, Any]:
    """Return how far one task is, by the id that was sent as `force_task_id`, or by the farm's."""
    job = Tasks(caller).find(question.id_task)
    empty = {"live_preview": None, "id_live_preview": -1, "textinfo": None, "eta": None, "progress": None}
    if job is None:
        return {"active": False, "queued": False, "completed": False} | empty
    status = job.status()
    if status.is_final:
        return {"active": False, "queued": False, "completed": True} | empty | {"progress": 1.0}
    flights = caller.farm.ledger.in_flight(status.id)
    queued = status.state in ("queued", "paused")
    share = fraction(status, flights)
    shown: dict[str, Any] = {}
    seen = _seen(caller.farm, {status.id: flights}) if question.live_preview else None
    number = -1 if seen is None else zlib.crc32(seen)
    if seen is not None and number != question.id_live_preview:
        picture = "data:image/png;base64," + base64.b64encode(seen).decode()
        shown = {"live_preview": picture, "id_live_preview": number}
    stage = next((str(f.get("stage")) for f in flights.values()), "starting")
    text = _place_in_queue(caller, job.id) if queued else stage
    eta = _eta(share, time.time() - status.created) or None
    return (
        {"active": not queued, "queued": queued, "completed": False}
        | empty
        | {"progress": share, "eta": eta, "textinfo": text}
        | shown
    )


def _place_in_queue(caller: Caller, job: str) -> str:
    waiting = [status.id for status in Tasks(caller).unfinished() if status.state == "queued"]
    place = waiting.index(job) + 1 if job in waiting else len(waiting)
    return f"In queue: {place}/{len(waiting)}"


@router.get("/internal/pending-tasks")
def pending_tasks(caller: Reader) -> dict[str, Any]:
    """Return your tasks that are not over."""
    tasks = [task_of(status, caller.farm.own_job(status.id)) for status in Tasks(caller).unfinished()]
    return {"size": len(tasks), "tasks": tasks}


@router.post("/sdapi/v1/interrupt")
def interrupt(caller: Submitter) -> dict[str, Any]:
    """Cancel your tasks that are under way; those of other keys go on."""
    for status in Tasks(caller).unfinished():
        caller.farm.ledger.cancel(status.id)
    return {}


@router.post("/sdapi/v1/skip")
def skip(caller: Submitter) -> dict[str, Any]:
    """Cancel the oldest of your tasks."""
    for status in Tasks(caller).unfinished()[:1]:
        caller.farm.ledger.cancel(status.id)
    return {}


@router.get("/sdapi/v1/options")
def get_options(caller: Reader) -> dict[str, Any]:
    """Return your settings: the model in use, and what A1111's clients look for."""
    tasks = Tasks(caller)
    chosen = resolve_model(default_model(caller.farm, tasks), caller.farm)
    return (
        DEFAULT_OPTIONS
        | tasks.options()
        | {"sd_model_checkpoint": title_of(chosen), "sd_checkpoint_hash": chosen.weights_hash}
    )


@router.post("/sdapi/v1/options")
def set_options(caller: Submitter, options: Annotated[dict[str, Any], Body()]) -> None:
    """Set your model, and settings that decide pictures; other keys' are their own."""
    model = options.get("sd_model_checkpoint")
    kept = supported_settings({name: value for name, value in options.items() if name != "sd_model_checkpoint"}, "")
    spec_from_request(kept)  # refuses values that make no sense
    if model is not None:
        kept["sd_model_checkpoint"] = resolve_model(str(model), caller.farm).name
    Tasks(caller).set_options(kept)


DEFAULT_OPTIONS: dict[str, Any] = {
    "samples_save": False,
    "samples_format": "png",
    "CLIP_stop_at_last_layers": 1,
    "sd_vae": "Automatic",
    "sd_vae_as_default": True,
    "live_previews_enable": True,
    "show_progress_every_n_steps": 10,
    "eta_noise_seed_delta": 0,
    "emphasis": "Original",
    "randn_source": "GPU",
    "img2img_fix_steps": False,
    "hide_samplers": [],
}
