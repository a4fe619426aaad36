"""Deliveries sent: signed by Standard Webhooks, to public addresses, without following redirects."""

from __future__ import annotations

import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import httpcore2
from latentfarm_shared.errors import FarmError, InvalidField
from latentfarm_shared.logs import log
from standardwebhooks import Webhook

from latentfarm.addresses import PublicOnly, origin
from latentfarm.api.webhooks.hooks import Hooks
from latentfarm.api.webhooks.outbox import Attempt, Delivery, Outbox
from latentfarm.downloads import USER_AGENT
from latentfarm.farm import DirectFarm

AT_ONCE, BATCH = 8, 32
CONNECT_S, READ_S, TOTAL_S, TURN_S = 5.0, 15.0, 20.0, 45.0
GONE = 410


class Sender:
    """Sends what is due; call `step` about once a second, in as many processes as you like."""

    def __init__(self, farm: DirectFarm) -> None:
        """Send this farm's deliveries."""
        self._farm, self._hooks, self._outbox = farm, Hooks(farm), Outbox(farm)
        guard = PublicOnly(allow_private=farm.settings.allow_private_urls, total_s=TOTAL_S)
        self._pool = httpcore2.ConnectionPool(
            ssl_context=ssl.create_default_context(), network_backend=guard, max_keepalive_connections=0
        )
        self._threads = ThreadPoolExecutor(AT_ONCE, "webhook")

    def step(self) -> None:
        """Send what is due, several at once; return when each was answered or failed.

        Raises:
            Unavailable: Redis does not answer; what was sent meanwhile is sent again.
        """
        due = self._outbox.due(BATCH)
        for done in [self._threads.submit(self._handle, name) for name in due]:
            done.result()

    def _handle(self, name: str) -> None:
        if not self._farm.ledger.take_turn(f"deliver:{name}", TURN_S):
            return
        delivery = self._outbox.find(name)
        hook = None if delivery is None else self._hooks.find(delivery.owner, delivery.job, delivery.hook)
        if delivery is None or delivery.state != "pending" or hook is None or hook.disabled:
            self._outbox.forget(name)
            return
        attempt = self._try(delivery)
        changed = self._outbox.settle(delivery, attempt)
        self._farm.ledger.end_turn(f"deliver:{name}", 0.01)
        if attempt.status == GONE:
            self._disable(delivery)
        log.info("webhook", delivery=name, kind=delivery.event, status=attempt.status, state=changed.state)

    def _disable(self, delivery: Delivery) -> None:
        """Tell an address nothing more that says it is gone."""
        for hook in self._hooks.ls(delivery.owner, delivery.job):
            if hook.id == delivery.hook:
                self._hooks.put(hook.model_copy(update={"disabled": "the address answered 410 Gone"}))
        self._outbox.forget(delivery.id)

    def _try(self, delivery: Delivery) -> Attempt:
        """Send a delivery once; whatever goes wrong is told in the attempt."""
        began = time.time()

        def ended(status: int, reason: str = "") -> Attempt:
            return Attempt(at=began, status=status, reason=reason[:200], ms=int((time.time() - began) * 1000))

        try:
            origin(delivery.url)
            headers = self._signed(delivery)
            timeout = {"connect": CONNECT_S, "read": READ_S, "write": READ_S, "pool": READ_S}
            options: Any = {"timeout": timeout}
            body = delivery.payload.encode()
            with self._pool.stream(
                "POST", delivery.url, headers=list(headers.items()), content=body, extensions=options
            ) as answer:
                status = answer.status  # what they say beside it is not read
        except InvalidField as error:  # a private address
            return ended(0, error.reason)
        except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, OSError) as error:
            return ended(0, type(error).__name__)
        except FarmError as error:
            return ended(0, str(error))
        except Exception as error:  # noqa: BLE001 - an address that breaks us must not stop the others
            return ended(0, f"cannot be sent ({type(error).__name__})")
        redirected = "redirects are not followed; give the address it leads to"
        return ended(status, redirected if 300 <= status < 400 else "")

    def _signed(self, delivery: Delivery) -> dict[str, str]:
        """Return the headers that prove where a delivery comes from."""
        at = datetime.now(UTC)
        signature = Webhook(self._hooks.secret(delivery.owner)).sign(delivery.id, at, delivery.payload)
        return {
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            "webhook-id": delivery.id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": signature,
        }
