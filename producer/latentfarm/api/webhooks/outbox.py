"""What is to be sent, and what became of it: written down before anything is sent, kept until it is delivered or given up."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any, Literal

from latentfarm_shared.errors import UnknownName
from latentfarm_shared.ledger.ledger import translated
from pydantic import BaseModel

from latentfarm.api.webhooks.hooks import Hook
from latentfarm.farm import DirectFarm

BACK_OFF_S = (5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600, 24 * 3600)
KEPT_S, LOGGED = 7 * 86400, 200
OUTBOX = "lf:hook:outbox"


class Attempt(BaseModel):
    """One try: the status it was answered with, 0 if with none, and why it failed."""

    at: float
    status: int
    reason: str = ""
    ms: int


class Delivery(BaseModel):
    """An event on its way to an address. `id` is what receivers tell repetitions by."""

    id: str
    hook: str
    owner: str
    url: str
    event: str
    job: str | None = None
    payload: str
    created: float
    state: Literal["pending", "delivered", "failed"] = "pending"
    attempts: tuple[Attempt, ...] = ()


def delivery_of(hook: Hook, event: str, what: str, data: dict[str, Any], at: float) -> Delivery:
    """Return an event for an address; the same `what` for the same address is the same delivery."""
    digest = hashlib.sha256(f"{hook.id}/{what}".encode()).hexdigest()[:32]
    body = {"id": f"evt_{digest}", "object": "event", "type": event, "created_at": int(at), "data": data}
    return Delivery(
        id=f"msg_{digest}",
        hook=hook.id,
        owner=hook.owner,
        url=hook.url,
        event=event,
        job=hook.job,
        payload=json.dumps(body, ensure_ascii=False, separators=(",", ":")),
        created=at,
    )


class Outbox:
    """Deliveries, in Redis."""

    def __init__(self, farm: DirectFarm) -> None:
        """Keep them in this farm's."""
        self._redis = farm.ledger.redis

    def add(self, pipe: Any, delivery: Delivery) -> None:
        """Write a delivery down with a transaction that notes that its event was seen; again changes nothing."""
        key = f"lf:hook:delivery:{delivery.id}"
        pipe.set(key, delivery.model_dump_json(), nx=True, ex=KEPT_S)
        pipe.zadd(OUTBOX, {delivery.id: time.time()}, nx=True)
        pipe.lrem(f"lf:hook:log:{delivery.hook}", 1, delivery.id)
        pipe.lpush(f"lf:hook:log:{delivery.hook}", delivery.id)
        pipe.ltrim(f"lf:hook:log:{delivery.hook}", 0, LOGGED - 1)
        pipe.expire(f"lf:hook:log:{delivery.hook}", KEPT_S)

    def due(self, limit: int) -> list[str]:
        """Return deliveries whose time has come."""
        with translated():
            return [name.decode() for name in self._redis.zrangebyscore(OUTBOX, "-inf", time.time(), 0, limit)]

    def find(self, delivery_id: str) -> Delivery | None:
        """Return a delivery, None if it is forgotten."""
        with translated():
            text = self._redis.get(f"lf:hook:delivery:{delivery_id}")
        return None if text is None else Delivery.model_validate_json(text)

    def log(self, hook: str) -> list[Delivery]:
        """Return the last deliveries to an address, the newest first."""
        with translated():
            names = self._redis.lrange(f"lf:hook:log:{hook}", 0, -1)
        found = (self.find(name.decode()) for name in names)
        return [delivery for delivery in found if delivery is not None]

    def settle(self, delivery: Delivery, attempt: Attempt) -> Delivery:
        """Note how a try ended: delivered, to be tried again, or given up."""
        tries = (*delivery.attempts, attempt)
        is_over = 200 <= attempt.status < 300
        again = None if is_over or len(tries) > len(BACK_OFF_S) else BACK_OFF_S[len(tries) - 1]
        state: Literal["pending", "delivered", "failed"] = "delivered" if is_over else "pending" if again else "failed"
        changed = delivery.model_copy(update={"attempts": tries[-20:], "state": state})
        with translated(), self._redis.pipeline() as pipe:
            pipe.set(f"lf:hook:delivery:{delivery.id}", changed.model_dump_json(), ex=KEPT_S)
            if again is None:
                pipe.zrem(OUTBOX, delivery.id)
            else:
                pipe.zadd(OUTBOX, {delivery.id: time.time() + again})
            pipe.execute()
        return changed

    def forget(self, delivery_id: str) -> None:
        """Send a delivery no more."""
        with translated():
            self._redis.zrem(OUTBOX, delivery_id)

    def send_again(self, hook: str, delivery_id: str) -> Delivery:
        """Send a delivery again, whatever became of it.

        Raises:
            UnknownName: the address has none of this id.
        """
        found = self.find(delivery_id)
        if found is None or found.hook != hook:
            raise UnknownName("delivery", delivery_id)
        again = found.model_copy(update={"state": "pending", "attempts": ()})
        with translated(), self._redis.pipeline() as pipe:
            pipe.set(f"lf:hook:delivery:{delivery_id}", again.model_dump_json(), ex=KEPT_S)
            pipe.zadd(OUTBOX, {delivery_id: time.time()})
            pipe.execute()
        return again
