"""Polls are answered from memory, and never tell what was before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any

import pytest
from latentfarm.api.app import create_app
from latentfarm.api.polls import Looks, Polls
from latentfarm.farm import DirectFarm
from latentfarm.jobs import Job
from latentfarm.keys import ApiKeys
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.errors import Unavailable
from latentfarm_shared.ledger import Ledger, Stamp
from latentfarm_shared.specs import JobSpec
from starlette.testclient import TestClient

BASE = "http://localhost"


@pytest.fixture
def farm(servers: DirectFarm) -> DirectFarm:
    servers.models.add(CHECKPOINT, "demo")
    return servers


@pytest.fixture
def counted(farm: DirectFarm, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every job whose status was read for a route."""
    read: list[str] = []
    status = Ledger.status

    def noted(self: Ledger, job: str) -> object:
        read.append(job)
        return status(self, job)

    monkeypatch.setattr(Ledger, "status", noted)
    return read


@pytest.fixture
def job(farm: DirectFarm) -> Iterator[Job]:
    found = farm.submit(JobSpec.check({"prompt": "a girl", "count": 3}))
    yield found
    found.cancel()


@pytest.fixture
def client(farm: DirectFarm) -> Iterator[TestClient]:
    with TestClient(create_app(farm), base_url=BASE) as found:
        yield found


@pytest.mark.parametrize("path", ["", "/images/1", "/history?limit=5"])
def test_job_that_did_not_change_is_answered_from_memory(
    client: TestClient, job: Job, counted: list[str], path: str
) -> None:
    url = f"/api/v1/jobs/{job.id}{path}"
    first = client.get(url)
    reads = len(counted)
    again = client.get(url)

    assert len(counted) == reads > 0
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert again.headers["x-content-type-options"] == "nosniff"


def test_whoever_changes_a_job_sees_it_at_once(client: TestClient, job: Job) -> None:
    url = f"/api/v1/jobs/{job.id}"
    etag = client.get(url).headers["etag"]
    assert client.get(url, headers={"if-none-match": etag}).status_code == 304
    assert client.get(url, headers={"if-none-match": etag}).status_code == 304
    job.pause()
    assert client.get(url).json()["state"] == "paused"
    assert client.get(url, headers={"if-none-match": etag}).status_code == 200
    job.resume()
    assert client.get(url).json()["state"] == "queued"
    job.prioritise(7)
    assert client.get(url).json()["priority"] == 7
    job.cancel()
    assert client.get(url).json()["counts"]["canceled"] == 3
    assert client.get(f"{url}/images/0").json()["state"] == "canceled"


def test_answers_are_their_askers_own(farm: DirectFarm, job: Job) -> None:
    keys = ApiKeys(farm.ledger)
    _, mine = keys.create(farm.owner or "own", scopes=("admin", "read"))
    _, theirs = keys.create("bob")
    try:
        with TestClient(create_app(farm), base_url=BASE) as client:
            url = f"/api/v1/jobs/{job.id}"
            for _ in range(2):
                assert client.get(url, headers={"x-api-key": mine}).status_code == 200
                assert client.get(url, headers={"x-api-key": theirs}).status_code == 404
    finally:
        farm.ledger.redis.delete("lf:api:keys", "lf:api:closed")


def test_one_look_serves_all_who_gathered() -> None:
    looks: list[list[str]] = []
    began, gate = threading.Event(), threading.Event()

    class Slow:
        def stamps(self, jobs: list[str]) -> list[Stamp | None]:
            looks.append(jobs)
            began.set()
            gate.wait(10)
            return [(job.encode(),) for job in jobs]

    async def ask() -> list[Stamp | None]:
        found = Looks(Slow())  # type: ignore[arg-type]
        first = asyncio.create_task(found.stamp("a"))
        await asyncio.to_thread(began.wait, 10)
        rest = [asyncio.create_task(found.stamp(job)) for job in ("a", "b", "a")]
        hung_up = asyncio.create_task(found.stamp("b"))
        await asyncio.sleep(0)
        hung_up.cancel()
        gate.set()
        return [await first, *(await asyncio.gather(*rest))]

    assert asyncio.run(ask()) == [(b"a",), (b"a",), (b"b",), (b"a",)]
    assert looks == [["a"], ["a", "b"]], "who asks during a look is answered by the next"


def test_failed_look_is_told_to_all_who_asked() -> None:
    class Gone:
        def stamps(self, jobs: list[str]) -> list[Stamp | None]:
            raise Unavailable("Redis", "gone", "start it")

    async def ask() -> tuple[object, ...]:
        found = Looks(Gone())  # type: ignore[arg-type]
        return await asyncio.gather(found.stamp("a"), found.stamp("a"), return_exceptions=True)

    assert all(isinstance(error, Unavailable) for error in asyncio.run(ask()))


def asked(
    polls: Polls, job: Job, *headers: tuple[bytes, bytes], stalls: asyncio.Event | None = None
) -> Coroutine[Any, Any, bytes]:
    """Ask for a job's status as a server hands requests on; `stalls` is waited for before anything is read."""

    async def ask() -> bytes:
        parts: list[bytes] = []

        async def send(message: MutableMapping[str, Any]) -> None:
            if stalls is not None:
                await stalls.wait()
            parts.append(message.get("body", b""))

        scope = {
            "type": "http", "method": "GET", "path": f"/api/v1/jobs/{job.id}", "query_string": b"",
            "headers": list(headers), "state": {"caller": SimpleNamespace(id="anybody")},
        }  # fmt: skip
        await polls(scope, nothing, send)
        return b"".join(parts)

    return ask()


async def nothing() -> MutableMapping[str, Any]:
    return {"type": "http.request"}


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": repr(scope["headers"]).encode()})


def test_whoever_reads_slowly_holds_nobody_else_up(farm: DirectFarm, job: Job) -> None:
    async def ask() -> bytes:
        polls, stalled = Polls(answering, farm.ledger), asyncio.Event()
        slow = asyncio.create_task(asked(polls, job, stalls=stalled))
        await asyncio.sleep(0.05)
        answer = await asyncio.wait_for(asked(polls, job), 5)
        assert not slow.done()
        stalled.set()
        await slow
        return answer

    assert asyncio.run(ask()) == b"[]"


def test_what_a_bug_is_answered_with_is_sent(farm: DirectFarm, job: Job) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"told"})
        raise ZeroDivisionError

    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "path": f"/api/v1/jobs/{job.id}", "query_string": b"", "headers": [],
        "state": {"caller": SimpleNamespace(id="anybody")},
    }  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        asyncio.run(Polls(broken, farm.ledger)(scope, nothing, send))
    assert [message.get("status", message.get("body")) for message in sent] == [500, b"told"]


def test_answers_are_for_the_headers_they_were_asked_with(farm: DirectFarm, job: Job) -> None:
    async def ask() -> list[bytes]:
        polls = Polls(answering, farm.ledger)
        tag, empty = (b"if-none-match", b"x"), (b"if-none-match", b"")
        ways: list[tuple[tuple[bytes, bytes], ...]] = [(tag, empty), (), (empty,), ((b"origin", b"y" * 2000),)]
        return [await asked(polls, job, *headers) for headers in ways]

    assert len(set(asyncio.run(ask()))) == 4


def test_those_who_ask_the_same_at_once_have_one_answer_made(farm: DirectFarm, job: Job) -> None:
    made = 0

    async def app(scope: object, receive: object, send: object) -> None:
        nonlocal made
        made += 1
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"answer"})  # type: ignore[operator]

    async def all_at_once() -> list[bytes]:
        polls = Polls(app, farm.ledger)
        return list(await asyncio.gather(*(asked(polls, job) for _ in range(20))))

    assert asyncio.run(all_at_once()) == [b"answer"] * 20
    assert made == 1
