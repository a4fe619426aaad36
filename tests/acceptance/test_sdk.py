"""One surface for every kind of farm: over HTTP, to be awaited, directly over Redis and S3, and in memory."""

from __future__ import annotations

import asyncio
import base64
import inspect
import io
import pickle
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from latentfarm import AsyncFarm, DirectFarm, Farm, FarmError, JobSpec
from latentfarm.client.aio import AsyncEmbeddings, AsyncImage, AsyncJob
from latentfarm.client.sync import Embeddings, Image, Job
from latentfarm.jobfiles import InvalidRows
from latentfarm.jobs import FarmImage, ImageNotReady, WaitTimeout
from latentfarm.jobs import Job as DirectJob
from latentfarm.testing import MemoryFarm
from latentfarm_demo import EMBEDDINGS
from latentfarm_shared.errors import AlreadyTaken, InvalidField, UnknownName, UsageError
from latentfarm_shared.ledger import Limits
from PIL import Image as PilImage

from tests.acceptance.conftest import Up
from tests.sdk_surface import Awaited, running_loop

pytestmark = pytest.mark.acceptance
KINDS = ("http", "async", "direct", "memory")


@pytest.fixture(params=KINDS)
def sdk(request: pytest.FixtureRequest, farm: Up) -> Iterator[Any]:
    url = farm.ready["api_url"]
    if request.param == "http":
        with Farm(url) as found:
            yield found
    elif request.param == "direct":
        yield Farm.from_env(farm.data)
    elif request.param == "memory":
        yield MemoryFarm(embeddings=["corneo_dva", "16-token-demo-neg"])
    else:
        with running_loop() as loop:
            awaited = Awaited(AsyncFarm(url), loop)
            yield awaited
            awaited.close()


def test_job_is_generated_and_waited_for(sdk: Any) -> None:
    seen: list[str] = []
    job = sdk.generate("masterpiece, corneo_dva", embeddings=["16-token-demo-neg:neg"], seed=43, steps=2, count=3)
    status = job.wait(60, lambda status: seen.append(status.state))

    assert (status.state, status.counts["succeeded"]) == ("succeeded", 3)
    assert seen[-1] == "succeeded"
    images = job.images
    assert [(image.index, image.seed, image.state) for image in images] == [
        (0, 43, "succeeded"), (1, 44, "succeeded"), (2, 45, "succeeded"),
    ]  # fmt: skip
    assert "TI hashes" in images[0].parameters
    assert len(images[0].embeddings) == 2
    assert PilImage.open(io.BytesIO(images[1].png())).size == (128, 128)
    assert images[1].pil().size == (128, 128)
    assert [image.index for image in job.iter_images(1, 2)] == [1]
    assert "://" in images[0].link(60)
    assert [event.version for event in job.events()] == list(range(1, status.version + 1))
    assert job.events(status.version) == []
    assert sdk.job(job.id[:9]).id == job.id
    assert sdk.jobs(5)[0].id == job.id
    assert sdk.statuses(5, "succeeded")[0].id == job.id


def test_pictures_are_saved_and_a_download_goes_on(sdk: Any, tmp_path: Path) -> None:
    job = sdk.generate("a red circle", seed=7, steps=1, count=5)
    job.wait(60)
    told: list[Path] = []
    first = job.download(tmp_path, told.append)
    kept = first[0].stat().st_mtime_ns
    first[1].unlink()
    first[2].write_bytes(b"half of a picture")
    again = job.download(tmp_path)

    assert [path.name for path in first] == [f"0000{n}-{7 + n}.png" for n in range(5)]
    assert sorted(told) == first == again
    assert first[0].stat().st_mtime_ns == kept
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in first)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".png"]
    assert job.images[2].save(tmp_path / "deep" / "one.png").read_bytes() == first[2].read_bytes()

    other = sdk.generate("a blue square", seed=7, steps=1, count=5)
    other.wait(60)
    others = other.download(tmp_path)
    assert others == first
    assert b"a blue square" in others[0].read_bytes(), "a file of the same name is another job's picture"


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        ({"embeddings": ["corneo_dvaa"]}, UnknownName, "did you mean 'corneo_dva'"),
        ({"sampler": "Eular"}, UsageError, "did you mean 'Euler'"),
        ({"steps": 100_000}, InvalidField, "steps"),
        ({"model": "demoo"}, UnknownName, "did you mean 'demo'"),
    ],
)
def test_what_is_wrong_is_said_by_a_typed_error(
    sdk: Any, values: dict[str, Any], kind: type[UsageError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        sdk.generate("a girl", **values)
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own

    assert caught.value.exit_code == 2
    assert isinstance(again, kind)
    assert str(again) == str(caught.value)
    if isinstance(caught.value, UnknownName):
        assert caught.value.suggestions


def test_jobs_are_steered(sdk: Any) -> None:
    job = sdk.generate("a girl, oil painting", count=300, steps=1, lane="batch", seed=secrets.randbelow(10**6))
    job.pause()
    job.prioritise(5)
    assert job.status().priority == 5
    job.resume()
    job.cancel()
    status = job.wait(60)
    job.retry(missing=True)
    job.cancel()

    assert status.state in {"canceled", "succeeded"}
    assert job.wait(60).is_final
    assert [cause.code for cause in job.why()] == [cause.code for cause in sdk.why(job.id)]


def test_submission_repeated_is_one_job(sdk: Any) -> None:
    spec, job_id = JobSpec.check({"prompt": "a girl", "steps": 1, "seed": 3}), secrets.token_hex(8)
    first, again = sdk.submit(spec, job_id), sdk.submit(spec, job_id)

    assert first.id == again.id == job_id
    assert first.wait(60).total == 1


def test_unknown_jobs_and_images_say_so(sdk: Any) -> None:
    with pytest.raises(UnknownName):
        sdk.job("0123456789abcdef")
    with pytest.raises(UnknownName):
        sdk.job("nope")
    job = sdk.generate("a girl", count=2, steps=1)
    job.wait(60)
    assert list(job.iter_images(5, 9)) == []


def test_file_is_planned_submitted_and_resumed(sdk: Any, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"prompt: a girl {secrets.token_hex(4)}\nsteps: 1\nmatrix:\n  cfg_scale: [4, 7]\n  seed: [1, 2]\n")
    plan = sdk.plan(path, {"lane": "batch"})
    (job,) = sdk.submit_file(path, defaults={"lane": "batch", "model": "demo"})
    job.wait(60)
    (again,) = sdk.submit_file(path, defaults={"lane": "batch", "model": "demo"})

    assert (plan.images, plan.jobs) == (4, 1)
    assert job.id == again.id
    assert again.wait(60).counts["succeeded"] == 4
    assert {image.point["cfg_scale"] for image in job.images} == {4, 7}

    path.write_text('{"prompt": "a"}\n{"prompt": "b", "stepz": 3}\n')
    wrong = path.rename(tmp_path / "rows.jsonl")
    with pytest.raises(InvalidRows) as caught:
        sdk.submit_file(wrong)
    assert caught.value.errors[0].line == 2
    assert "stepz" in str(caught.value)


def test_embeddings_are_listed_added_named_and_removed(sdk: Any, tmp_path: Path) -> None:
    name = f"sdk_{secrets.token_hex(3)}"
    path = tmp_path / f"{name}.pt"
    path.write_bytes(next(EMBEDDINGS.glob("corneo*.pt")).read_bytes())
    added = sdk.embeddings.add(path)

    assert added.name == name
    assert sdk.embeddings.show(name).version == added.version
    assert {"corneo_dva", name} <= {record.name for record in sdk.embeddings.ls()}
    sdk.embeddings.alias(name, f"{name}_too")
    assert sdk.embeddings.show(f"{name}_too").vectors == added.vectors
    sdk.embeddings.rm(f"{name}_too")
    sdk.embeddings.rm(name)
    assert name not in {record.name for record in sdk.embeddings.ls()}
    with pytest.raises(UnknownName):
        sdk.embeddings.show("never_there")
    with pytest.raises(UsageError):
        sdk.embeddings.add(tmp_path / "not there.pt")
    assert "demo" in [record.name for record in sdk.models.ls()]


def test_farm_tells_of_workers_and_limits(sdk: Any) -> None:
    owner = f"o{secrets.token_hex(3)}"
    sdk.set_limits(owner, Limits(running=3))

    assert sdk.limits(owner).running == 3
    assert sdk.usage(owner) == {"running": 0, "queued": 0}
    assert isinstance(sdk.workers(), list)
    assert isinstance(sdk.aside(), dict)
    with pytest.raises(UnknownName):
        sdk.drain("nobody")


def test_waiting_ends_when_it_is_told_to(sdk: Any) -> None:
    if isinstance(sdk, MemoryFarm):
        sdk.memory.is_held = True  # where nothing lasts by itself
    job = sdk.generate("a girl", count=400, steps=30, lane="batch", seed=secrets.randbelow(10**6))
    with pytest.raises(WaitTimeout):
        job.wait(0.3)
    with pytest.raises(ImageNotReady):
        next(iter(job.iter_images(399, 400))).png()
    job.cancel()


def test_notebooks_show_jobs_and_pictures(sdk: Any) -> None:
    if isinstance(sdk, Awaited):
        pytest.skip("nothing can be awaited while a notebook asks how something looks")
    job = sdk.generate("a girl & a boy", count=2, steps=1, seed=5)
    job.wait(60)

    assert "a girl &amp; a boy" in job._repr_html_()
    assert job.images[0]._repr_png_().startswith(b"\x89PNG")
    shown = job.images._repr_html_()
    assert shown.count("data:image/png;base64,") == 2
    assert base64.b64decode(shown.partition("base64,")[2].partition('"')[0]).startswith(b"\x89PNG")
    assert job.images.sheet("two", across=1).size[1] > 500


def names_of(kind: type) -> dict[str, list[str]]:
    found = inspect.getmembers(kind, lambda member: inspect.isfunction(member) or isinstance(member, property))
    return {
        name: list(inspect.signature(member).parameters) if inspect.isfunction(member) else []
        for name, member in found
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("kind", "twin"), [(Farm, AsyncFarm), (Job, AsyncJob), (Embeddings, AsyncEmbeddings), (Image, AsyncImage)]
)
def test_asynchronous_twin_has_the_same_surface(kind: type, twin: type) -> None:
    assert names_of(kind) == names_of(twin)


@pytest.mark.parametrize(("kind", "direct"), [(Farm, DirectFarm), (Job, DirectJob), (Image, FarmImage)])
def test_direct_farm_has_all_that_one_over_http_has(kind: type, direct: type) -> None:
    over_http, directly = names_of(kind), names_of(direct)
    lacking = {
        name: parameters for name, parameters in over_http.items() if not set(parameters) <= set(directly.get(name, ()))
    }
    assert {name for name in over_http if name not in directly and not hasattr(direct, name)} <= {"close", "whoami"}
    assert set(lacking) <= {"close", "whoami"}


def test_key_that_is_taken_by_another_request_is_refused(sdk: Any) -> None:
    key = secrets.token_hex(6)
    sdk.generate("a girl", steps=1, key=key).wait(60)
    if isinstance(sdk, DirectFarm):
        pytest.skip("which compares requests by a digest that callers pass")
    with pytest.raises(AlreadyTaken):
        sdk.generate("a boy", steps=1, key=key)


def test_no_farm_at_the_address_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentfarm.client.flows.FIRST_PAUSE_S", 0.01)
    with pytest.raises(FarmError, match="does not answer") as caught:
        Farm("http://127.0.0.1:9").workers()
    assert caught.value.exit_code == 3
    with pytest.raises(InvalidField, match="farm's address"):
        Farm("ftp://farm")

    async def ask() -> None:
        async with AsyncFarm("http://127.0.0.1:9") as farm:
            await farm.workers()

    with pytest.raises(FarmError, match="does not answer"):
        asyncio.run(ask())
