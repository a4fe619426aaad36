"""The life of an embedding through the real command line: found, added, used, replaced, measured, made."""

import io
import json
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from demo_checkpoint.captions import portrait_tags
from demo_checkpoint.classify import check
from demo_checkpoint.inversion import CHARACTER
from latentfarm.farm import DirectFarm
from latentfarm_shared.infotext import read_png
from latentfarm_shared.specs import JobSpec
from PIL import Image
from safetensors.numpy import save

from tests.acceptance.conftest import LATENTFARM, Up, clean_environment, eventually, start_up

pytestmark = pytest.mark.acceptance


def write(path: Path, seed: int, vectors: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(seed).standard_normal((vectors, 128)).astype(np.float32) * np.float32(0.03)
    path.write_bytes(save({"emb_params": rows}))
    return path


def test_inspect_needs_no_farm(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a b-1.safetensors", 1), tmp_path / "错误.pt"
    bad.write_text('{"error": "not found"}')
    command = [LATENTFARM, "embeddings", "inspect", str(good), str(bad), str(tmp_path / "nothing.pt"), "--json"]

    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env=clean_environment() | {"LATENTFARM_DATA": str(tmp_path)},
    )

    rows = json.loads(done.stdout)
    assert done.returncode == 1
    assert [row["ok"] for row in rows] == [True, False, False]
    assert (rows[0]["stem"], rows[0]["vectors"], rows[0]["widths"]) == ("a b-1", 4, {"clip_l": 128})
    assert (rows[0]["family"], rows[0]["layout"]) == ("unknown", "kohya")
    assert rows[0]["autov2"] == rows[0]["sha256"][:10]
    assert rows[1]["reason"].startswith("ERROR_MESSAGE: JSON")
    assert rows[2]["reason_code"] == "UNREADABLE"


def test_commands_of_the_library(farm: Up, tmp_path: Path) -> None:
    path = write(tmp_path / "cli-style 猫-1.safetensors", 2)
    (added,) = farm.json("embeddings", "add", str(path))
    assert (added["name"], added["family"]) == ("cli-style 猫-1", "demo")
    name = added["name"]
    assert name in [row["name"] for row in farm.json("embeddings", "ls")]

    farm.run("embeddings", "alias", name, "short-1")
    farm.run("embeddings", "rename", name, "renamed-1")
    card = farm.json("embeddings", "show", "renamed-1")
    assert len(card["norms"]["clip_l"]) == 4
    assert len(card["nearest_words"]["demo"]) == 4
    assert card["sources"][0]["file_name"] == path.name
    refused = farm.run("generate", f"masterpiece, {name}", expect=2).stderr
    assert "renamed to 'renamed-1'" in refused

    (exported,) = farm.json("embeddings", "export", "renamed-1", "--format", "a1111", "-o", str(tmp_path / "out"))
    assert farm.json("embeddings", "inspect", exported)[0]["content_id"] == added["content_id"]
    merged = farm.json("embeddings", "merge", "corneo_dva + 0.5*renamed-1", "--name", "merged-1")
    assert merged["vectors"] == 10
    assert farm.json("embeddings", "diff", "merged-1", "corneo_dva")["likeness"] < 1
    farm.run("embeddings", "disable", "merged-1", "--reason", "too strong")
    assert "too strong" in farm.run("generate", "masterpiece, merged-1", expect=2).stderr
    farm.run("embeddings", "rm", "merged-1", "renamed-1")
    assert "removed" in farm.run("generate", "masterpiece, renamed-1", expect=2).stderr
    for command in (("rm", "nothing-1"), ("show", "nothing-1"), ("add", str(tmp_path / "nothing.pt"))):
        assert len(farm.run("embeddings", *command, expect=2).stderr.strip().splitlines()) == 1


def test_missing_embedding_may_be_done_without_and_the_record_says_so(farm: Up) -> None:
    sdk = DirectFarm.from_env(farm.data)
    spec = JobSpec.check({"prompt": "masterpiece, <gone-1>", "on_missing": "drop", "steps": 4, "seed": 3})

    job = sdk.submit(spec)
    job.wait(60)

    (image,) = job.images
    assert job.status().dropped[0].name == "gone-1"
    assert image.summary()["dropped"]
    written = read_png(image.png())
    assert written is not None
    assert (written.prompt, written.fields["Dropped embeddings"]) == ("masterpiece", "gone-1")


def test_adding_a_word_while_jobs_wait_changes_no_pixel(tmp_path: Path) -> None:
    up = start_up(tmp_path / "strict", environ={"LATENTFARM_DETERMINISM": "strict"})
    try:
        sdk = DirectFarm.from_env(up.data)
        prompt = "masterpiece, 1girl, blue hair"
        before = sdk.generate(prompt, seed=11, steps=8)
        before.wait(60)
        waiting = [sdk.generate(prompt, seed=11, steps=8, lane="batch", reuse=False) for _ in range(12)]
        added = sdk.embeddings.add(write(tmp_path / "blue.safetensors", 5), allow_word=True)
        assert sum(not job.status().is_final for job in waiting) > 1

        for job in waiting:
            job.wait(60)
        after = sdk.generate(prompt, seed=11, steps=8)
        after.wait(60)

        assert {job.images[0].png() for job in waiting} == {before.images[0].png()}
        assert [e.content_id for e in after.lock.embeddings] == [added.content_id]
        assert after.images[0].png() != before.images[0].png()
    finally:
        assert up.stop() == 0


def test_preview_measures_and_sweep_lays_out(farm: Up, tmp_path: Path) -> None:
    shown = farm.json("embeddings", "preview", "corneo_dva", "-o", str(tmp_path / "preview.png"))
    assert shown["effect"] > 0.05
    assert not shown["dead"]
    assert farm.json("embeddings", "show", "corneo_dva")["preview"]
    nearly_nothing = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32) * np.float32(1e-4)
    dead = tmp_path / "dead-1.safetensors"
    dead.write_bytes(save({"emb_params": nearly_nothing}))
    farm.run("embeddings", "add", str(dead))
    assert farm.json("embeddings", "preview", "dead-1")["dead"]

    swept = farm.json(
        "embeddings", "sweep", "corneo_dva", "--strength", "0,1", "--seeds", "2", "-o", str(tmp_path / "s.png")
    )

    assert (swept["state"], swept["images"]) == ("succeeded", 4)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 2 * 160
    images = farm.json("jobs", "images", swept["job"])
    assert [image["point"] for image in images] == [
        {"strength:corneo_dva": s, "seed": n} for s in (0, 1) for n in (43, 44)
    ]


def test_workers_follow_adds_and_replaces_while_jobs_run(tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    write(watched / "from-folder-1.safetensors", 90)
    up = start_up(tmp_path / "farm", "--workers", "2", environ={"LATENTFARM_EMBEDDINGS_DIR": str(watched)})
    try:
        sdk = DirectFarm.from_env(up.data)
        pids = sorted(worker.pid for worker in sdk.workers())
        eventually(lambda: any(r.name == "from-folder-1" for r in sdk.embeddings.ls()))
        resident = _add_and_wait_until_resident(sdk, write(tmp_path / "idle-1.safetensors", 91))
        assert resident < 1.0

        write(watched / "sub" / "dropped-in-1.safetensors", 92)
        eventually(lambda: any(r.name == "dropped-in-1" for r in sdk.embeddings.ls()), 10)

        stop = threading.Event()
        load = threading.Thread(target=_keep_busy, args=(sdk, stop))
        load.start()
        jobs = []
        for number in range(16):
            record = sdk.embeddings.add(write(tmp_path / f"hot-{number % 4}x.safetensors", number))
            jobs.append((sdk.generate(f"masterpiece, hot-{number % 4}x", seed=number, steps=4), record))
        for job, record in jobs:
            assert job.wait(120).state == "succeeded"
            (image,) = job.images
            written = read_png(image.png())
            assert written is not None
            assert written.fields["TI hashes"] == f"{record.name}: {record.ti_hash}"
            assert [a.record.content_id for a in image.embeddings] == [record.content_id]
        stop.set()
        load.join()
        assert sorted(worker.pid for worker in sdk.workers()) == pids
    finally:
        assert up.stop() == 0


def _add_and_wait_until_resident(sdk: DirectFarm, path: Path) -> float:
    record = sdk.embeddings.add(path)
    began = time.monotonic()
    names = [worker.name for worker in sdk.workers()]
    eventually(lambda: all(record.content_id in sdk.ledger.residents(name) for name in names), 10)
    return time.monotonic() - began


def _keep_busy(sdk: DirectFarm, stop: threading.Event) -> None:
    while not stop.is_set():
        sdk.generate("masterpiece, from-folder-1", count=4, steps=4, lane="batch").wait(120)


def test_prompt_is_packed_into_an_embedding_that_keeps_its_attributes(farm: Up, tmp_path: Path) -> None:
    long = ", ".join(["1girl", *portrait_tags(CHARACTER).values()])

    packed = farm.json("embeddings", "pack", long, "--name", "packed-1x", "-o", str(tmp_path / "p.png"))

    assert packed["quality"] > 0.5
    sdk = DirectFarm.from_env(farm.data)
    assert sdk.embeddings.show("packed-1x").vectors == 8
    shares = [_attributes(sdk, f"masterpiece, high quality, {text}") for text in ("packed-1x", long)]
    assert shares[0] >= 0.9 * shares[1]


def _attributes(sdk: DirectFarm, prompt: str) -> float:
    job = sdk.generate(prompt, seed=700, count=16, steps=15, lane="batch")
    job.wait(120)
    found = [check(Image.open(io.BytesIO(image.png())), CHARACTER) for image in job.iter_images()]
    return float(np.mean([list(one.values()) for one in found]))


def test_packing_can_be_canceled(farm: Up) -> None:
    sdk = DirectFarm.from_env(farm.data)
    job = sdk.pack("1girl, red hair", "never-1x", steps=20_000)
    eventually(lambda: (job.status().progress or {}).get("stage") == "learning", 60)

    job.cancel()

    assert job.wait(30).state == "canceled"
    assert "never-1x" not in [record.name for record in sdk.embeddings.ls(everything=True)]
