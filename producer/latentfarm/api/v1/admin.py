"""The farm itself: what it can draw with, who works, who may call, what owners may have."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi import Path as InPath
from fastapi.responses import Response
from latentfarm_shared.ledger import Limits, WorkerStatus
from latentfarm_shared.library import check_owner
from latentfarm_shared.names import LATENT_UPSCALERS, PLAIN_UPSCALERS, SAMPLERS, SCHEDULES, TRAITS
from pydantic import BaseModel

from latentfarm.api.answers import answer
from latentfarm.api.callers import Admin, Caller, Reader
from latentfarm.api.problems import addressed, documented
from latentfarm.keys import ApiKey, ApiKeys
from latentfarm.views import CheckpointAnswer

router = APIRouter(tags=["farm"])
EVERYBODY = "-"
Owner = Annotated[
    str, InPath(max_length=100, description="An owner, or - for everybody who has no limits of their own.")
]


class CheckpointPage(BaseModel):
    """Checkpoints by name."""

    items: list[CheckpointAnswer]


class SamplerAnswer(BaseModel):
    """A sampler; `schedule` is what Automatic means for it."""

    name: str
    aliases: tuple[str, ...]
    schedule: str


class NamesAnswer(BaseModel):
    """Names that can be asked for."""

    items: list[str]


class SamplerPage(BaseModel):
    """Samplers by A1111's names."""

    items: list[SamplerAnswer]


class WorkerPage(BaseModel):
    """Workers that are alive; `aside` are those set aside, each with its story."""

    items: list[WorkerStatus]
    aside: dict[str, str]


class KeyPage(BaseModel):
    """Keys, the newest first; their words are shown once, when they are made."""

    items: list[ApiKey]


class NewKey(ApiKey):
    """A key that was just made, with its word."""

    key: str


class Usage(BaseModel):
    """Images of an owner that wait, and that are being rendered."""

    queued: int
    running: int


class Whoami(BaseModel):
    """Who you are to the farm."""

    owner: str
    key: ApiKey | None
    limits: Limits
    queued: int
    running: int


@router.get("/checkpoints", response_model=CheckpointPage, responses=documented())
def list_checkpoints(caller: Reader) -> Response:
    """List the checkpoints jobs can ask for."""
    return answer(CheckpointPage(items=[CheckpointAnswer.of(record) for record in caller.farm.models.ls()]))


@router.get("/samplers", response_model=SamplerPage, responses=documented())
async def list_samplers(_caller: Reader) -> Response:
    """List the samplers."""
    found = [TRAITS[name] for name in SAMPLERS]
    items = [SamplerAnswer(name=t.name, aliases=t.aliases, schedule=t.schedule) for t in found]
    return answer(SamplerPage(items=items))


@router.get("/schedules", response_model=NamesAnswer, responses=documented())
async def list_schedules(_caller: Reader) -> Response:
    """List the schedules."""
    return answer(NamesAnswer(items=list(SCHEDULES)))


@router.get("/upscalers", response_model=NamesAnswer, responses=documented())
async def list_upscalers(_caller: Reader) -> Response:
    """List the upscalers of the hires fix."""
    return answer(NamesAnswer(items=[*LATENT_UPSCALERS, *PLAIN_UPSCALERS]))


@router.get("/workers", response_model=WorkerPage, responses=documented())
def list_workers(caller: Reader) -> Response:
    """List the workers; what they said last of others' images is for whoever administers the farm."""
    found = caller.farm.workers()
    if not caller.allows("admin"):
        found = [worker.model_copy(update={"last_error": ""}) for worker in found]
    return answer(WorkerPage(items=found, aside=caller.farm.ledger.aside() if caller.allows("admin") else {}))


Station = Annotated[str, InPath(max_length=200, description="A worker's name without its last number.")]


@router.post("/workers/{station}/drain", status_code=204, responses=documented(404))
def drain(caller: Admin, station: Station) -> Response:
    """Tell a worker to claim nothing more."""
    return _drained(caller, station, on=True)


@router.post("/workers/{station}/undrain", status_code=204, responses=documented(404))
def undrain(caller: Admin, station: Station) -> Response:
    """Tell a worker to go on."""
    return _drained(caller, station, on=False)


def _drained(caller: Caller, station: str, *, on: bool) -> Response:
    with addressed():
        caller.farm.ledger.drain(station, on=on)
    return Response(status_code=204)


@router.post("/workers/{station}/release", status_code=204, responses=documented(404))
def release(caller: Admin, station: Station) -> Response:
    """Let a worker that was set aside work again."""
    with addressed():
        caller.farm.ledger.let_back(station)
    return Response(status_code=204)


@router.get("/whoami", response_model=Whoami, responses=documented())
def whoami(caller: Reader) -> Response:
    """Return who you are, what you may have, and what you have."""
    ledger = caller.farm.ledger
    usage = ledger.usage(caller.owner)
    own, others = ledger.limits(caller.owner), ledger.limits(None)
    limits = Limits.model_validate(others.model_dump() | own.model_dump(exclude_none=True))
    return answer(Whoami(owner=caller.owner, key=caller.key, limits=limits, **usage))


@router.get("/keys", response_model=KeyPage, responses=documented())
def list_keys(request: Request, _caller: Admin) -> Response:
    """List the API keys."""
    return answer(KeyPage(items=_keys(request).ls()))


@router.post("/keys", status_code=201, response_model=NewKey, responses=documented())
def create_key(
    request: Request,
    _caller: Admin,
    owner: Annotated[str, Body(max_length=100, examples=["alice"])],
    scopes: Annotated[tuple[str, ...], Body(max_length=10)] = ("submit", "read", "embeddings"),
    name: Annotated[str, Body(max_length=100)] = "",
    images: Annotated[int | None, Body(ge=1, le=10**12, description="How many it may submit in all.")] = None,
    requests_per_minute: Annotated[int | None, Body(ge=1, le=10**6)] = None,
    expires_in: Annotated[float | None, Body(gt=0, lt=10**9, description="Seconds.")] = None,
) -> Response:
    """Make an API key. Its word is in this answer and nowhere else. From the first key on everybody needs one."""
    key, word = _keys(request).create(
        owner,
        scopes=scopes,
        name=name,
        images=images,
        requests_per_minute=requests_per_minute,
        expires_in=expires_in,
    )
    return answer(NewKey(**key.model_dump(), key=word), 201, {"cache-control": "no-store"})


@router.delete("/keys/{key}", status_code=204, responses=documented(404))
def revoke_key(request: Request, _caller: Admin, key: Annotated[str, InPath(max_length=64)]) -> Response:
    """Take a key away; it ends within a second."""
    _keys(request).revoke(key)
    return Response(status_code=204)


def _keys(request: Request) -> ApiKeys:
    found: ApiKeys = request.app.state.callers.keys
    return found


@router.get("/limits/{owner}", response_model=Limits, responses=documented())
def get_limits(caller: Admin, owner: Owner) -> Response:
    """Return what an owner may have."""
    return answer(caller.farm.ledger.limits(_owner(owner)))


@router.get("/limits/{owner}/usage", response_model=Usage, responses=documented())
def get_usage(caller: Admin, owner: Owner) -> Response:
    """Return what an owner has now."""
    return answer(Usage(**caller.farm.ledger.usage(_owner(owner) or "")))


@router.put("/limits/{owner}", response_model=Limits, responses=documented())
def set_limits(caller: Admin, owner: Owner, limits: Limits) -> Response:
    """Set what an owner may have: a weight in the fair share, images running at once, images queued."""
    caller.farm.ledger.set_limits(_owner(owner), limits)
    return answer(caller.farm.ledger.limits(_owner(owner)))


def _owner(owner: str) -> str | None:
    return None if owner == EVERYBODY else check_owner(owner)
