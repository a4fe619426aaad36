"""The farm's own HTTP API on real servers, without a worker."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from latentfarm.api import create_app
from latentfarm.api.webhooks.hooks import HookRequest, Hooks
from latentfarm.farm import DirectFarm
from latentfarm.keys import ApiKeys
from latentfarm_demo import CHECKPOINT, EMBEDDINGS
from latentfarm_shared.ledger.ledger import translated

BASE = "http://localhost"


@pytest.fixture
def farm(servers: DirectFarm) -> DirectFarm:
    servers.models.add(CHECKPOINT, "demo")
    for path in EMBEDDINGS.glob("*.pt"):
        servers.embeddings.add(path)
    return servers


@pytest.fixture
def client(farm: DirectFarm) -> Iterator[TestClient]:
    with TestClient(create_app(farm), base_url=BASE, raise_server_exceptions=False) as found:
        yield found


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").json()["status"] == "ok"


def test_job_is_submitted_and_read_back(client: TestClient) -> None:
    answer = client.post("/api/v1/jobs", json={"prompt": "a girl", "seed": 5, "count": 3})
    job = answer.json()

    assert answer.status_code == 202
    assert answer.headers["location"] == f"/api/v1/jobs/{job['id']}"
    assert (job["state"], job["total"]) == ("queued", 3)
    assert client.get(job["urls"]["self"]).json() == job
    page = client.get(f"/api/v1/jobs/{job['id']}/images", params={"cursor": "1", "limit": 1}).json()
    assert [(i["index"], i["seed"], i["state"]) for i in page["items"]] == [(1, 6, "queued")]
    assert page["next"] == "2"
    assert job["id"] in [j["id"] for j in client.get("/api/v1/jobs").json()["items"]]
    assert client.get("/api/v1/workers").json() == {"items": [], "aside": {}}


def test_status_has_a_tag_that_changes_with_it(client: TestClient) -> None:
    own = client.post("/api/v1/jobs", json={"prompt": "a girl"}).json()["urls"]
    tag = client.get(own["self"]).headers["etag"]

    assert client.get(own["self"], headers={"if-none-match": tag}).status_code == 304
    client.post(own["cancel"])
    assert client.get(own["self"], headers={"if-none-match": tag}).json()["state"] == "canceled"


def test_request_may_be_repeated_under_a_key(client: TestClient) -> None:
    headers = {"Idempotency-Key": secrets.token_hex(8)}
    body = {"prompt": "a girl", "count": 2}
    first = client.post("/api/v1/jobs", json=body, headers=headers)
    again = client.post("/api/v1/jobs", json=body, headers=headers)
    other = client.post("/api/v1/jobs", json=body | {"count": 3}, headers=headers)

    assert again.json()["id"] == first.json()["id"]
    assert (other.status_code, other.json()["code"]) == (422, "ALREADY_TAKEN")


def test_client_may_choose_the_id(client: TestClient) -> None:
    body = {"prompt": "a girl", "id": f"mine-{secrets.token_hex(4)}"}

    assert client.post("/api/v1/jobs", json=body).json()["id"] == body["id"]
    assert client.post("/api/v1/jobs", json=body).json()["id"] == body["id"]
    refused = client.post("/api/v1/jobs", json=body | {"id": "../x"})
    assert (refused.status_code, refused.json()["field"]) == (422, "id")


def test_waiting_is_bounded(client: TestClient) -> None:
    answer = client.post("/api/v1/jobs", json={"prompt": "a girl"}, headers={"Prefer": "respond-async, wait=1"})

    assert (answer.status_code, answer.headers["preference-applied"]) == (202, "wait=1")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/api/v1/jobs", {"prompt": "a", "steps": 0}, 422, "steps"),
        ("POST", "/api/v1/jobs", {"prompt": "a", "sampler": "Eular"}, 422, "Euler"),
        ("POST", "/api/v1/jobs", {"prompt": "a", "samplr": "Euler"}, 422, "sampler"),
        ("POST", "/api/v1/jobs", {"prompt": "a", "model": "nope"}, 422, "nope"),
        ("POST", "/api/v1/jobs", {"prompt": "a", "embeddings": ["corneo_dvaa"]}, 422, "corneo_dva"),
        ("POST", "/api/v1/jobs", [1], 422, "dictionary"),
        ("POST", "/api/v1/plan", {"prompt": "a", "cfg_scale": "high"}, 422, "cfg_scale"),
        ("GET", "/api/v1/jobs/nope", None, 404, "nope"),
        ("GET", "/api/v1/jobs/nope/images", None, 404, "nope"),
        ("GET", "/api/v1/jobs/nope/events", None, 404, "nope"),
        ("GET", "/api/v1/embeddings/nope", None, 404, "nope"),
        ("DELETE", "/api/v1/keys/nope", None, 404, "nope"),
        ("POST", "/api/v1/workers/nope/drain", None, 404, "nope"),
        ("POST", "/api/v1/embeddings/import", {"source": "/etc/passwd"}, 422, "https"),
        ("GET", "/api/v1/nope", None, 404, "Not Found"),
        ("PUT", "/api/v1/jobs", {}, 405, "Not Allowed"),
    ],
)
def test_error_says_what_is_wrong(
    client: TestClient, method: str, path: str, body: object, status: int, says: str
) -> None:
    answer = client.request(method, path, json=body)
    problem = answer.json()

    assert answer.status_code == problem["status"] == status
    assert says in problem["title"]
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["request_id"] == answer.headers["x-request-id"]


def test_picture_that_is_not_rendered_is_a_conflict(client: TestClient) -> None:
    job = client.post("/api/v1/jobs", json={"prompt": "a girl"}).json()["id"]

    assert client.get(f"/api/v1/jobs/{job}/images/0.png").status_code == 409
    assert client.get(f"/api/v1/jobs/{job}/images/0/link").status_code == 409
    assert client.get(f"/api/v1/jobs/{job}/images/7.png").status_code == 404


def test_sweep_file_is_planned_and_submitted_once(client: TestClient) -> None:
    text = "name: a sweep\ndefaults: {prompt: a girl, seed: 1}\nmatrix: {cfg_scale: [3, 5]}\n"
    plan = client.post("/api/v1/plan/files", params={"name": "s.yaml"}, content=text)
    first = client.post("/api/v1/jobs/files", params={"name": "s.yaml"}, content=text).json()["jobs"]
    again = client.post("/api/v1/jobs/files", params={"name": "s.yaml"}, content=text).json()["jobs"]
    wrong = client.post("/api/v1/jobs/files", params={"name": "s.yaml"}, content=text + "samplr: x\n")
    path = client.post("/api/v1/jobs/files", params={"name": "../s.yaml"}, content=text)
    file = client.post("/api/v1/jobs/files", params={"name": "t.yaml"}, content="rows: /etc/passwd\n")

    assert plan.json()["images"] == 2
    assert [j["total"] for j in first] == [2]
    assert [j["id"] for j in again] == [j["id"] for j in first]
    assert wrong.json()["errors"][0]["line"] == 4
    assert "latentfarm-" not in wrong.text + file.text, "no path of ours"
    assert (path.status_code, file.status_code) == (422, 422)


def test_events_are_streamed_and_go_on_where_they_ended(client: TestClient) -> None:
    own = client.post("/api/v1/jobs", json={"prompt": "a girl", "count": 2}).json()["urls"]
    client.post(own["cancel"])
    stream = client.get(own["events"]).text
    ids = [int(line[4:]) for line in stream.splitlines() if line.startswith("id: ")]
    rest = client.get(own["events"], headers={"last-event-id": str(ids[0])}).text

    assert ids == list(range(1, len(ids) + 1))
    assert stream.rstrip().endswith('data: {"state": "canceled"}')
    assert '"what":"canceled"' in stream
    assert f"id: {ids[0]}\n" not in rest
    assert f"id: {ids[-1]}" in rest
    assert client.get(own["events"], headers={"last-event-id": str(ids[-1])}).status_code == 204
    assert [e["version"] for e in client.get(own["self"] + "/history").json()["events"]] == ids


def test_job_is_held_and_let_go(client: TestClient) -> None:
    own = client.post("/api/v1/jobs", json={"prompt": "a girl", "lane": "batch"}).json()["urls"]["self"]

    assert client.post(f"{own}/pause").json()["state"] == "paused"
    assert client.get(f"{own}/why").json()["causes"][0]["code"] == "paused"
    assert client.post(f"{own}/resume").json()["state"] == "queued"
    assert client.post(f"{own}/priority", json={"priority": 7}).json()["priority"] == 7
    assert client.post(f"{own}/priority", json={"priority": 700}).status_code == 422
    assert client.post(f"{own}/cancel").json()["state"] == "canceled"
    assert client.post(f"{own}/retry", json={"missing": True}).json()["state"] == "queued"


def test_embedding_is_uploaded_named_and_removed(client: TestClient) -> None:
    data = next(EMBEDDINGS.glob("corneo*.pt")).read_bytes()
    name = f"up_{secrets.token_hex(4)}"
    sent = client.post("/api/v1/embeddings", files={"file": (f"../{name}.pt", data)})
    alias = client.post(f"/api/v1/embeddings/{name}/alias", json={"alias": f"{name}2"})

    assert sent.status_code == 201
    assert [e["name"] for e in sent.json()["items"][0]["embeddings"]] == [name]
    assert client.get(f"/api/v1/embeddings/{name}").json()["embedding"]["vectors"] >= 1
    assert alias.json()["name"] == f"{name}2"
    assert client.delete(f"/api/v1/embeddings/{name}2").status_code == 204
    assert client.delete(f"/api/v1/embeddings/{name}").status_code == 204
    assert client.get(f"/api/v1/embeddings/{name}").status_code == 404


def test_upload_that_is_no_embedding_says_so_without_our_paths(client: TestClient) -> None:
    answer = client.post("/api/v1/embeddings", files={"file": ("x.pt", b"hello")})

    assert (answer.status_code, answer.json()["code"]) == (422, "NOT_AN_EMBEDDING")
    assert answer.json()["title"].startswith("x.pt:")


def test_body_is_bounded_before_it_is_read(client: TestClient) -> None:
    answer = client.post("/api/v1/jobs", content=b"x" * 3_000_000, headers={"content-type": "application/json"})

    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}],
    ids=["another name", "another page", "a page without a name"],
)
def test_page_of_somebody_else_may_not_call(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/api/v1/jobs", json={"prompt": "a girl"}, headers=headers).status_code == 403


def test_answers_carry_security_headers(client: TestClient) -> None:
    answer = client.get("/api/v1/jobs", headers={"x-request-id": "mine-1"})

    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-request-id"] == "mine-1"
    assert client.get("/healthz", headers={"x-request-id": "a b\n"}).headers["x-request-id"] != "a b\n"


def test_description_names_every_route_with_its_problems(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    routes = [(path, method, spec) for path, item in schema["paths"].items() for method, spec in item.items()]

    assert "prompt" in schema["components"]["schemas"]["JobRequest"]["properties"]
    for path, method, spec in routes:
        assert spec["description"], (path, method)
        if path.startswith("/api/"):
            assert {"401", "403", "422", "429", "503"} <= set(spec["responses"]), (path, method)


@pytest.fixture
def keyed(farm: DirectFarm) -> Iterator[TestClient]:
    """A farm whose callers need keys; the next test finds it open again."""
    ApiKeys(farm.ledger).create("ops", scopes=("admin",))
    with TestClient(create_app(farm), base_url=BASE, raise_server_exceptions=False) as found:
        yield found
    with translated():
        farm.ledger.redis.delete("lf:api:keys", "lf:api:closed")


def bearer(word: str) -> dict[str, str]:
    return {"authorization": f"Bearer {word}"}


def test_farm_with_keys_asks_for_one(farm: DirectFarm, keyed: TestClient) -> None:
    keys = ApiKeys(farm.ledger)
    _, word = keys.create("alice")
    expired, late = keys.create("alice", expires_in=1e-6)

    assert keyed.get("/api/v1/jobs").status_code == 401
    assert keyed.get("/api/v1/jobs").headers["www-authenticate"].startswith("Bearer")
    assert keyed.get("/api/v1/jobs", headers=bearer("lf_wrong")).status_code == 401
    assert keyed.get("/api/v1/jobs", headers=bearer(late)).json()["title"].startswith("this API key has expired")
    assert keyed.get("/api/v1/jobs", headers=bearer(word)).status_code == 200
    assert keyed.get("/api/v1/jobs", headers={"x-api-key": word}).status_code == 200
    assert keyed.get("/api/v1/jobs", auth=("anything", word)).status_code == 200
    assert keyed.get("/api/v1/keys", headers=bearer(word)).status_code == 403
    assert keyed.get("/healthz").status_code == 200
    assert keyed.get("/api/v1/whoami", headers=bearer(word)).json()["owner"] == "alice"
    keys.revoke(expired.id)


def test_keys_are_made_and_taken_away_over_http(farm: DirectFarm, keyed: TestClient) -> None:
    _, admin = ApiKeys(farm.ledger).create("ops", scopes=("admin",))
    made = keyed.post("/api/v1/keys", json={"owner": "bob", "scopes": ["read"]}, headers=bearer(admin)).json()
    bobs = bearer(made["key"])

    assert keyed.get("/api/v1/jobs", headers=bobs).status_code == 200
    assert keyed.post("/api/v1/jobs", json={"prompt": "a girl"}, headers=bobs).status_code == 403
    assert made["key"] not in keyed.get("/api/v1/keys", headers=bearer(admin)).text
    assert keyed.delete(f"/api/v1/keys/{made['id']}", headers=bearer(admin)).status_code == 204
    ApiKeys(farm.ledger)._seen.clear()


def test_key_may_have_so_many_images_and_requests(farm: DirectFarm, keyed: TestClient) -> None:
    keys = ApiKeys(farm.ledger)
    _, few = keys.create("alice", images=3)
    _, slow = keys.create("alice", requests_per_minute=2)
    body = {"prompt": "a girl", "count": 2}
    own = bearer(few) | {"idempotency-key": secrets.token_hex(4)}

    assert keyed.post("/api/v1/jobs", json=body, headers=own).status_code == 202
    assert keyed.post("/api/v1/jobs", json=body, headers=own).status_code == 202, "the same job again costs nothing"
    refused = keyed.post("/api/v1/jobs", json=body, headers=bearer(few))
    assert (refused.status_code, "has 1 left" in refused.json()["title"]) == (403, True)
    assert [keyed.get("/api/v1/whoami", headers=bearer(slow)).status_code for _ in range(3)] == [200, 200, 429]
    assert int(keyed.get("/api/v1/whoami", headers=bearer(slow)).headers["retry-after"]) >= 1


def test_owner_never_sees_or_stops_anothers_work(farm: DirectFarm, keyed: TestClient) -> None:
    """Every route that names a job, an image, a file, a batch or a task is tried on somebody else's."""
    keys = ApiKeys(farm.ledger)
    key, word = keys.create("alice")
    alice, bob = bearer(word), bearer(keys.create("bob")[1])
    secret = f"secret{secrets.token_hex(6)}"
    keeping = farm.seen_by("alice")
    keeping.settings = farm.settings.model_copy(update={"secret_key": "a long random text"})
    hook = Hooks(keeping).create("alice", HookRequest(url=f"https://example.com/{secret}"))
    body = {"prompt": f"a girl, {secret}", "width": 128, "height": 128}
    job = keyed.post("/api/v1/jobs", json={"prompt": f"a girl, {secret}", "count": 2}, headers=alice).json()
    task = keyed.post("/agent-scheduler/v1/queue/txt2img", json=body, headers=alice).json()["task_id"]
    file = keyed.post(
        "/v1/files", files={"file": ("x.jsonl", secret.encode())}, data={"purpose": "batch"}, headers=alice
    ).json()["id"]
    begun = {"input_file_id": file, "endpoint": "/v1/images/generations"}
    batch = keyed.post("/v1/batches", json=begun, headers=alice).json()["id"]
    own = Hooks(keeping).create("alice", HookRequest(url=f"https://example.com/{secret}"), job["id"])
    named = {
        "{job}": job["id"], "{index}": "0", "{file_id}": file, "{batch_id}": batch, "{task}": task, "{webhook}": hook.id,
        "{delivery}": "x", "{key}": key.id, "{owner}": "alice", "{station}": "w",
    }  # fmt: skip
    tried = []
    for path, item in keyed.get("/openapi.json").json()["paths"].items():
        filled = path
        for name, value in named.items():
            filled = filled.replace(name, value)
        if filled == path or path.startswith("/images/"):  # those are signed
            continue
        for method in item:
            sent: dict[str, object] = {"priority": 3} if path.endswith("priority") else {}
            answer = keyed.request(method, filled, headers=bob, json=sent if method == "post" else None)
            refused = answer.status_code in {403, 404} or (answer.is_success and answer.json()["success"] is False)
            assert refused, (path, method, answer.status_code)
            assert secret not in answer.text
            tried.append((method, path))
    for path in ("", f"/{own.id}", f"/{own.id}/deliveries"):
        answer = keyed.get(f"/api/v1/webhooks{path}", params={"job": job["id"]}, headers=bob)
        assert (answer.status_code, secret in answer.text) == (404, False), path
        assert keyed.get(f"/api/v1/webhooks{path}", params={"job": job["id"]}, headers=alice).status_code == 200, path
    again = keyed.post("/api/v1/jobs", json={"prompt": "b"}, headers=bob).json()["id"]
    Hooks(keeping).create(
        "alice", HookRequest(url=f"https://example.com/{secret}"), again
    )  # of a job of hers, deleted since
    assert keyed.get("/api/v1/webhooks", params={"job": again}, headers=bob).json() == {"items": []}
    taken = keyed.post("/api/v1/jobs", json={"prompt": "b", "id": job["id"]}, headers=bob)
    keyed.post("/sdapi/v1/interrupt", headers=bob)
    keyed.post("/agent-scheduler/v1/queue/clear", headers=bob)

    assert len(tried) >= 35
    assert (taken.status_code, secret in taken.text) == (409, False)
    assert keyed.post("/v1/batches", json=begun, headers=bob).status_code == 404
    for path in (
        "/api/v1/jobs", "/v1/files", "/v1/batches", "/sdapi/v1/progress", "/internal/pending-tasks",
        "/agent-scheduler/v1/queue", "/agent-scheduler/v1/history", "/sdapi/v1/options", "/api/v1/webhooks",
    ):  # fmt: skip
        found = keyed.get(path, headers=bob)
        assert found.status_code == 200, path
        assert not {secret, job["id"], task, file, batch, hook.id} & set(re.findall(r"[\w-]+", found.text)), path
    assert keyed.get(job["urls"]["self"], headers=alice).json() == job
    assert keyed.get("/internal/pending-tasks", headers=alice).json()["size"] == 1
    farm.ledger.redis.delete(*farm.ledger.redis.keys("lf:hook*"))


def test_embeddings_of_others_are_unknown(farm: DirectFarm, keyed: TestClient) -> None:
    keys = ApiKeys(farm.ledger)
    alice, bob = (bearer(keys.create(owner)[1]) for owner in ("alice", "bob"))
    name = f"own_{secrets.token_hex(4)}"
    data = next(EMBEDDINGS.glob("corneo*.pt")).read_bytes()
    keyed.post("/api/v1/embeddings", files={"file": (f"{name}.pt", data)}, headers=alice)

    assert keyed.get(f"/api/v1/embeddings/{name}", headers=alice).status_code == 200
    assert name not in keyed.get("/api/v1/embeddings", headers=bob).text
    for method, path in (("GET", ""), ("GET", "/preview"), ("DELETE", ""), ("POST", "/alias")):
        answer = keyed.request(method, f"/api/v1/embeddings/{name}{path}", headers=bob, json={"alias": "x"})
        assert answer.status_code == 404, (method, path)
    assert keyed.delete("/api/v1/embeddings/corneo_dva", headers=bob).status_code == 404, "the farm's are not bob's"


def test_serving_others_without_keys_is_refused(farm: DirectFarm) -> None:
    from latentfarm.api.serving import serve  # noqa: PLC0415
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    with pytest.raises(InvalidField, match="keys create"):
        serve(farm, "0.0.0.0", 0)  # noqa: S104


def test_logs_hold_no_secrets(
    farm: DirectFarm, keyed: TestClient, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _, word = ApiKeys(farm.ledger).create("alice")
    secret = f"secret{secrets.token_hex(6)}"
    keyed.post("/api/v1/jobs", json={"prompt": secret, "steps": 0}, headers=bearer(word))
    keyed.get("/api/v1/jobs", params={"cursor": secret}, headers=bearer(word))
    keyed.get(f"/api/v1/embeddings/{secret}", headers=bearer(word))
    written = json.dumps(capsys.readouterr())

    assert "request" in written
    assert word not in written
    assert secret not in written


def test_webhook_for_somebody_elses_job_is_refused(farm: DirectFarm, keyed: TestClient) -> None:
    keys = ApiKeys(farm.ledger)
    alice, bob = (bearer(keys.create(owner)[1]) for owner in ("alice", "bob"))
    job = keyed.post("/api/v1/jobs", json={"prompt": "a girl"}, headers=alice).json()["id"]
    body = {"prompt": "b", "id": job, "webhook": {"url": "https://example.com"}}

    assert keyed.post("/api/v1/jobs", json=body, headers=bob).status_code == 409
    assert farm.ledger.redis.exists(f"lf:hooks:job:{job}") == 0


def test_key_is_asked_for_before_the_body_is_read(keyed: TestClient) -> None:
    answer = keyed.post("/v1/files", files={"file": ("x", b"x" * 100_000)}, data={"purpose": "nonsense"})

    assert answer.status_code == 401


@pytest.mark.parametrize("header", [{"host": "["}, {"origin": "http://["}])
def test_header_that_is_nonsense_is_refused(client: TestClient, header: dict[str, str]) -> None:
    assert client.post("/api/v1/jobs", json={"prompt": "a"}, headers=header).status_code == 403


def test_batch_with_nonsense_in_a_line_ends_and_stops_no_other(client: TestClient) -> None:
    def begin(body: object) -> str:
        line = {"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": body}
        sent = client.post(
            "/v1/files", files={"file": ("x.jsonl", json.dumps(line).encode())}, data={"purpose": "batch"}
        )
        asked = {"input_file_id": sent.json()["id"], "endpoint": "/v1/images/generations"}
        return str(client.post("/v1/batches", json=asked).json()["id"])

    batches = [begin({"prompt": "a", "model": ["x"]}), begin({"prompt": {"a": [1]}, "size": {"b": 2}, "n": "x"})]
    until = time.monotonic() + 20
    for batch in batches:
        while (found := client.get(f"/v1/batches/{batch}").json())["status"] != "completed":
            assert time.monotonic() < until, found
            time.sleep(0.1)
        assert found["request_counts"] == {"total": 1, "completed": 0, "failed": 1}


def test_too_many_pictures_for_one_answer_are_refused(client: TestClient) -> None:
    body = {"prompt": "a", "n_iter": 1000, "batch_size": 100, "width": 128, "height": 128}
    answer = client.post("/sdapi/v1/txt2img", json=body)

    assert (answer.status_code, answer.json()["field"]) == (422, "n_iter")


def test_job_id_is_no_way_to_other_keys(client: TestClient) -> None:
    job = client.post("/api/v1/jobs", json={"prompt": "a girl"}).json()["id"]

    assert client.get(f"/api/v1/jobs/{job}:states").status_code == 422
    assert client.get(f"/agent-scheduler/v1/task/{job}:states").json()["success"] is False
