"""`txt2img`: a job of a few images that a client waits for."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Request
from fastapi.responses import JSONResponse, Response
from latentfarm_shared.errors import InvalidField, RenderError
from latentfarm_shared.infotext import read_infotext
from latentfarm_shared.ledger import JobStatus
from latentfarm_shared.specs import JobSpec
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from latentfarm.api.callers import Caller, Submitter
from latentfarm.api.problems import documented
from latentfarm.api.sdapi.requests import Txt2ImgRequest, spec_of
from latentfarm.api.sdapi.tasks import PREFIX, Tasks, task_of
from latentfarm.api.submitting import digest_of, submit
from latentfarm.api.waits import LATER, Gone, Repeats, later, waited
from latentfarm.farm import DirectFarm
from latentfarm.jobs import FarmImage, Job, WaitTimeout

router = APIRouter(tags=["A1111"])
MAX_WAIT_S = 3600
CLOSED_REQUEST = 499
TASK_LENGTH = 200


class Txt2ImgAnswer(BaseModel):
    """PNGs in base64, the request, and A1111's story of them as JSON in a text; `job_id` is the farm's."""

    images: list[str]
    parameters: dict[str, Any]
    info: str
    job_id: str


@router.post(
    "/sdapi/v1/txt2img",
    response_model=Txt2ImgAnswer,
    responses=documented(409, 500, 504, also=LATER),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Txt2ImgRequest"}}},
        }
    },
)
async def txt2img(
    request: Request,
    caller: Submitter,
    body: Annotated[dict[str, Any], Body()],
    wait: Annotated[int | None, Header(alias="X-Farm-Wait", ge=0, le=MAX_WAIT_S)] = None,
) -> Response:
    """Draw. With `X-Farm-Wait: N` the answer comes after N seconds at most: 202 with the job, which goes on."""
    repeats: Repeats = request.app.state.repeats
    limit = MAX_WAIT_S if wait is None else wait
    try:
        held = repeats.held(
            caller, f"sdapi:{digest_of(body)}", lambda job_id: submit_task(request, caller, body, job_id)
        )
        async with held as job:
            status = await waited(request, request.app.state.watch, job.id, limit)
            if not status.is_final and wait is not None:
                return later(job)
            if not status.is_final:
                raise WaitTimeout(job.id, limit)
            found = await run_in_threadpool(_answer, body, job, status)
    except Gone:
        return Response(status_code=CLOSED_REQUEST)
    return JSONResponse(found, headers={"x-farm-job-id": job.id})


def submit_task(request: Request, caller: Caller, body: Mapping[str, Any], job_id: str | None = None) -> Job:
    """Submit the job of a request as one of the caller's tasks, under an id if one was chosen.

    Raises:
        UsageError, Busy, Unavailable: as DirectFarm.submit.
    """
    tasks = Tasks(caller)
    task = body.get("force_task_id") or f"task(txt2img-{secrets.token_hex(8)})"
    if not isinstance(task, str) or len(task) > TASK_LENGTH or not task.isprintable():
        raise InvalidField("force_task_id", f"should be a text of up to {TASK_LENGTH} characters")
    spec = spec_of(body, caller.farm, default_model(caller.farm, tasks), tasks.options())
    keyed = JobSpec.check(spec.model_dump(exclude_defaults=True) | {"key": PREFIX + task, "tags": ("a1111",)})
    job = submit(request.app.state.callers, caller, keyed, job_id=job_id, request=digest_of(body))
    tasks.note(job)
    return job


def default_model(farm: DirectFarm, tasks: Tasks) -> str:
    """Return the model a caller set in its options, else the first of the farm by name."""
    chosen = tasks.options().get("sd_model_checkpoint")
    if isinstance(chosen, str) and chosen:
        return chosen
    names = [record.name for record in farm.models.ls()]
    return names[0] if names else "demo"


def _answer(body: Mapping[str, Any], job: Job, status: JobStatus) -> dict[str, Any]:
    """Return what A1111 answers; of an interrupted job, the pictures there are.

    Raises:
        RenderError: an image failed.
    """
    images = job.images
    failed = next((image for image in images if image.state == "failed"), None)
    if failed is not None:
        story = failed.error or {}
        raise RenderError(story.get("message", "an image failed"))
    done = [image for image in images if image.state == "succeeded"]
    pictures = [] if body.get("send_images") is False else [base64.b64encode(i.png()).decode() for i in done]
    defaults = Txt2ImgRequest.model_construct().model_dump(mode="json")
    return {
        "images": pictures,
        "parameters": defaults | dict(body),
        "info": json.dumps(info_of(done, job, status), ensure_ascii=False),
        "job_id": job.id,
    }


def info_of(images: Sequence[FarmImage], job: Job, status: JobStatus) -> dict[str, Any]:
    """Return A1111's `info` of a job's pictures."""
    spec, lock = job.spec, job.lock
    texts = [image.parameters for image in images]
    drawn = spec.drawn()
    hires = drawn.hires
    seeds = [image.seed for image in images]
    varied = [image.image.variation_seed for image in images]
    fields = dict(read_infotext(texts[0]).fields) if texts else {}
    return {
        "prompt": drawn.prompt,
        "all_prompts": [drawn.prompt] * len(images),
        "negative_prompt": drawn.negative_prompt,
        "all_negative_prompts": [drawn.negative_prompt] * len(images),
        "seed": seeds[0] if seeds else spec.seed,
        "all_seeds": seeds,
        "subseed": varied[0] if varied else spec.variation_seed,
        "all_subseeds": varied,
        "subseed_strength": spec.variation_strength,
        "width": spec.width,
        "height": spec.height,
        "sampler_name": spec.sampler,
        "cfg_scale": spec.cfg_scale,
        "steps": spec.steps,
        "batch_size": len(images),
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": lock.checkpoint.name,
        "sd_model_hash": lock.checkpoint.weights_hash[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": spec.seed_resize[0] if spec.seed_resize else -1,
        "seed_resize_from_h": spec.seed_resize[1] if spec.seed_resize else -1,
        "denoising_strength": hires.denoising_strength if hires else None,
        "extra_generation_params": {name: fields[name] for name in _EXTRA if name in fields},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(status.created)),
        "clip_skip": spec.clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": fields.get("Version", ""),
        "task_id": task_of(status, job),
    }


_EXTRA = (
    "Hires upscale", "Hires steps", "Hires upscaler", "Hires sampler", "Hires schedule type", "Schedule type", "TI hashes", "NGMS",
    "Sigma churn", "Sigma noise", "Discard penultimate sigma", "Eta", "Emphasis",
)  # fmt: skip
