"""The HTTP API on real servers, without a worker."""

import pytest
from fastapi.testclient import TestClient
from latentfarm.api import create_app
from latentfarm.farm import Farm
from latentfarm_demo import CHECKPOINT


@pytest.fixture
def client(servers: Farm) -> TestClient:
    servers.models.add(CHECKPOINT, "demo")
    return TestClient(create_app(servers), raise_server_exceptions=False)


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").json()["status"] == "ok"


def test_job_is_submitted_and_read_back(client: TestClient) -> None:
    answer = client.post("/api/v1/jobs", json={"prompt": "a girl", "seed": 5, "count": 3})
    job = answer.json()

    assert answer.status_code == 202
    assert (job["state"], job["total"]) == ("queued", 3)
    assert client.get(f"/api/v1/jobs/{job['id']}").json() == job
    images = client.get(f"/api/v1/jobs/{job['id']}/images", params={"start": 1}).json()
    assert [(i["index"], i["seed"], i["state"]) for i in images] == [(1, 6, "queued"), (2, 7, "queued")]
    assert job["id"] in [j["id"] for j in client.get("/api/v1/jobs").json()]
    assert client.get("/api/v1/workers").json() == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/api/v1/jobs", {"prompt": "a", "steps": 0}, 422, "steps"),
        ("POST", "/api/v1/jobs", {"prompt": "a", "sampler": "Eular"}, 422, "Euler"),
        ("POST", "/api/v1/jobs", {"prompt": "a", "model": "nope"}, 422, "nope"),
        ("GET", "/api/v1/jobs/nope", None, 404, "nope"),
        ("GET", "/api/v1/jobs/nope/images", None, 404, "nope"),
    ],
)
def test_error_says_what_is_wrong(
    client: TestClient, method: str, path: str, body: dict[str, object] | None, status: int, says: str
) -> None:
    answer = client.request(method, path, json=body)

    assert answer.status_code == status
    assert says in answer.json()["title"]
    assert answer.headers["content-type"] == "application/problem+json"


def test_picture_that_is_not_rendered_is_a_conflict(client: TestClient) -> None:
    job = client.post("/api/v1/jobs", json={"prompt": "a girl"}).json()["id"]

    assert client.get(f"/api/v1/jobs/{job}/images/0.png").status_code == 409
    assert client.get(f"/api/v1/jobs/{job}/images/7.png").status_code == 404
