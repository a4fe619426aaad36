"""Where events go: an owner's addresses, for all of their work or for one job, and the secret that signs for them."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from typing import Literal, get_args

from cryptography.fernet import Fernet, InvalidToken
from latentfarm_shared.errors import BadSettings, InvalidField, UnknownName
from latentfarm_shared.ledger.ledger import translated
from latentfarm_shared.parameters import short
from latentfarm_shared.settings import secret_key_of
from pydantic import BaseModel, Field

from latentfarm.addresses import origin
from latentfarm.farm import DirectFarm

EventType = Literal[
    "job.started", "job.image", "job.paused", "job.completed",
    "batch.completed", "batch.failed", "batch.expired", "batch.cancelled",
]  # fmt: skip
EVENTS: tuple[EventType, ...] = get_args(EventType)
MOST = 100
CURSORS = "lf:hook:cursors"


class HookRequest(BaseModel):
    """An address to tell of events, all of them unless some are named; `job.image` at most every `throttle_s` a job."""

    url: str = Field(max_length=2000, examples=["https://example.com/hook"])
    events: tuple[EventType, ...] = Field((), max_length=len(EVENTS))
    throttle_s: float = Field(0.5, ge=0, le=3600)


class Hook(HookRequest):
    """An address that is told of an owner's events, or of one job's; `disabled` says why it is not any more."""

    id: str
    owner: str
    job: str | None = None
    created: float
    disabled: str = ""

    def wants(self, event: str, job: str | None) -> bool:
        """Tell whether an event is to be sent."""
        return not self.disabled and (not self.events or event in self.events) and self.job in (None, job)


class Hooks:
    """The farm's webhooks, in Redis; secrets lie there encrypted with `LATENTFARM_SECRET_KEY`."""

    def __init__(self, farm: DirectFarm) -> None:
        """Look at this farm's."""
        self._redis, self._key = farm.ledger.redis, secret_key_of(farm.settings)

    def create(self, owner: str, asked: HookRequest, job: str | None = None) -> Hook:
        """Note an address.

        Raises:
            InvalidField: it is none, or there are too many.
            BadSettings: the farm has no key to keep its secret with.
        """
        origin(asked.url)
        self.secret(owner)
        hook = Hook(**asked.model_dump(), id=f"wh_{secrets.token_hex(8)}", owner=owner, job=job, created=time.time())
        others = [] if job else self.ls(owner)
        if len(others) >= MOST:
            raise InvalidField("url", f"there are {MOST} webhooks already; delete some")
        if job is None and not others:
            self._begin(owner)
        self.put(hook)
        return hook

    def _begin(self, owner: str) -> None:
        """Have an owner's jobs told of from now on."""
        with translated():
            last = self._redis.zrevrange(f"lf:jobs:{owner}", 0, 0, withscores=True)
            self._redis.hset(CURSORS, owner, int(last[0][1]) if last else 0)

    def put(self, hook: Hook) -> None:
        """Write a webhook down."""
        with translated(), self._redis.pipeline() as pipe:
            pipe.hset(self._index(hook.owner, hook.job), hook.id, hook.model_dump_json())
            pipe.sadd("lf:hook:owners", hook.owner)
            if hook.job is not None:
                pipe.hsetnx("lf:hook:watched", hook.job, 0)
            pipe.execute()

    @staticmethod
    def _index(owner: str, job: str | None) -> str:
        return f"lf:hooks:{owner}" if job is None else f"lf:hooks:job:{job}"

    def ls(self, owner: str, job: str | None = None) -> list[Hook]:
        """Return an owner's webhooks, or those of one job, the oldest first."""
        with translated():
            found = self._redis.hvals(self._index(owner, job))
        hooks = [hook for hook in map(Hook.model_validate_json, found) if hook.owner == owner]
        return sorted(hooks, key=lambda hook: hook.created)

    def get(self, owner: str, hook_id: str) -> Hook:
        """Return one of an owner's webhooks.

        Raises:
            UnknownName: there is none, as far as the owner is to know.
        """
        found = self.find(owner, None, hook_id)
        if found is None:
            raise UnknownName("webhook", hook_id)
        return found

    def find(self, owner: str, job: str | None, hook_id: str) -> Hook | None:
        """Return a webhook, None if it was deleted."""
        with translated():
            text = self._redis.hget(self._index(owner, job), hook_id)
        return None if text is None else Hook.model_validate_json(text)

    def delete(self, hook: Hook) -> None:
        """Tell an address nothing more."""
        with translated():
            self._redis.hdel(self._index(hook.owner, hook.job), hook.id)

    def owners(self) -> list[str]:
        """Return who ever had a webhook."""
        with translated():
            return sorted(name.decode() for name in self._redis.smembers("lf:hook:owners"))

    # ---- secrets

    def secret(self, owner: str) -> str:
        """Return the secret that signs for an owner, made when it is first asked for.

        Raises:
            BadSettings: the farm has no key, or another than when the secret was made.
        """
        box, name = self._box(), f"lf:hook:secret:{owner}"
        with translated():
            found = self._redis.get(name)
            if found is None:
                made = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
                self._redis.set(name, box.encrypt(made.encode()), nx=True)
                found = self._redis.get(name)
        try:
            return box.decrypt(found).decode()
        except InvalidToken as error:
            reason = "is not the key that webhook secrets here were encrypted with; set the old one, or rotate them"
            raise BadSettings("LATENTFARM_SECRET_KEY", reason) from error

    def rotate(self, owner: str) -> str:
        """Make another secret for an owner; what is signed from now on is signed with it."""
        self._box()
        with translated():
            self._redis.delete(f"lf:hook:secret:{owner}")
        return self.secret(owner)

    def _box(self) -> Fernet:
        if self._key is None:
            raise BadSettings(
                "LATENTFARM_SECRET_KEY",
                f"is needed for webhooks; set it to a long random text, such as {short('openssl rand -hex 32')} gives",
            )
        return Fernet(base64.urlsafe_b64encode(hashlib.sha256(self._key.encode()).digest()))
