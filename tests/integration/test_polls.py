"""Polls are answered from memory, and never tell what was before."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

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


def test_every_field_of_a_status_that_changes_moves_its_stamp(farm: DirectFarm, job: Job) -> None:
    steps = (
        job.pause,
        job.resume,
        lambda: job.prioritise(3),
        lambda: farm.ledger.redis.hset(f"lf:job:{job.id}", "progress", '{"stage": "packing"}'),
        job.cancel,
        lambda: job.retry(missing=True),
    )
    for step in steps:
        before = job.status(), farm.ledger.stamps([job.id])[0]
        step()
        after = job.status(), farm.ledger.stamps([job.id])[0]
        assert (before[0] != after[0]) == (before[1] != after[1]), step


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


def test_those_who_ask_the_same_at_once_have_one_answer_made(farm: DirectFarm, job: Job) -> None:
    made = 0

    async def app(scope: object, receive: object, send: object) -> None:
        nonlocal made
        made += 1
        await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b"answer"})  # type: ignore[operator]

    async def ask(polls: Polls) -> bytes:
        parts: list[bytes] = []

        async def send(message: object) -> None:
            parts.append(message.get("body", b""))  # type: ignore[attr-defined]

        class Anybody:
            id = "anybody"

        scope = {"type": "http", "method": "GET", "path": f"/api/v1/jobs/{job.id}", "query_string": b"",
                 "headers": [], "state": {"caller": Anybody()}}  # fmt: skip
        await polls(scope, None, send)  # type: ignore[arg-type]
        return b"".join(parts)

    async def all_at_once() -> list[bytes]:
        polls = Polls(app, farm.ledger)
        return list(await asyncio.gather(*(ask(polls) for _ in range(20))))

    assert asyncio.run(all_at_once()) == [b"answer"] * 20
    assert made == 1
