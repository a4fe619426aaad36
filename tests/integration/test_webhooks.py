"""Webhooks on real servers, without workers: what is sent, to whom, how often, and what keeps it from being lost."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from latentfarm.api import create_app
from latentfarm.api.webhooks import HookWatcher, Outbox, Sender
from latentfarm.api.webhooks.hooks import Hook, HookRequest, Hooks
from latentfarm.farm import DirectFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.errors import BadSettings, InvalidField
from standardwebhooks import Webhook

KEY = "a long random text of the farm"


class Receiver:
    """Somebody's server: remembers what it got, answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], str]] = []
        self.answers: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                receiver.got.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.answers.pop(0) if receiver.answers else 204)
                self.send_header("location", "http://127.0.0.1:1/")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


@pytest.fixture
def farm(servers: DirectFarm) -> Iterator[DirectFarm]:
    """A farm in an owner's name that may call this machine."""
    servers.models.add(CHECKPOINT, "demo")
    found = servers.seen_by(f"o{secrets.token_hex(4)}")
    found.settings = servers.settings.model_copy(update={"secret_key": KEY, "allow_private_urls": True})
    yield found
    redis = servers.ledger.redis
    redis.delete(*(redis.keys("lf:hook*") or ["none"]))


@pytest.fixture
def forward(farm: DirectFarm) -> Callable[[], None]:
    watcher, sender = HookWatcher(farm), Sender(farm)

    def step() -> None:
        for _ in range(3):
            end_turns(farm)
            watcher.step()
            sender.step()

    return step


def end_turns(farm: DirectFarm) -> None:
    """Let the next step be done at once, whoever did the last."""
    redis = farm.ledger.redis
    redis.delete("lf:turn:webhooks", *redis.keys("lf:turn:deliver:*"))


def test_end_of_a_job_is_told_once_and_signed(
    farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]
) -> None:
    hooks = Hooks(farm)
    hooks.create(farm.owner, HookRequest(url=receiver.url, events=("job.completed",)))
    forward()
    job = farm.generate("a girl", count=2)
    forward()
    assert receiver.got == [], "nothing was over yet"
    job.cancel()
    forward()
    forward()

    ((headers, body),) = receiver.got
    event = Webhook(hooks.secret(farm.owner)).verify(body, headers)
    assert (event["type"], event["data"]["id"], event["data"]["state"]) == ("job.completed", job.id, "canceled")
    client = openai.OpenAI(api_key="none", webhook_secret=hooks.secret(farm.owner))
    assert client.webhooks.unwrap(body, headers).id == event["id"]


def test_job_may_bring_its_own_address(farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]) -> None:
    with TestClient(create_app(farm), base_url="http://localhost") as client:
        wrong = client.post("/api/v1/jobs", json={"prompt": "a", "webhook": {"url": "ftp://x"}})
        typo = client.post(
            "/api/v1/jobs", json={"prompt": "a", "webhook": {"url": receiver.url, "events": ["job.done"]}}
        )
        job = client.post("/api/v1/jobs", json={"prompt": "a", "webhook": {"url": receiver.url}}).json()
        client.post("/api/v1/jobs", json={"prompt": "another"})
        client.post(job["urls"]["cancel"])
    forward()

    assert (wrong.status_code, typo.status_code, typo.json()["field"]) == (422, 422, "webhook.events.0")
    assert [event["data"]["id"] for event in receiver.events] == [job["id"]]


def test_failed_delivery_is_tried_again_later(
    farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]
) -> None:
    hook = Hooks(farm).create(farm.owner, HookRequest(url=receiver.url))
    forward()
    receiver.answers = [500, 302]
    farm.generate("a girl").cancel()
    forward()
    forward()
    assert len(receiver.got) == 1, "not at once"
    for _ in range(2):
        make_due(farm)
        forward()

    (delivery,) = Outbox(farm).log(hook.id)
    assert [attempt.status for attempt in delivery.attempts] == [500, 302, 204]
    assert "redirects" in delivery.attempts[1].reason
    assert delivery.state == "delivered"
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def make_due(farm: DirectFarm) -> None:
    redis = farm.ledger.redis
    for name in redis.zrange("lf:hook:outbox", 0, -1):
        redis.zadd("lf:hook:outbox", {name: time.time() - 1})


def test_address_that_is_gone_is_told_nothing_more(
    farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]
) -> None:
    Hooks(farm).create(farm.owner, HookRequest(url=receiver.url))
    forward()
    receiver.answers = [410]
    farm.generate("a girl").cancel()
    forward()
    farm.generate("another").cancel()
    forward()

    assert len(receiver.got) == 1
    assert Hooks(farm).ls(farm.owner)[0].disabled


def test_private_addresses_are_not_called(farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]) -> None:
    hook = Hooks(farm).create(farm.owner, HookRequest(url=receiver.url.replace("127.0.0.1", "localhost")))
    farm.settings = farm.settings.model_copy(update={"allow_private_urls": False})
    forward()
    farm.generate("a girl").cancel()
    end_turns(farm)
    HookWatcher(farm).step()
    Sender(farm).step()

    assert receiver.got == []
    assert "private address" in Outbox(farm).log(hook.id)[0].attempts[0].reason


def test_whoever_watches_may_die_between_seeing_and_sending(farm: DirectFarm, receiver: Receiver) -> None:
    """A second process goes on where the first ended: nothing is lost, and nothing is told that did not happen."""
    Hooks(farm).create(farm.owner, HookRequest(url=receiver.url, events=("job.completed",)))
    HookWatcher(farm).step()
    jobs = [farm.generate(f"a girl {number}") for number in range(5)]
    for job in jobs:
        job.cancel()
    for _ in range(3):
        end_turns(farm)
        HookWatcher(farm).step()  # which dies here
    Sender(farm).step()

    assert sorted(event["data"]["id"] for event in receiver.events) == sorted(job.id for job in jobs)


def test_secret_is_encrypted_at_rest_and_needs_its_key(farm: DirectFarm) -> None:
    secret = Hooks(farm).secret(farm.owner)
    kept = farm.ledger.redis.get(f"lf:hook:secret:{farm.owner}")
    farm.settings = farm.settings.model_copy(update={"secret_key": "another long random text"})

    assert secret.startswith("whsec_")
    assert secret.removeprefix("whsec_").encode() not in kept
    with pytest.raises(BadSettings, match="LATENTFARM_SECRET_KEY"):
        Hooks(farm).secret(farm.owner)
    farm.settings = farm.settings.model_copy(update={"secret_key": None})
    with pytest.raises(BadSettings, match="LATENTFARM_SECRET_KEY"):
        Hooks(farm).create(farm.owner, HookRequest(url="https://example.com"))


def test_address_must_be_one(farm: DirectFarm) -> None:
    for url in ("ftp://example.com", "javascript:alert(1)", "https://", "https://user:pass@example.com"):
        with pytest.raises(InvalidField):
            Hooks(farm).create(farm.owner, HookRequest(url=url))


def test_deliveries_are_listed_and_sent_again(
    farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]
) -> None:
    with TestClient(create_app(farm), base_url="http://localhost") as client:
        hook = Hook.model_validate(client.post("/api/v1/webhooks", json={"url": receiver.url}).json())
        forward()
        farm.generate("a girl").cancel()
        forward()
        own = f"/api/v1/webhooks/{hook.id}"
        (delivery,) = client.get(f"{own}/deliveries").json()["items"]
        again = client.post(f"{own}/deliveries/{delivery['id']}/redeliver")
        forward()
        gone = client.delete(own)
        missing = client.get(own)

    assert (delivery["state"], again.status_code) == ("delivered", 200)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len(receiver.got) == 2
    assert (gone.status_code, missing.status_code) == (204, 404)


def test_end_of_a_batch_is_told(farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]) -> None:
    Hooks(farm).create(farm.owner, HookRequest(url=receiver.url, events=("batch.failed",)))
    app = create_app(farm)
    with TestClient(app, base_url="http://localhost") as client:
        file = client.post("/v1/files", files={"file": ("x.jsonl", b"nonsense")}, data={"purpose": "batch"}).json()[
            "id"
        ]
        begun = {"input_file_id": file, "endpoint": "/v1/images/generations", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=begun).json()["id"]
        until = time.monotonic() + 20
        while client.get(f"/v1/batches/{batch}").json()["status"] != "failed":
            assert time.monotonic() < until
            time.sleep(0.1)
        until = time.monotonic() + 5
        while not receiver.got and time.monotonic() < until:
            forward()
            time.sleep(0.1)

    assert [(event["type"], event["data"]) for event in receiver.events] == [("batch.failed", {"id": batch})]
    headers, body = receiver.got[0]
    unwrapped = openai.OpenAI(api_key="none", webhook_secret=Hooks(farm).secret(farm.owner)).webhooks.unwrap(
        body, headers
    )
    assert unwrapped.type == "batch.failed"


def test_nobody_hears_of_anothers_job(farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]) -> None:
    """Though they guess its id, and though a note of theirs was left beside it."""
    mallory = farm.seen_by("mallory")
    job = farm.generate("a girl")
    Hooks(mallory).create("mallory", HookRequest(url=receiver.url), job.id)
    job.cancel()
    forward()

    assert receiver.got == []


def test_what_happens_at_once_is_told_and_what_happened_long_ago_is_not(
    farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]
) -> None:
    farm.generate("long ago").cancel()
    hook = Hooks(farm).create(farm.owner, HookRequest(url=receiver.url))
    job = farm.generate("at once")
    job.cancel()
    forward()
    Hooks(farm).delete(hook)
    farm.generate("while nobody listened").cancel()
    Hooks(farm).create(farm.owner, HookRequest(url=receiver.url))
    forward()

    assert [event["data"]["id"] for event in receiver.events] == [job.id]


def test_job_that_is_retried_is_told_of_again(
    farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]
) -> None:
    Hooks(farm).create(farm.owner, HookRequest(url=receiver.url, events=("job.completed",)))
    job = farm.generate("a girl")
    job.cancel()
    forward()
    job.retry(missing=True)
    forward()
    job.cancel()
    forward()

    assert [event["data"]["id"] for event in receiver.events] == [job.id, job.id]


def test_deleted_address_is_told_nothing_that_waits(
    farm: DirectFarm, receiver: Receiver, forward: Callable[[], None]
) -> None:
    hook = Hooks(farm).create(farm.owner, HookRequest(url=receiver.url))
    receiver.answers = [500]
    farm.generate("a girl").cancel()
    forward()
    Hooks(farm).delete(hook)
    make_due(farm)
    forward()

    assert len(receiver.got) == 1
    assert farm.ledger.redis.zcard("lf:hook:outbox") == 0


def test_address_that_cannot_be_written_is_refused(farm: DirectFarm) -> None:
    with pytest.raises(InvalidField, match="ASCII"):
        Hooks(farm).create(farm.owner, HookRequest(url="https://exämple.com/hook"))
