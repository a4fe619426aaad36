"""Webhooks: addresses that are told what happens, what was sent to them, and the secret they can trust."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi import Path as InPath
from fastapi.responses import Response
from latentfarm_shared.errors import UnknownName
from pydantic import BaseModel

from latentfarm.api.answers import answer
from latentfarm.api.callers import Caller, Reader, Submitter
from latentfarm.api.problems import documented
from latentfarm.api.v1.jobs import own
from latentfarm.api.webhooks import Outbox
from latentfarm.api.webhooks.hooks import Hook, HookRequest, Hooks
from latentfarm.api.webhooks.outbox import Delivery

router = APIRouter(prefix="/webhooks", tags=["webhooks"])
HookId = Annotated[str, InPath(max_length=64, description="The webhook's id.")]
DeliveryId = Annotated[str, InPath(max_length=64, description="The delivery's id, which receivers get as webhook-id.")]

OfJob = Annotated[
    str | None,
    Query(max_length=64, pattern=r"^[\w-]+$", description="The job it was submitted with, if it is that job's own."),
]


class HookPage(BaseModel):
    """Webhooks, the oldest first."""

    items: list[Hook]


class DeliveryPage(BaseModel):
    """What was sent to an address, the newest first."""

    items: list[Delivery]


class SecretAnswer(BaseModel):
    """The secret that signs what is sent to you, as Standard Webhooks has it."""

    secret: str


@router.post("", status_code=201, response_model=Hook, responses=documented())
def create(caller: Submitter, body: HookRequest) -> Response:
    """Have an address told of your events."""
    return answer(Hooks(caller.farm).create(caller.owner, body), 201)


@router.get("", response_model=HookPage, responses=documented(404))
def list_hooks(caller: Reader, job: OfJob = None) -> Response:
    """List your webhooks, or those of one of your jobs."""
    owner = caller.owner if job is None else own(caller, job).status().owner
    return answer(HookPage(items=Hooks(caller.farm).ls(owner, job)))


@router.get("/secret", response_model=SecretAnswer, responses=documented())
def secret(caller: Submitter) -> Response:
    """Return the secret that signs what is sent to you."""
    found = Hooks(caller.farm).secret(caller.owner)
    return answer(SecretAnswer(secret=found), headers={"cache-control": "no-store"})


@router.post("/secret", response_model=SecretAnswer, responses=documented())
def rotate(caller: Submitter) -> Response:
    """Make another secret; what is sent from now on is signed with it."""
    found = Hooks(caller.farm).rotate(caller.owner)
    return answer(SecretAnswer(secret=found), headers={"cache-control": "no-store"})


def _hook(caller: Caller, webhook: str, job: str | None) -> Hook:
    """Return one of a caller's webhooks, or of a job of theirs.

    Raises:
        UnknownName: there is none, as far as the caller is to know.
    """
    hooks = Hooks(caller.farm)
    if job is None:
        return hooks.get(caller.owner, webhook)
    owner = own(caller, job).status().owner
    found = hooks.find(owner, job, webhook)
    if found is None or found.owner != owner:  # of somebody whose job had this id before
        raise UnknownName("webhook", webhook)
    return found


@router.get("/{webhook}", response_model=Hook, responses=documented(404))
def get_hook(caller: Reader, webhook: HookId, job: OfJob = None) -> Response:
    """Return a webhook."""
    return answer(_hook(caller, webhook, job))


@router.delete("/{webhook}", status_code=204, responses=documented(404))
def delete(caller: Submitter, webhook: HookId, job: OfJob = None) -> Response:
    """Tell an address nothing more."""
    Hooks(caller.farm).delete(_hook(caller, webhook, job))
    return Response(status_code=204)


@router.get("/{webhook}/deliveries", response_model=DeliveryPage, responses=documented(404))
def deliveries(caller: Reader, webhook: HookId, job: OfJob = None) -> Response:
    """Return what was sent to an address, with every try."""
    return answer(DeliveryPage(items=Outbox(caller.farm).log(_hook(caller, webhook, job).id)))


@router.post("/{webhook}/deliveries/{delivery}/redeliver", response_model=Delivery, responses=documented(404))
def redeliver(caller: Submitter, webhook: HookId, delivery: DeliveryId, job: OfJob = None) -> Response:
    """Send something again, whatever became of it."""
    return answer(Outbox(caller.farm).send_again(_hook(caller, webhook, job).id, delivery))
