"""The unmodified `openai` client from PyPI against a farm that renders."""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import signal
from typing import Any

import httpx2
import openai
import psutil
import pytest
from openai import OpenAI
from openai.types import Batch
from PIL import Image

from tests.acceptance.conftest import Up, eventually

pytestmark = pytest.mark.acceptance
SIZE = "128x128"
FAST = {"steps": 3}


@pytest.fixture
def client(farm: Up) -> OpenAI:
    return OpenAI(base_url=farm.ready["api_url"] + "/v1", api_key="none", max_retries=0)


def picture(encoded: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded or "")))


def test_pictures_are_drawn_with_our_own_parameters(client: OpenAI) -> None:
    extra = {"seed": 43, "negative_prompt": "16-token-demo-neg", "embeddings": ["corneo_dva"]} | FAST
    found = client.images.generate(prompt="masterpiece", model="demo", n=2, size=SIZE, extra_body=extra)

    assert found.data is not None
    assert [picture(item.b64_json).size for item in found.data] == [(128, 128)] * 2
    assert found.model_extra is not None
    assert found.model_extra["farm"]["seeds"] == [43, 44]
    assert "TI hashes" in picture(found.data[0].b64_json).info["parameters"]


def test_picture_by_address_needs_no_key_and_no_farm_of_another_name(client: OpenAI) -> None:
    found = client.images.generate(
        prompt="a red circle", model="gpt-image-1", size=SIZE, response_format="url", extra_body=FAST
    )
    assert found.data is not None
    assert found.data[0].url is not None
    assert found.model_extra is not None
    answer = httpx2.get(found.data[0].url)
    forged = httpx2.get(found.data[0].url[:-1] + ("0" if found.data[0].url[-1] != "0" else "1"))

    assert "drawn with demo" in found.model_extra["farm"]["warnings"][0]
    assert answer.headers["content-type"] == "image/png"
    assert forged.status_code == 403


def test_picture_comes_in_the_format_asked_for(client: OpenAI) -> None:
    found = client.images.generate(
        prompt="a red circle", size=SIZE, output_format="jpeg", output_compression=80, extra_body=FAST
    )

    assert found.data is not None
    assert picture(found.data[0].b64_json).format == "JPEG"


def test_pictures_are_streamed(client: OpenAI) -> None:
    stream = client.images.generate(prompt="a red circle", size=SIZE, n=2, stream=True, extra_body=FAST)
    events = list(stream)

    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert picture(events[0].b64_json).size == (128, 128)


def test_stream_shows_what_comes(client: OpenAI) -> None:
    stream = client.images.generate(
        prompt="masterpiece, corneo_dva", size=SIZE, stream=True, partial_images=2, extra_body={"steps": 150, "seed": 1}
    )
    events = list(stream)

    assert events[-1].type == "image_generation.completed"
    partials = events[:-1]
    assert 1 <= len(partials) <= 2
    assert [event.type for event in partials] == ["image_generation.partial_image"] * len(partials)
    assert picture(partials[0].b64_json).size == (64, 64)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "corneo_dvaa"}, "embedding"),
        ({"size": "1x1"}, "size"),
        ({"background": "transparent"}, "background"),
        ({"n": 11}, "n"),
        ({"extra_body": {"samplr": "Euler"}}, "samplr"),
        ({"extra_body": {"sampler": "Eular"}}, "sampler"),
    ],
)
def test_what_the_farm_does_not_do_is_refused_by_name(client: OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.images.generate(**({"prompt": "a red circle", "size": SIZE} | fields))

    assert found.value.param == param


def test_models_are_the_checkpoints(client: OpenAI) -> None:
    assert "demo" in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def line(number: int, **fields: Any) -> str:
    body = {"model": "demo", "prompt": "a red circle", "size": SIZE, "seed": number} | FAST | fields
    request = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/images/generations", "body": body}
    return json.dumps(request)


def begin(client: OpenAI, lines: list[str]) -> Batch:
    file = client.files.create(file=("batch.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/images/generations", completion_window="24h", metadata={"sweep": "one"}
    )


def ended(client: OpenAI, batch: Batch, timeout_s: float = 120) -> Batch:
    final = ("completed", "failed", "expired", "cancelled")
    eventually(lambda: client.batches.retrieve(batch.id).status in final, timeout_s)
    return client.batches.retrieve(batch.id)


def read(client: OpenAI, file: str | None) -> list[dict[str, Any]]:
    return [json.loads(text) for text in client.files.content(file or "").text.splitlines()]


def test_batch_of_fifty_with_three_that_cannot_be_drawn(client: OpenAI) -> None:
    wrong = {7: {"size": "1x1"}, 23: {"prompt": "corneo_dvaa"}, 41: {"sampler": "Eular"}}
    lines = [line(number, **wrong.get(number, {})) for number in range(50)]
    lines[3] = line(3, n=2, prompt="corneo_dva", response_format="b64_json")
    batch = ended(client, begin(client, lines))
    good, bad = read(client, batch.output_file_id), read(client, batch.error_file_id)

    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 50, "completed": 47, "failed": 3}
    assert {item["custom_id"] for item in bad} == {f"request-{number}" for number in wrong}
    assert {item["custom_id"] for item in good} == {f"request-{n}" for n in range(50) if n not in wrong}
    assert [item["response"]["status_code"] for item in bad] == [400] * 3
    by_id = {item["custom_id"]: item["response"]["body"] for item in good}
    assert by_id["request-12"]["farm"]["seeds"] == [12]
    assert "Seed: 12" in by_id["request-12"]["farm"]["infotexts"][0]
    assert len(by_id["request-3"]["data"]) == 2
    assert picture(by_id["request-3"]["data"][1]["b64_json"]).info["parameters"].startswith("corneo_dva")
    assert httpx2.get(by_id["request-12"]["data"][0]["url"]).status_code == 200
    assert batch.metadata == {"sweep": "one"}
    assert batch.id in [item.id for item in client.batches.list(limit=5)]


def test_batch_whose_lines_are_no_requests_fails_before_anything_is_drawn(client: OpenAI) -> None:
    lines = [line(0), "{nonsense", line(0), line(3).replace("POST", "GET"), line(4).replace("images", "chat")]
    batch = ended(client, begin(client, lines))

    assert batch.status == "failed"
    assert batch.errors is not None
    assert [(error.line, error.code) for error in batch.errors.data or []] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "invalid_method"),
        (5, "invalid_url"),
    ]


def test_batch_is_cancelled_and_keeps_what_is_drawn(client: OpenAI) -> None:
    batch = begin(client, [line(number, steps=60) for number in range(40)])
    eventually(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    client.batches.cancel(batch.id)
    batch = ended(client, batch)

    assert batch.status == "cancelled"
    assert batch.request_counts is not None
    assert batch.request_counts.completed == len(read(client, batch.output_file_id)) < 40


def test_batch_goes_on_when_the_server_is_killed_again_and_again(farm: Up, client: OpenAI) -> None:
    word = secrets.token_hex(4)
    batch = begin(client, [line(number, prompt=f"a red circle, {word}") for number in range(40)])
    for _ in range(3):
        (served,) = [p for p in psutil.Process(farm.process.pid).children(recursive=True) if "serve" in p.cmdline()]
        os.kill(served.pid, signal.SIGKILL)
        eventually(lambda: answers(farm), 60)
    batch = ended(client, batch)
    jobs = httpx2.get(farm.ready["api_url"] + "/api/v1/jobs", params={"limit": 50}).json()["items"]

    assert batch.request_counts is not None
    assert batch.request_counts.completed == 40
    assert sum(job["total"] for job in jobs if word in job["prompt"] or job["name"] == batch.id) == 40
    assert len({item["custom_id"] for item in read(client, batch.output_file_id)}) == 40


def answers(farm: Up) -> bool:
    try:
        return httpx2.get(farm.ready["api_url"] + "/healthz", timeout=2).is_success
    except httpx2.TransportError:
        return False
