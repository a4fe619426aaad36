"""What A1111's clients ask for before they draw: names, embeddings, empty lists, and a picture's own text."""

from __future__ import annotations

import base64
import binascii
from typing import Any

from fastapi import APIRouter
from latentfarm_shared.errors import InvalidField
from latentfarm_shared.infotext import KEYWORD, read_infotext
from latentfarm_shared.names import LATENT_UPSCALERS, PLAIN_UPSCALERS, SAMPLERS, SCHEDULES, TRAITS
from latentfarm_shared.png import png_texts
from latentfarm_shared.records import EmbeddingRecord
from pydantic import BaseModel, Field

from latentfarm.api.callers import Reader, Submitter
from latentfarm.api.problems import documented
from latentfarm.api.sdapi.requests import resolve_model, title_of
from latentfarm.api.sdapi.tasks import Tasks
from latentfarm.api.sdapi.txt2img import default_model

router = APIRouter(tags=["A1111"], responses=documented())
MAX_PICTURE = 64 * 2**20
MIB = 2**20


@router.get("/sdapi/v1/samplers")
async def samplers(_caller: Reader) -> list[dict[str, Any]]:
    """List the samplers."""
    found = [TRAITS[name] for name in SAMPLERS]
    return [{"name": t.name, "aliases": list(t.aliases), "options": {"scheduler": t.schedule.lower()}} for t in found]


@router.get("/sdapi/v1/schedulers")
async def schedulers(_caller: Reader) -> list[dict[str, Any]]:
    """List the schedules."""
    return [
        {
            "name": name.lower().replace(" ", "_"),
            "label": name,
            "aliases": None,
            "default_rho": -1,
            "need_inner_model": False,
        }
        for name in SCHEDULES
    ]


@router.get("/sdapi/v1/sd-models")
def models(caller: Reader) -> list[dict[str, Any]]:
    """List the checkpoints; a `title` goes back into the options as it is."""
    return [
        {
            "title": title_of(record),
            "model_name": record.name,
            "hash": record.weights_hash[:10],
            "sha256": record.weights_hash,
            "filename": f"{record.name}.safetensors",
            "config": None,
        }
        for record in caller.farm.models.ls()
    ]


@router.get("/sdapi/v1/embeddings")
def embeddings(caller: Reader) -> dict[str, Any]:
    """Return the embeddings that the model in use can take, and those it cannot."""
    farm = caller.farm
    widths = resolve_model(default_model(farm, Tasks(caller)), farm).widths
    found = farm.embeddings.ls()
    return {
        "loaded": {record.name: _embedding(record) for record in found if record.fits(widths)},
        "skipped": {record.name: _embedding(record) for record in found if not record.fits(widths)},
    }


def _embedding(record: EmbeddingRecord) -> dict[str, Any]:
    return {
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
        "shape": sum(record.widths.values()),
        "vectors": record.vectors,
    }


@router.post("/sdapi/v1/refresh-embeddings")
@router.post("/sdapi/v1/refresh-checkpoints")
@router.post("/sdapi/v1/refresh-vae")
@router.post("/sdapi/v1/refresh-loras")
async def refresh(_caller: Submitter) -> None:
    """Do nothing: the farm follows changes by itself, and a job sees what was added before it."""


@router.get("/sdapi/v1/upscalers")
async def upscalers(_caller: Reader) -> list[dict[str, Any]]:
    """List the upscalers of pixels; None comes first."""
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4.0}
        for name in PLAIN_UPSCALERS
    ]


@router.get("/sdapi/v1/latent-upscale-modes")
async def latent_upscale_modes(_caller: Reader) -> list[dict[str, str]]:
    """List the upscalers of latents."""
    return [{"name": name} for name in LATENT_UPSCALERS]


@router.get("/sdapi/v1/loras")
@router.get("/sdapi/v1/hypernetworks")
@router.get("/sdapi/v1/face-restorers")
@router.get("/sdapi/v1/realesrgan-models")
@router.get("/sdapi/v1/prompt-styles")
@router.get("/sdapi/v1/extensions")
@router.get("/sdapi/v1/script-info")
@router.get("/sdapi/v1/sd-vae")
@router.get("/sdapi/v1/sd-modules")
async def nothing(_caller: Reader) -> list[Any]:
    """List nothing: the farm has none of these."""
    return []


@router.get("/sdapi/v1/scripts")
async def scripts(_caller: Reader) -> dict[str, list[str]]:
    """List no scripts."""
    return {"txt2img": [], "img2img": []}


@router.get("/sdapi/v1/cmd-flags")
async def flags(_caller: Reader) -> dict[str, Any]:
    """Return the flags clients look for."""
    return {"api": True, "ckpt_dir": None, "embeddings_dir": "embeddings"}


@router.get("/sdapi/v1/memory")
def memory(caller: Reader) -> dict[str, Any]:
    """Return the memory of the live workers' processes, in bytes, as A1111 lays it out."""
    used = sum(worker.memory_mb for worker in caller.farm.workers()) * MIB
    usage = {"free": 0, "used": used, "total": used}
    still = {"current": used, "peak": used}
    cuda = {
        "system": usage, "active": still, "allocated": still, "reserved": still, "inactive": still,
        "events": {"retries": 0, "oom": 0},
    }  # fmt: skip
    return {"ram": usage, "cuda": cuda}


class PngInfoRequest(BaseModel):
    """A picture in base64, plain or as a data: address."""

    image: str = Field(max_length=MAX_PICTURE)


@router.post("/sdapi/v1/png-info", max_body_size=MAX_PICTURE)
def png_info(_caller: Reader, question: PngInfoRequest) -> dict[str, Any]:
    """Read a picture's text; addresses are not fetched."""
    if question.image.startswith(("http://", "https://")):
        raise InvalidField("image", "should be the picture itself in base64; addresses are not fetched")
    text = question.image.partition(",")[2] if question.image.startswith("data:") else question.image
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidField("image", "is no base64") from error
    raw = next((value for key, value in png_texts(data) if key == KEYWORD), None)
    if raw is None:
        return {"info": "", "items": {}, "parameters": {}}
    info = raw.decode("utf-8", "replace")
    found = read_infotext(info)
    fields = {"Prompt": found.prompt, "Negative prompt": found.negative_prompt} | found.fields
    return {"info": info, "items": {"parameters": info}, "parameters": fields}


NOT_YET = {
    "img2img": "drawing from a picture",
    "extra-single-image": "upscaling alone",
    "extra-batch-images": "upscaling alone",
    "interrogate": "describing pictures",
    "unload-checkpoint": "unloading checkpoints, which workers do by themselves",
    "reload-checkpoint": "loading checkpoints, which workers do by themselves",
}


def _refuse(name: str) -> None:
    @router.post(f"/sdapi/v1/{name}", name=name, description=f"Not supported: {NOT_YET[name]}.")
    async def refused(_caller: Submitter) -> None:
        raise InvalidField(name, f"this farm does not do {NOT_YET[name]}")


for _name in NOT_YET:
    _refuse(_name)
