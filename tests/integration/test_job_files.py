"""Sweep files and tables, plans, manifests and retention on real servers."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from latentfarm.farm import DirectFarm
from latentfarm.jobfiles import InvalidRows
from latentfarm_demo import EMBEDDINGS
from latentfarm_shared.housekeeping import Housekeeper, manifest_key
from latentfarm_shared.ledger.queues import LANES
from latentfarm_shared.specs import JobSpec

SWEEP = """
name: hair and steps
defaults:
  prompt: "masterpiece, {red|blue} hair"
  negative_prompt: bad, __flaws__
  steps: 5
dynamic: random
matrix:
  seed: 1..400
  sampler: [Euler, DDIM]
zip:
  cfg_scale: [3, 7]
  width: [64, 128]
include:
  - {steps: 50}
exclude:
  - {sampler: DDIM, cfg_scale: 3}
wildcards:
  flaws: [blurry, "low quality"]
order: spread
tags: [test]
expires_in: 2d
"""


@pytest.fixture
def farm(servers: DirectFarm) -> Iterator[DirectFarm]:
    if "demo" not in servers.registry.checkpoints():  # another test may have emptied the index
        servers.registry.reindex()
        servers.library.reindex()
    usable = {record.name for record in servers.embeddings.ls()}
    for path in EMBEDDINGS.glob("*.pt"):
        if path.stem not in usable:  # … or removed what ships
            servers.embeddings.add(path)
    held = {job.id for job in servers.jobs(1000)}
    yield servers
    for job in servers.jobs(1000):
        if job.id not in held:
            job.cancel()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def render_all(farm: DirectFarm, job: str, *, fails: tuple[int, ...] = ()) -> None:
    """Claim and finish images as a worker would, without pictures."""
    checkpoint = farm.ledger.locks(job)[0].checkpoint.hash
    queues = [f"{lane}:{checkpoint}" for lane in LANES]
    while claim := farm.ledger.claim("w", queues):
        if claim.job == job and claim.index in fails:
            farm.ledger.fail(claim, "w", "RENDER_FAILED", "why")
        else:
            farm.ledger.succeed(claim, "w")


def test_sweep_file_says_what_its_sections_say(farm: DirectFarm, tmp_path: Path) -> None:
    (job,) = farm.submit_file(write(tmp_path / "sweep.yaml", SWEEP))
    spec = job.spec

    assert (spec.name, spec.total, spec.order, spec.expires_in) == ("hair and steps", 400 * 3 + 1, "spread", 172_800)
    assert {image.spec.name for image in job.iter_images(0, 3)} == {"hair and steps"}
    image = job.images[1200].image
    assert (image.job.steps, image.job.prompt in ("masterpiece, red hair", "masterpiece, blue hair")) == (50, True)
    assert image.job.negative_prompt in ("bad, blurry", "bad, low quality")


def test_same_file_again_is_the_same_job_and_resumes(farm: DirectFarm, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"prompt": "a"}\n{"prompt": "b", "seed": 5, "count": 2}\n')
    (job,) = farm.submit_file(path)
    render_all(farm, job.id, fails=(1,))
    assert job.status().state == "failed"
    (again,) = farm.submit_file(path)

    assert again.id == job.id
    assert (again.status().state, again.status().counts["queued"]) == ("running", 1)
    (anew,) = farm.submit_file(path, anew=True)
    assert anew.id != job.id
    assert [image.seed for image in anew.images][1:] == [5, 6]


def test_rows_of_other_checkpoints_and_lanes_are_jobs_of_their_own(farm: DirectFarm, tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "lane": "interactive"}, {"prompt": "c"}]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    jobs = farm.submit_file(path, defaults={"lane": "batch"})

    assert sorted((job.spec.lane, job.spec.total) for job in jobs) == [("batch", 2), ("interactive", 1)]


def test_embeddings_of_rows_stand_in_their_prompts(farm: DirectFarm, tmp_path: Path) -> None:
    text = "prompt,embeddings,steps\ngirl,corneo_dva;16-token-demo-neg,7\nboy,,8\n"
    (job,) = farm.submit_file(write(tmp_path / "rows.csv", text))

    assert [(image.image.job.prompt, image.image.job.steps) for image in job.images] == [
        ("girl, corneo_dva", 7),
        ("boy", 8),
    ]
    assert job.images[0].image.job.negative_prompt == "16-token-demo-neg"
    assert {record.name for record in job.lock.embeddings} == {"corneo_dva", "16-token-demo-neg"}


def test_every_wrong_row_is_told_with_its_place_and_nothing_is_queued(farm: DirectFarm, tmp_path: Path) -> None:
    rows = [
        '{"prompt": "a"}',
        '{"prompt": "b", "step": 5}',
        "",
        '{"prompt": "c", "sampler": "Oiler"}',
        "{",
        '{"steps": 0}',
    ]
    before = [job.id for job in farm.jobs()]
    with pytest.raises(InvalidRows) as found:
        farm.submit_file(write(tmp_path / "rows.jsonl", "\n".join(rows)))

    places = [(error.line, error.column, error.field) for error in found.value.errors]
    assert places == [(2, 17, "step"), (4, 17, "sampler"), (5, 2, "row"), (6, 2, "steps")]
    assert "did you mean 'Euler'" in str(found.value)
    assert [job.id for job in farm.jobs()] == before


def test_plan_tells_what_would_happen_and_queues_nothing(farm: DirectFarm, tmp_path: Path) -> None:
    long = ", ".join(["masterpiece"] * 90)
    rows = [{"prompt": "corneo_dva"}, {"prompt": "corneo_dva", "seed": 3}, {"prompt": "a", "seed": 3},
            {"prompt": "a", "seed": 3}, {"prompt": long}, {"prompt": "x", "embeddings": ["nobody"]}]  # fmt: skip
    before = [job.id for job in farm.jobs()]
    farm.ledger.note_rate([farm.registry.checkpoint("demo").hash], 1000.0)
    plan = farm.plan(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))))

    assert (plan.images, plan.duplicates, plan.long_prompts) == (6, 1, 1)
    assert [embedding.name for embedding in plan.embeddings] == ["corneo_dva"]
    assert "nobody" in plan.missing[0]
    assert plan.estimate is not None
    assert plan.estimate.gpu_seconds == pytest.approx(6 * 128 * 128 * 20 / 1000, rel=0.01)
    assert plan.samples[0] == "corneo_dva"
    assert [job.id for job in farm.jobs()] == before


def test_manifest_is_whole_whoever_dies_and_failures_can_be_submitted_again(farm: DirectFarm, tmp_path: Path) -> None:
    job = farm.submit(JobSpec.check({"prompt": "a", "seed": 1, "count": 2500, "order": "random", "steps": 7}))
    render_all(farm, job.id, fails=(3, 2000))
    keeper = Housekeeper(farm.ledger, farm.store)
    touched = farm.ledger.touched(job.id)
    assert [segment for segment, _ in touched] == [0, 1, 2]
    farm.ledger.written(job.id, touched[:1])  # somebody wrote one, so it says, and died
    farm.store.put(f"manifests/{job.id}/segments/000000.jsonl", "".join(
        keeper._lines(job.id, job.spec, farm.tables.of(job.spec), 0)).encode())  # fmt: skip
    while job.id in farm.ledger.dirty(1000):  # behind what other tests left
        farm.ledger.redis.delete("lf:turn:house", f"lf:turn:manifest:{job.id}")
        keeper.keep()

    rows = [json.loads(line) for line in job.manifest().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(2500))
    assert {row["index"] for row in rows if row["state"] == "failed"} == {3, 2000}
    again = job.manifest("failed").decode()
    assert again.count("\n") == 2
    (second,) = farm.submit_file(write(tmp_path / "failed.jsonl", again))
    assert sorted(image.seed for image in second.images) == [4, 2001]
    assert second.images[0].image.job.steps == 7
    assert job.id not in farm.ledger.dirty()


def test_job_is_deleted_when_its_time_is_over_and_no_other(farm: DirectFarm) -> None:
    kept = farm.submit(JobSpec.check({"prompt": "a", "seed": 1, "lane": "batch"}))
    gone = farm.submit(JobSpec.check({"prompt": "a", "seed": 2, "keep": 0.001, "lane": "batch"}))
    farm.store.put(f"jobs/{gone.id}/000000.png", b"x")
    farm.store.put(f"jobs/{kept.id}/000000.png", b"x")
    farm.ledger.redis.delete("lf:turn:house")
    Housekeeper(farm.ledger, farm.store).keep()
    assert gone.status().state == "queued", "nothing is deleted that is not final"
    render_all(farm, gone.id)
    for _ in range(2):
        farm.ledger.redis.delete("lf:turn:house")
        Housekeeper(farm.ledger, farm.store).keep()

    assert farm.ledger.redis.exists(f"lf:job:{gone.id}") == 0
    assert not farm.store.exists(f"jobs/{gone.id}/000000.png")
    assert not farm.store.exists(manifest_key(gone.id))
    assert farm.store.exists(f"jobs/{kept.id}/000000.png")
    assert kept.status().state == "succeeded"


def test_client_key_makes_a_submission_repeatable(farm: DirectFarm) -> None:
    key = secrets.token_hex(4)
    jobs = [farm.submit(JobSpec.check({"prompt": "a", "count": 3, "key": key})) for _ in range(2)]

    assert jobs[0].id == jobs[1].id
    assert [job.is_known for job in jobs] == [False, True]


def test_seeds_of_a_row_count_up_from_the_one_drawn(farm: DirectFarm, tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "count": 3},
        {"prompt": "b", "count": 2, "seed": 5, "variation_strength": 0.1, "variation_seed": 7},
    ]
    (job,) = farm.submit_file(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))))
    images = [image.image for image in job.images]

    assert [image.seed - images[0].seed for image in images[:3]] == [0, 1, 2]
    assert [(image.seed, image.variation_seed) for image in images[3:]] == [(5, 7), (5, 8)]


def test_seed_beyond_the_last_is_told_in_its_line(farm: DirectFarm, tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b", "seed": 2**32 - 1, "count": 2}]
    with pytest.raises(InvalidRows) as found:
        farm.submit_file(write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))))

    assert [(error.line, error.field) for error in found.value.errors] == [(2, "seed")]
