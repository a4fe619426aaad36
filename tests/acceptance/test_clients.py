"""Unmodified clients from PyPI against a farm that renders: what they send is taken, what they get is what they expect."""

from __future__ import annotations

import base64
import io
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from PIL import Image
from webuiapi import WebUIApi

from tests.acceptance.conftest import Up, eventually

pytestmark = pytest.mark.acceptance
SIZE = {"width": 128, "height": 128}


@pytest.fixture
def webui(farm: Up) -> WebUIApi:
    parts = urlsplit(farm.ready["api_url"])
    return WebUIApi(host=parts.hostname, port=parts.port, sampler="Euler", steps=4)


def ask(farm: Up, path: str, body: Any = None, timeout_s: float = 60, **headers: str) -> Any:
    method = "GET" if body is None else "POST"
    answer = httpx2.request(method, farm.ready["api_url"] + path, json=body, headers=headers, timeout=timeout_s)
    assert answer.is_success, answer.text
    return answer.json()


def test_webuiapi_draws_with_an_embedding(webui: WebUIApi) -> None:
    result = webui.txt2img(
        prompt="masterpiece, corneo_dva", negative_prompt="16-token-demo-neg", seed=43, batch_size=2, **SIZE
    )

    assert [image.size for image in result.images] == [(128, 128)] * 2
    assert result.info["all_seeds"] == [43, 44]
    assert result.info["sd_model_name"] == "demo"
    assert "TI hashes" in result.info["infotexts"][0]
    assert "corneo_dva" in result.image.info["parameters"]
    assert result.info["index_of_first_image"] == 0


def test_webuiapi_draws_with_hires_fix(webui: WebUIApi) -> None:
    result = webui.txt2img(
        prompt="a red circle",
        seed=1,
        enable_hr=True,
        hr_scale=1.5,
        hr_upscaler="Latent",
        denoising_strength=0.6,
        **SIZE,
    )

    assert result.image.size == (192, 192)
    assert "Hires upscale: 1.5" in result.info["infotexts"][0]


def test_webuiapi_reads_a_picture_back(webui: WebUIApi) -> None:
    image = webui.txt2img(prompt="a red circle", negative_prompt="blue", seed=5, cfg_scale=3, **SIZE).image
    found = webui.png_info(image)

    assert found.info.startswith("a red circle\nNegative prompt: blue\nSteps: 4, Sampler: Euler")
    assert found.parameters["Seed"] == "5"


def test_webuiapi_finds_what_it_asks_for(webui: WebUIApi) -> None:
    assert "Euler a" in [sampler["name"] for sampler in webui.get_samplers()]
    assert "karras" in [schedule["name"] for schedule in webui.get_schedulers()]
    assert webui.get_sd_models()[0]["model_name"] == "demo"
    assert webui.get_embeddings()["loaded"]["corneo_dva"]["vectors"] >= 1
    assert webui.get_upscalers()[0]["name"] == "None"
    assert "Latent" in [mode["name"] for mode in webui.get_latent_upscale_modes()]
    assert webui.get_memory()["cuda"]["system"]["used"] >= 0
    for empty in (
        webui.get_loras, webui.get_hypernetworks, webui.get_face_restorers, webui.get_realesrgan_models,
        webui.get_prompt_styles, webui.get_sd_vae,
    ):  # fmt: skip
        assert empty() == []
    webui.refresh_checkpoints()
    assert webui.get_cmd_flags()["api"] is True


def test_webuiapi_sets_its_model_and_sends_all_options_back(webui: WebUIApi) -> None:
    webui.util_set_model("demo")
    options = webui.get_options()
    webui.set_options(options | {"CLIP_stop_at_last_layers": 2})

    assert webui.util_get_current_model().startswith("demo.safetensors [")
    assert webui.txt2img(prompt="a red circle", seed=5, **SIZE).info["clip_skip"] == 2
    webui.set_options({"CLIP_stop_at_last_layers": 1})
    webui.util_wait_for_ready(check_interval=1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sampler_name": "Eular"}, "Euler"),
        ({"styles": ["anime"]}, "styles"),
        ({"restore_faces": True}, "restore_faces"),
        ({"script_name": "x/y/z plot"}, "script_name"),
        ({"override_settings": {"sd_model_checkpoint": "demoo"}}, "demo"),
        ({"override_settings": {"sd_vae": "kl-f8"}}, "sd_vae"),
        ({"prompt": "corneo_dvaa"}, "corneo_dva"),
    ],
)
def test_what_would_change_the_picture_is_refused_by_name(webui: WebUIApi, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RuntimeError) as found:
        webui.txt2img(**({"prompt": "a red circle"} | SIZE | fields))

    assert found.value.args[0] in (404, 422)
    assert says in found.value.args[1]


def test_progress_and_interrupt_are_the_callers_own(farm: Up, webui: WebUIApi) -> None:
    task = f"task({secrets.token_hex(4)})"
    body = {"prompt": "a red circle", "steps": 150, "n_iter": 30, "force_task_id": task, "sampler_name": "Euler"} | SIZE
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, farm, "/sdapi/v1/txt2img", body)
        eventually(lambda: webui.get_progress()["state"]["job_count"] > 0)
        eventually(lambda: webui.get_progress()["state"]["sampling_step"] > 0)
        eventually(lambda: webui.get_progress()["current_image"] is not None)
        seen = webui.get_progress()["current_image"]
        told = ask(farm, "/internal/progress", {"id_task": task})
        pending = ask(farm, "/internal/pending-tasks")
        webui.interrupt()
        stopped = answer.result(60)

    assert told["active"]
    assert told["live_preview"].startswith("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(seen))).size == (64, 64)
    assert pending == {"size": 1, "tasks": [task]}
    assert len(stopped["images"]) < 30
    assert ask(farm, "/internal/progress", {"id_task": task})["completed"]
    assert webui.get_progress()["progress"] == 0


def test_queue_extension_gives_tasks_back(farm: Up) -> None:
    body = {"prompt": "a red circle", "steps": 3, "seed": 9, "sampler_name": "Euler"} | SIZE
    task = ask(farm, "/agent-scheduler/v1/queue/txt2img", body)["task_id"]
    eventually(lambda: ask(farm, f"/agent-scheduler/v1/task/{task}")["data"]["status"] == "done")
    (picture,) = ask(farm, f"/agent-scheduler/v1/task/{task}/results")["data"]

    data = base64.b64decode(picture["image"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (128, 128)
    assert "Seed: 9" in picture["infotext"]
    assert task in [item["id"] for item in ask(farm, "/agent-scheduler/v1/history")["tasks"]]
    assert ask(farm, "/agent-scheduler/v1/task/nope") == {
        "success": False,
        "message": "there is no job called 'nope'",
    }


def test_client_that_times_out_and_asks_again_gets_the_same_job(farm: Up) -> None:
    body = {"prompt": f"a red circle, {secrets.token_hex(4)}", "steps": 60, "sampler_name": "Euler"} | SIZE
    for _ in range(2):
        with pytest.raises(httpx2.ReadTimeout):
            ask(farm, "/sdapi/v1/txt2img", body, timeout_s=0.3)
        time.sleep(1)  # by then the server knows
    answer = ask(farm, "/sdapi/v1/txt2img", body)
    jobs = ask(farm, "/api/v1/jobs?limit=10")["items"]
    again = ask(farm, "/sdapi/v1/txt2img", body)

    assert len(answer["images"]) == 1
    assert [job["prompt"] for job in jobs].count(body["prompt"]) == 1
    assert again["job_id"] != answer["job_id"], "an answered request that is sent again is a new one"
