"""The way of one job, through the real command line and SDK, on real servers and a real worker."""

import io
import json
import shutil
from pathlib import Path

import boto3
import numpy as np
import pytest
from latentfarm.farm import DirectFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.embeddings.sandbox import read_embedding
from PIL import Image
from safetensors.numpy import save_file

from tests.acceptance.conftest import Up

pytestmark = pytest.mark.acceptance


def pixels(png: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int16)


def test_ready_line_names_the_farm_and_no_secret(farm: Up) -> None:
    secrets = json.loads((farm.data / "farm.json").read_text())

    assert set(farm.ready) == {"redis_url", "s3_endpoint", "data", "api_url"}
    assert secrets["redis_password"] not in json.dumps(farm.ready)
    assert (farm.data / "farm.json").stat().st_mode & 0o077 == 0
    logs = "".join(path.read_text(errors="replace") for path in (farm.data / "logs").iterdir())
    assert secrets["redis_password"] not in logs
    assert secrets["s3_secret_key"] not in logs


def test_generate_renders_uploads_and_downloads(farm: Up, tmp_path: Path) -> None:
    done = farm.run("generate", "masterpiece, corneo_dva", "--seed", "43", "-c", "2", "-o", str(tmp_path))
    job = done.stdout.strip()

    images = farm.json("jobs", "images", job)
    assert [i["seed"] for i in images] == [43, 44]
    assert {i["state"] for i in images} == {"succeeded"}
    (applied,) = images[0]["embeddings"]
    assert (applied["name"], applied["vectors"], applied["where"]) == ("corneo_dva", 10, ["prompt"])
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == ["00000-43.png", "00001-44.png"]
    with Image.open(files[0]) as picture:
        assert picture.info["parameters"] == images[0]["parameters"]
    assert "TI hashes: " in images[0]["parameters"]
    status = farm.json("jobs", "show", job)
    assert status["counts"] == {
        "queued": 0, "running": 0, "succeeded": 2, "failed": 0, "canceled": 0, "expired": 0
    }  # fmt: skip


def test_embedding_visibly_changes_the_picture(farm: Up) -> None:
    sdk = DirectFarm.from_env(farm.data)
    jobs = [
        sdk.generate("masterpiece", seed=7, embeddings=e) for e in ((), ("corneo_dva",), ("16-token-demo-neg:neg",))
    ]
    plain, positive, negative = (pixels((job.wait(120), job.images[0].png())[1]) for job in jobs)

    assert np.abs(plain - positive).mean() > 10
    assert np.abs(plain - negative).mean() > 1


def test_image_of_a_batch_equals_the_image_alone(farm: Up) -> None:
    sdk = DirectFarm.from_env(farm.data)
    together = sdk.generate("a red star on a blue background", seed=100, count=4)
    alone = sdk.generate("a red star on a blue background", seed=102)
    together.wait(120)
    alone.wait(120)

    difference = np.abs(pixels(together.images[2].png()) - pixels(alone.images[0].png()))

    assert difference.max() <= 1


def test_picture_has_its_content_type(farm: Up) -> None:
    sdk = DirectFarm.from_env(farm.data)
    job = sdk.generate("a girl", seed=1, steps=2)
    job.wait(120)
    s = sdk.settings
    client = boto3.client(
        "s3", endpoint_url=s.s3_endpoint, aws_access_key_id=s.s3_access_key, aws_secret_access_key=s.s3_secret_key
    )

    found = client.head_object(Bucket=s.s3_bucket, Key=f"jobs/{job.id}/000000.png")

    assert found["ContentType"] == "image/png"
    assert job.images[0].s3_url == f"s3://{s.s3_bucket}/jobs/{job.id}/000000.png"


def test_second_job_loads_nothing(farm: Up) -> None:
    (before,) = farm.json("workers", "ls")
    for _ in range(2):
        farm.run("generate", "corneo_dva", "--steps", "2")

    (worker,) = farm.json("workers", "ls")

    assert (worker["name"], worker["pid"], worker["loads"]) == (before["name"], before["pid"], before["loads"])
    assert set(worker) >= {"name", "pid", "host", "device", "checkpoints", "slots"}


def test_embedding_added_now_is_used_by_the_next_job(farm: Up, tmp_path: Path) -> None:
    path = tmp_path / "新 style-3.safetensors"
    save_file({"emb_params": np.full((2, 128), 0.5, np.float32)}, path)
    farm.run("embeddings", "add", str(path))

    images = json.loads(farm.run("generate", "a girl, 新 style-3", "--steps", "2", "--json").stdout)

    assert [applied["name"] for applied in images[0]["embeddings"]] == ["新 style-3"]
    assert farm.json("embeddings", "show", "新 style-3")["content_id"] == read_embedding(path).content_id


def test_checkpoint_added_now_is_served_without_a_restart(farm: Up, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(CHECKPOINT, copy)
    config = copy / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    farm.run("models", "add", str(copy), "--name", "second")

    farm.run("generate", "a girl", "-m", "second", "--steps", "2", "--timeout", "60")

    assert {model["name"] for model in farm.json("models", "ls")} == {"demo", "second"}
    (worker,) = farm.json("workers", "ls")
    assert sorted(worker["checkpoints"]) == ["demo", "second"]


def test_submit_reads_a_file_of_jobs(farm: Up, tmp_path: Path) -> None:
    rows = [{"prompt": "a girl", "steps": 2, "seed": n, "embeddings": ["corneo_dva"]} for n in range(3)]
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))

    (job,) = farm.run("submit", str(file), "--watch").stdout.split()

    assert farm.json("jobs", "show", job)["counts"]["succeeded"] == 3
    images = farm.json("jobs", "images", job)
    assert [image["seed"] for image in images] == [0, 1, 2]
    assert {use["name"] for image in images for use in image["embeddings"]} == {"corneo_dva"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "a", "--sampler", "Eular"], "Euler"),
        (["generate", "a", "--size", "100x100"], "width"),
        (["generate", "a", "--size", "big"], "128x128"),
        (["generate", "a", "--steps", "10000"], "steps"),
        (["generate", "a", "--seed", "99999999999"], "seed"),
        (["generate", "a", "-e", "corneo_dv"], "corneo_dva"),
        (["generate", "a, corneo_dvaa"], "corneo_dva"),
        (["generate", "a", "-m", "demmo"], "demo"),
        (["generate", "a", "--clip-skip", "12"], "clip_skip"),
        (["generate", "a", "-e", ""], "embeddings"),
        (["generate", "a" * 19_995, "-e", "corneo_dva"], "prompt"),
        (["generate", "a <lora:x:1>"], "lora"),
        (["embeddings", "add", "/nowhere.pt"], "nowhere"),
        (["embeddings", "show", "nope"], "nope"),
        (["models", "add", "/nowhere"], "model_index"),
        (["jobs", "show", "nope"], "nope"),
        (["submit", "/nowhere.jsonl"], "nowhere"),
    ],
)
def test_bad_request_is_one_sentence_and_queues_nothing(farm: Up, arguments: list[str], says: str) -> None:
    before = len(farm.json("jobs", "ls", "--limit", "500"))

    done = farm.run(*arguments, expect=2)

    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert len(farm.json("jobs", "ls", "--limit", "500")) == before


def test_file_with_one_bad_line_queues_nothing(farm: Up) -> None:
    before = len(farm.json("jobs", "ls", "--limit", "500"))

    done = farm.run("submit", "-", expect=2, stdin='{"prompt": "a"}\n{"prompt": "b", "steps": 0}\n')

    assert "line 2, column 17: steps" in done.stderr
    assert len(farm.json("jobs", "ls", "--limit", "500")) == before


def test_no_farm_is_exit_code_3(farm: Up, tmp_path: Path) -> None:
    done = farm.run("jobs", "ls", "--data", str(tmp_path), expect=3)

    assert "latentfarm up" in done.stderr


def test_readme_example_works(farm: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.setenv("LATENTFARM_DATA", str(farm.data))
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "README.md", "exec"), {})  # noqa: S102 - our own README

    assert [f.suffix for f in tmp_path.iterdir()] == [".png"]
    assert next(tmp_path.iterdir()).stat().st_size > 1000


def test_picture_is_made_again_from_itself(farm: Up, tmp_path: Path) -> None:
    prompt = "a [girl:corneo_dva:0.3], (red background:1.2)"
    wish = ("--sampler", "DPM++ 2M Karras", "--hires", "1.5", "--set", "ngms=1.5", "--seed", "43", "--steps", "4")
    farm.run("generate", prompt, *wish, "-o", str(tmp_path / "first"))
    (first,) = (tmp_path / "first").iterdir()

    fields = json.loads(farm.run("params", str(first), "--json").stdout)
    farm.run("generate", "--from", str(first), "-o", str(tmp_path / "second"))

    assert (fields["prompt"], fields["Sampler"], fields["Schedule type"]) == (prompt, "DPM++ 2M", "Karras")
    assert "corneo_dva: " in fields["TI hashes"]
    assert next((tmp_path / "second").iterdir()).read_bytes() == first.read_bytes()
