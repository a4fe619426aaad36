"""Who calls, and what they may: an API key as Bearer, Basic password or `X-API-Key`, or nobody on a farm without keys."""

from __future__ import annotations

import base64
import binascii
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated

from fastapi import Depends, Request
from latentfarm_shared.errors import Busy, NotAllowed
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from starlette.concurrency import run_in_threadpool

from latentfarm.farm import DirectFarm
from latentfarm.keys import ApiKey, ApiKeys, Scope

SCHEMES = ("bearer", "token", "key")
ANYBODY = "anybody"
ASK_S, LOOKS = 0.2, ("GET", "HEAD")


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request; `farm` acts in their name, `id` is their key's."""

    id: str
    farm: DirectFarm
    key: ApiKey | None = None

    def allows(self, scope: Scope) -> bool:
        """Tell whether the caller may do such things."""
        return self.key is None or self.key.allows(scope)

    @property
    def owner(self) -> str:
        """In whose name they act."""
        return self.farm.owner


@dataclass
class Callers:
    """Tells who calls. Without any key everybody who reaches this server is the farm's owner."""

    farm: DirectFarm
    keys: ApiKeys
    _limiter: FixedWindowRateLimiter = field(default_factory=lambda: FixedWindowRateLimiter(MemoryStorage()))
    _are_needed: bool = False
    _asked: float = -math.inf

    def __post_init__(self) -> None:
        """Remember a view of the farm for each owner."""
        self._seen_by = lru_cache(1000)(self.farm.seen_by)

    async def find(self, request: Request) -> Caller:
        """Return who sends a request.

        Raises:
            NotAllowed: a key is needed, and it is missing, unknown or expired.
            Busy: the key's requests of this minute are used up.
        """
        if not await self._need_keys(request.method):
            return Caller(ANYBODY, self.farm)
        word = key_of(request)
        if word is None:
            raise NotAllowed("an API key is needed: send it as 'Authorization: Bearer KEY'", is_known=False)
        find = self.keys.find
        key = find(word) if self.keys.is_remembered(word) else await run_in_threadpool(find, word)
        if key.requests_per_minute is not None:
            self._count(key, key.requests_per_minute)
        return Caller(key.id, self._seen_by(key.owner), key)

    async def _need_keys(self, method: str) -> bool:
        """Tell whether callers need keys; once they do, they always will. Those who only look are told again after a moment."""
        if not self._are_needed and (method not in LOOKS or time.monotonic() - self._asked > ASK_S):
            self._are_needed = await run_in_threadpool(self.keys.are_needed)
            self._asked = time.monotonic()
        return self._are_needed

    def _count(self, key: ApiKey, most: int) -> None:
        limit = RateLimitItemPerMinute(most)
        if not self._limiter.hit(limit, key.id):
            at, _ = self._limiter.get_window_stats(limit, key.id)
            raise Busy(f"this key may send {most} requests a minute", max(1, int(at - time.time()) + 1))


def key_of(request: Request) -> str | None:
    """Return the key a request carries, None if it carries none."""
    plain = request.headers.get("x-api-key")
    if plain:
        return plain.strip()
    scheme, _, rest = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() in SCHEMES:
        return rest.strip() or None
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def needs(scope: Scope) -> Callable[[Request], Awaitable[Caller]]:
    """Return a dependency that lets callers in who have a scope."""

    async def caller(request: Request) -> Caller:
        found: Caller = request.state.caller  # the guard knows
        if not found.allows(scope):
            raise NotAllowed(f"this API key may not do that; it needs the scope {scope!r}")
        return found

    return caller


Reader = Annotated[Caller, Depends(needs("read"))]
Submitter = Annotated[Caller, Depends(needs("submit"))]
Librarian = Annotated[Caller, Depends(needs("embeddings"))]
Admin = Annotated[Caller, Depends(needs("admin"))]
