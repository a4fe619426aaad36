"""Addresses of pictures that whoever has them can read for a while: served by this farm, signed, without a key."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import Response
from latentfarm_shared.errors import NotAllowed, UnknownName
from latentfarm_shared.ledger.ledger import translated

from latentfarm.api.problems import documented
from latentfarm.farm import DirectFarm

router = APIRouter(tags=["images"])
SECRET = "lf:api:secret"  # noqa: S105 - where it lies
HOUR_S = 3600


class Links:
    """Signs addresses with a secret that all processes of the farm share."""

    def __init__(self, farm: DirectFarm) -> None:
        """Ask for the secret when it is needed."""
        self._farm, self._secret = farm, b""

    def _signature(self, job: str, index: int, until: int) -> str:
        if not self._secret:
            with translated():
                self._farm.ledger.redis.set(SECRET, secrets.token_bytes(32), nx=True)
                self._secret = self._farm.ledger.redis.get(SECRET)
        return hmac.new(self._secret, f"{job}/{index}/{until}".encode(), hashlib.sha256).hexdigest()[:40]

    def path(self, job: str, index: int, seconds: int = HOUR_S) -> str:
        """Return the path of a picture with its signature, good for so many seconds."""
        until = int(time.time()) + seconds
        return f"/images/{job}/{index}.png?until={until}&signature={self._signature(job, index, until)}"

    def check(self, job: str, index: int, until: int, signature: str) -> None:
        """Make sure that an address was signed here and its time is not over.

        Raises:
            NotAllowed: it was not, or it is.
        """
        if not hmac.compare_digest(self._signature(job, index, until), signature):
            raise NotAllowed("this address is not one that the farm gave out")
        if until < time.time():
            raise NotAllowed("this address has expired; ask for the image again")


@router.get(
    "/images/{job}/{index}.png",
    response_class=Response,
    responses=documented(404, 409, also={200: {"content": {"image/png": {}}, "description": "The picture."}}),
)
def signed_picture(
    request: Request,
    job: Annotated[str, InPath(max_length=64)],
    index: Annotated[int, InPath(ge=0, le=999_999)],
    until: Annotated[int, Query(ge=0, le=10**11)],
    signature: Annotated[str, Query(max_length=64, pattern="^[0-9a-f]*$")],
) -> Response:
    """Return a picture to whoever has its signed address."""
    links: Links = request.app.state.links
    links.check(job, index, until, signature)
    farm: DirectFarm = request.app.state.callers.farm
    found = next(farm.own_job(job, anybodys=True).iter_images(index, index + 1), None)
    if found is None:
        raise UnknownName("image", f"{job}/{index}")
    left = max(0, until - int(time.time()))
    return Response(found.png(), media_type="image/png", headers={"cache-control": f"private, max-age={left}"})
