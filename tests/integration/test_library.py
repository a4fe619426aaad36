"""The library of embeddings on real servers: versions, names, pins, and what a death in the middle leaves."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from latentfarm.farm import DirectFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.embeddings.sandbox import NotAnEmbedding, read_embedding
from latentfarm_shared.errors import EmbeddingInUse, EmbeddingRefused, InvalidField, UnknownName
from latentfarm_shared.ledger import Claim
from latentfarm_shared.library import name_key
from latentfarm_shared.records import EmbeddingRecord
from latentfarm_shared.specs import JobSpec
from PIL import Image
from safetensors.numpy import save

from tests.conftest import SANDBOX

WIDTH = 128


@pytest.fixture
def farm(servers: DirectFarm) -> DirectFarm:
    """The farm's servers, without what earlier tests left."""
    servers.models.add(CHECKPOINT, "demo")
    for record in servers.embeddings.ls():
        servers.embeddings.rm(record.name, force=True)
    return servers


def write(path: Path, value: float, vectors: int = 2, width: int = WIDTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.full((vectors, width), value, np.float32) + np.arange(vectors, dtype=np.float32)[:, None] / 100
    path.write_bytes(save({"emb_params": rows}))
    return path


def test_same_tensors_from_two_containers_are_one_embedding_with_two_sources(farm: DirectFarm, tmp_path: Path) -> None:
    first = farm.embeddings.add(write(tmp_path / "style-1.safetensors", 0.5))
    exported = farm.embeddings.export("style-1", tmp_path / "again", "a1111")

    second = farm.embeddings.add(exported)

    assert second == first
    assert {s.file_name for s in farm.library.sources(first.content_id)} == {"style-1.safetensors", "style-1.pt"}
    assert len(list(farm.library.history(name_key("", "style-1")))) == 1
    assert farm.library.original(first.file_sha256) == (tmp_path / "style-1.safetensors").read_bytes()


def test_name_that_is_taken_gets_a_new_version_and_the_old_one_has_an_address(farm: DirectFarm, tmp_path: Path) -> None:
    old = farm.embeddings.add(write(tmp_path / "moving-1.safetensors", 0.1))
    new = farm.embeddings.add(write(tmp_path / "moving-1.safetensors", 0.2))

    assert farm.embeddings.show("moving-1") == new
    assert farm.embeddings.show(f"Moving-1@{old.version}").content_id == old.content_id
    assert farm.embeddings.show(f"moving-1@{old.file_sha256[:10]}").content_id == old.content_id
    with pytest.raises(UnknownName, match="version"):
        farm.embeddings.show("moving-1@00000000")
    job = farm.generate("a girl", embeddings=[f"moving-1@{old.version}"])
    assert [e.content_id for e in job.lock.embeddings] == [old.content_id]
    assert job.spec.prompt == "a girl, moving-1"
    job.cancel()


def test_job_keeps_the_version_it_pinned_while_the_name_moves_on(farm: DirectFarm, tmp_path: Path) -> None:
    old = farm.embeddings.add(write(tmp_path / "pinned-1.safetensors", 0.1))
    job = farm.generate("a girl, pinned-1")

    farm.embeddings.add(write(tmp_path / "pinned-1.safetensors", 0.2))

    assert [e.content_id for e in job.lock.embeddings] == [old.content_id]
    assert farm.generate("a girl, pinned-1").lock.embeddings[0].content_id != old.content_id


def test_embedding_that_a_job_waits_for_is_not_removed_unless_forced(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "needed-1.safetensors", 0.1))
    job = farm.generate("a girl, needed-1")

    with pytest.raises(EmbeddingInUse, match="an unfinished job uses"):
        farm.embeddings.rm("needed-1")
    assert farm.embeddings.show("needed-1").state == "active"

    job.cancel()
    farm.embeddings.rm("needed-1")
    with pytest.raises(EmbeddingRefused, match="removed"):
        farm.generate("a girl, needed-1")


def test_finished_jobs_let_go_of_their_names(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "used-1.safetensors", 0.1))
    job = farm.generate("a girl, used-1", count=2)
    queues = [f"interactive:{job.lock.checkpoint.hash}"]
    while claim := farm.ledger.claim("pin-test", queues):
        assert isinstance(claim, Claim)
        farm.ledger.succeed(claim, "pin-test")

    assert job.status().state == "succeeded"
    assert farm.library.pins(name_key("", "used-1")) == 0
    farm.embeddings.rm("used-1")


def test_removal_between_looking_up_and_submitting_is_noticed(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "fleeting-1.safetensors", 0.1))
    frozen = farm.freeze(JobSpec.check({"prompt": "a girl, fleeting-1"}))
    farm.embeddings.rm("fleeting-1")

    with pytest.raises(EmbeddingRefused, match="a moment ago"):
        farm.ledger.submit("late-job", *frozen, farm._pins(frozen[1]))


def test_removed_and_disabled_names_are_refused_with_the_reason(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "off-1.safetensors", 0.1))
    farm.embeddings.disable("off-1", "it draws hands with six fingers")

    with pytest.raises(EmbeddingRefused, match="six fingers"):
        farm.generate("a girl, off-1")
    farm.embeddings.enable("off-1")
    farm.generate("a girl, off-1").cancel()


def test_alias_and_rename(farm: DirectFarm, tmp_path: Path) -> None:
    record = farm.embeddings.add(write(tmp_path / "long-name-15200.safetensors", 0.1))
    farm.embeddings.alias("long-name-15200", "gy2")
    job = farm.generate("a girl, gy2")
    assert [(e.name, e.content_id) for e in job.lock.embeddings] == [("gy2", record.content_id)]
    with pytest.raises(EmbeddingInUse):
        farm.embeddings.rm("long-name-15200")
    job.cancel()

    newer = farm.embeddings.add(write(tmp_path / "long-name-15200.safetensors", 0.2))
    assert farm.embeddings.show("gy2").content_id == newer.content_id

    farm.embeddings.rename("long-name-15200", "Yuno-2")
    assert farm.embeddings.show("yuno-2").name == "Yuno-2"
    with pytest.raises(EmbeddingRefused, match="renamed to 'Yuno-2'"):
        farm.generate("a girl, long-name-15200")


def test_aliases_and_versions_go_along_when_a_name_is_changed(farm: DirectFarm, tmp_path: Path) -> None:
    old = farm.embeddings.add(write(tmp_path / "first-name-1.safetensors", 0.1))
    farm.embeddings.add(write(tmp_path / "first-name-1.safetensors", 0.2))
    farm.embeddings.alias("first-name-1", "nick-1")

    farm.embeddings.rename("first-name-1", "second-name-1")

    assert farm.embeddings.show("nick-1").state == "active"
    assert farm.embeddings.show(f"second-name-1@{old.version}").content_id == old.content_id
    assert farm.embeddings.show(f"nick-1@{old.version}").content_id == old.content_id
    newer = farm.embeddings.add(write(tmp_path / "x.safetensors", 0.3), "second-name-1")
    assert farm.embeddings.show("nick-1").content_id == newer.content_id


def test_renaming_a_name_in_use_changes_nothing_and_can_be_done_later(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "busy-1.safetensors", 0.1))
    farm.embeddings.add(write(tmp_path / "other-1.safetensors", 0.2))
    job = farm.generate("a girl, busy-1")

    with pytest.raises(EmbeddingInUse):
        farm.embeddings.rename("busy-1", "free-1")
    assert {r.name for r in farm.embeddings.ls()} == {"busy-1", "other-1"}
    job.cancel()
    with pytest.raises(InvalidField, match="already"):
        farm.embeddings.rename("busy-1", "other-1")
    assert farm.embeddings.show("busy-1").state == "active"

    farm.embeddings.rename("busy-1", "free-1")
    assert {r.name for r in farm.embeddings.ls()} == {"free-1", "other-1"}


@pytest.mark.parametrize("verb", ["rm", "disable", "enable", "alias", "rename"])
def test_versions_cannot_be_changed(farm: DirectFarm, tmp_path: Path, verb: str) -> None:
    record = farm.embeddings.add(write(tmp_path / "fixed-1.safetensors", 0.1))
    more = ("another-1",) if verb in ("alias", "rename") else ()

    with pytest.raises(InvalidField, match="version"):
        getattr(farm.embeddings, verb)(f"fixed-1@{record.version}", *more)

    assert [r.name for r in farm.embeddings.ls()] == ["fixed-1"]


def test_disabling_while_somebody_replaces_loses_neither(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "raced-1.safetensors", 0.1))
    slow = DirectFarm(farm.settings)
    assert slow.library.names()
    newer = farm.embeddings.add(write(tmp_path / "raced-1.safetensors", 0.2))
    stale = dict(slow.library.names())
    slow.library.names = lambda: stale | {"/raced-1": stale["/raced-1"].model_copy(update={"number": 1})}  # type: ignore[method-assign]

    slow.embeddings.disable("raced-1")

    disabled = farm.embeddings.show("raced-1")
    assert (disabled.state, disabled.content_id) == ("disabled", newer.content_id)
    assert farm.embeddings.enable("raced-1").content_id == newer.content_id


def test_owner_cannot_change_the_farms_names(farm: DirectFarm, tmp_path: Path) -> None:
    ann = DirectFarm(farm.settings, owner="ann")
    farm.embeddings.add(write(tmp_path / "common-1.safetensors", 0.1))

    for verb, more in (("rm", ()), ("disable", ()), ("rename", ("mine-1",))):
        with pytest.raises(UnknownName):
            getattr(ann.embeddings, verb)("common-1", *more)

    assert farm.embeddings.show("common-1").state == "active"
    with pytest.raises(InvalidField, match="owner"):
        DirectFarm(farm.settings, owner="a/b")


def test_names_that_prompts_read_alike_are_one(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "bad-hand-9.safetensors", 0.1))
    farm.embeddings.add(write(tmp_path / "x.safetensors", 0.2), "Bad - Hand-9")
    farm.embeddings.add(write(tmp_path / "y.safetensors", 0.3), "cafe\u0301-1")

    assert [r.name for r in farm.embeddings.ls()] == ["Bad - Hand-9", "caf\u00e9-1"]
    assert farm.embeddings.show("caf\u00e9-1").name == "caf\u00e9-1"


def test_broken_index_and_half_a_removal_are_mended(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "mended-1.safetensors", 0.1))
    farm.ledger.take_name("/mended-1", force=False)  # and S3 never heard of it
    assert farm.embeddings.show("mended-1").state == "removed"

    farm.embeddings.reindex()
    assert farm.embeddings.show("mended-1").state == "active"
    farm.ledger.take_name("/mended-1", force=False)
    farm.embeddings.rm("mended-1")
    farm.embeddings.reindex()
    assert farm.embeddings.show("mended-1").state == "removed"


def test_adding_with_a_lost_index_goes_on_from_what_the_store_has(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "lost-1.safetensors", 0.1))
    farm.embeddings.add(write(tmp_path / "lost-1.safetensors", 0.2))
    farm.ledger.redis.delete("lf:names", "lf:names:number", "lf:names:changes")

    again = farm.embeddings.add(write(tmp_path / "lost-1.safetensors", 0.1))

    farm.embeddings.reindex()
    assert farm.embeddings.show("lost-1").content_id == again.content_id


def test_name_that_prompts_use_needs_to_be_allowed(farm: DirectFarm, tmp_path: Path) -> None:
    path = write(tmp_path / "girl.safetensors", 0.1)

    with pytest.raises(InvalidField, match="--allow-word"):
        farm.embeddings.add(path)
    record = farm.embeddings.add(path, allow_word=True)

    assert [e.content_id for e in farm.generate("a girl").lock.embeddings] == [record.content_id]
    farm.embeddings.rm("girl", force=True)
    assert not farm.generate("a girl").lock.embeddings


def test_owners_names_come_before_the_farms(farm: DirectFarm, tmp_path: Path) -> None:
    ann, bob = DirectFarm(farm.settings, owner="ann"), DirectFarm(farm.settings, owner="bob")
    common = farm.embeddings.add(write(tmp_path / "style-9.safetensors", 0.1))
    own = ann.embeddings.add(write(tmp_path / "style-9.safetensors", 0.2))

    assert ann.embeddings.show("style-9").content_id == own.content_id
    assert bob.embeddings.show("style-9").content_id == common.content_id
    assert ann.generate("a girl, style-9").lock.embeddings[0].content_id == own.content_id
    ann.embeddings.rm("style-9", force=True)
    assert ann.generate("a girl, style-9").lock.embeddings[0].content_id == common.content_id
    assert bob.generate("a girl, style-9").lock.embeddings[0].content_id == common.content_id


def test_index_is_lost_and_rebuilt(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "猫 耳-1.safetensors", 0.1))
    farm.embeddings.add(write(tmp_path / "gone-1.safetensors", 0.1))
    farm.embeddings.alias("猫 耳-1", "nekomimi-1")
    farm.embeddings.rm("gone-1")
    before = farm.library.names()
    farm.ledger.redis.delete("lf:names", "lf:names:number", "lf:names:changes")
    assert farm.library.names() == {}

    farm.embeddings.reindex()

    assert {k: v for k, v in farm.library.names().items() if v.state == "active"} == {
        k: v for k, v in before.items() if v.state == "active"
    }
    assert farm.embeddings.show("nekomimi-1").state == "active"
    assert farm.embeddings.show("gone-1").state == "removed"


def test_of_many_who_replace_a_name_at_once_all_are_versions(farm: DirectFarm, tmp_path: Path) -> None:
    paths = [write(tmp_path / str(n) / "contested-1.safetensors", n / 10) for n in range(1, 9)]

    def add(path: Path) -> EmbeddingRecord:
        return DirectFarm(farm.settings).embeddings.add(path)

    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(add, paths))

    versions = list(farm.library.history(name_key("", "contested-1")))
    assert {r.content_id for r in records} == {v.record.content_id for v in versions}
    assert sorted(v.number for v in versions) == list(range(1, 9))
    assert farm.embeddings.show("contested-1") == versions[0].record


INTAKE = """
import sys
from pathlib import Path
from latentfarm.farm import DirectFarm
farm = DirectFarm.from_env()
for number in range(1000):
    path = Path(sys.argv[1]) / f"killed-{number}.safetensors"
    farm.embeddings.add(path)
    print(number, flush=True)
"""


def test_intake_killed_anywhere_leaves_a_consistent_registry(farm: DirectFarm, tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path / f"killed-{number}.safetensors", number)
    environ = os.environ | {"LATENTFARM_DATA": str(farm.settings.data)}
    for attempt in range(3):
        command = [sys.executable, "-c", INTAKE, str(tmp_path)]
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for _ in range(3 + attempt):
            process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()

    indexed = {key for key, entry in farm.library.names().items() if "killed-" in key and entry.state == "active"}
    for key in indexed:
        record = farm.embeddings.show(key.partition("/")[2])
        assert farm.library.tensors(record).content_id == record.content_id
        assert farm.library.original(record.file_sha256)
        assert farm.library.sources(record.content_id)
    farm.embeddings.reindex()
    in_store = {key for key, entry in farm.library.names().items() if "killed-" in key and entry.state == "active"}
    assert indexed <= in_store
    for key in in_store:
        farm.embeddings.rm(key.partition("/")[2])


def test_folder_of_a1111_is_taken_over_with_what_lies_beside(farm: DirectFarm, tmp_path: Path) -> None:
    write(tmp_path / "sub" / "with-info-1.safetensors", 0.1)
    info = {
        "id": 9208, "modelId": 7808, "baseModel": "SD 1.5", "trainedWords": ["easynegative"], "description": "good",
        "model": {"type": "TextualInversion", "allowNoCredit": True, "allowCommercialUse": ["Image"]},
        "files": [{"type": "Negative"}],
    }  # fmt: skip
    (tmp_path / "sub" / "with-info-1.civitai.info").write_text(json.dumps(info))
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "JPEG")
    (tmp_path / "sub" / "with-info-1.preview.jpeg").write_bytes(picture.getvalue())
    write(tmp_path / "noted-1.pt", 0.2)
    (tmp_path / "noted-1.json").write_text('{"activation text": "a, b", "notes": "from a friend", "sd version": "SD1"}')
    write(tmp_path / "off-2.pt.disabled", 0.3)
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "error.pt").write_text('{"error": "not found"}')
    write(tmp_path / "sub" / "noted-1.bin", 0.4)

    taken = farm.embeddings.import_a1111(tmp_path)

    assert {r.name for t in taken for r in t.records} == {"with-info-1", "noted-1"}
    errors = sorted(str(t.error) for t in taken if t.error)
    assert len(errors) == 2
    assert "JSON" in errors[0]
    assert "have one name" in errors[1]
    informed = farm.embeddings.show("with-info-1")
    (source,) = farm.library.sources(informed.content_id)
    assert informed.kind == "Negative"
    assert (source.trained_words, source.base_model) == (("easynegative",), "SD 1.5")
    assert source.link == "https://civitai.com/models/7808?modelVersionId=9208"
    assert "allowNoCredit: True" in source.licence
    assert (farm.library.preview(informed.content_id) or b"").startswith(b"\x89PNG")
    (noted,) = farm.library.sources(farm.embeddings.show("noted-1").content_id)
    assert (noted.trained_words, noted.description) == (("a", "b"), "from a friend")


def test_negative_embedding_goes_into_the_negative_prompt_by_itself(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "spoiler-1.safetensors", 0.1), kind="Negative")

    job = farm.generate("a girl", embeddings=["spoiler-1"])
    other = farm.generate("a girl", embeddings=["spoiler-1:pos"])

    assert (job.spec.prompt, job.spec.negative_prompt) == ("a girl", "spoiler-1")
    assert (other.spec.prompt, other.spec.negative_prompt) == ("a girl, spoiler-1", "")


@pytest.mark.parametrize("form", ["safetensors", "a1111", "diffusers", "original"])
def test_exported_file_holds_the_same_tensors(farm: DirectFarm, tmp_path: Path, form: str) -> None:
    record = farm.embeddings.add(write(tmp_path / "export-1.safetensors", 0.25))

    path = farm.embeddings.export("export-1", tmp_path / "out", form)

    assert read_embedding(path).content_id == record.content_id


def test_two_halves_of_diffusers_trainer_are_one_sdxl_embedding(farm: DirectFarm, tmp_path: Path) -> None:
    (tmp_path / "learned.safetensors").write_bytes(save({"<x>": np.ones((2, 768), np.float32)}))
    (tmp_path / "learned_2.safetensors").write_bytes(save({"<x>": np.ones((2, 1280), np.float32)}))

    (taken,) = farm.embeddings.add_all(tmp_path)

    (record,) = taken.records
    assert (record.name, record.family) == ("learned", "sdxl")


def test_merge_diff_and_near_duplicates(farm: DirectFarm, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {name: rng.standard_normal((2, WIDTH)).astype(np.float32) for name in ("part-a", "part-b")}
    for name, rows in tensors.items():
        (tmp_path / f"{name}.safetensors").write_bytes(save({"emb_params": rows}))
        farm.embeddings.add(tmp_path / f"{name}.safetensors")

    merged = farm.embeddings.merge("part-a + 0.5*part-b - 'part-a'*0.25", "merged-1")

    expected = tensors["part-a"] * np.float32(0.75) + tensors["part-b"] * np.float32(0.5)
    assert np.allclose(farm.library.tensors(merged).tensors["clip_l"], expected, atol=1e-6)
    table = farm.embeddings.diff("part-a", "part-a")
    assert table["same"] is True
    assert table["likeness"] == 1.0
    nearly = tensors["part-a"] + np.float32(0.001)
    (tmp_path / "part-a-copy.safetensors").write_bytes(save({"emb_params": nearly}))
    farm.embeddings.add(tmp_path / "part-a-copy.safetensors")
    assert [(a, b) for a, b, _ in farm.embeddings.duplicates()] == [("part-a", "part-a-copy")]


def test_card_tells_norms_and_nearest_words(farm: DirectFarm, tmp_path: Path) -> None:
    farm.embeddings.add(write(tmp_path / "card-1.safetensors", 0.5))

    card = farm.embeddings.card("card-1")
    words = farm.nearest_words(card.record)

    assert card.norms["clip_l"] == [round(0.5 * WIDTH**0.5, 4), round(0.51 * WIDTH**0.5, 4)]
    assert [len(near) for near in words["demo"]] == [3, 3]


@pytest.mark.parametrize(("width", "says"), [(500, "width 500"), (3, "width 3")])
def test_width_that_no_checkpoint_has_is_refused(farm: DirectFarm, tmp_path: Path, width: int, says: str) -> None:
    with pytest.raises(NotAnEmbedding, match=says):
        farm.embeddings.add(write(tmp_path / "odd-1.safetensors", 0.1, width=width))


def test_bare_tensor_wants_a_name(farm: DirectFarm, tmp_path: Path) -> None:
    import torch  # noqa: PLC0415 - only this test writes one

    torch.save(torch.ones(2, WIDTH), tmp_path / "tensor.pt")

    with pytest.raises(NotAnEmbedding, match="give it a name"):
        farm.embeddings.add(tmp_path / "tensor.pt")
    assert farm.embeddings.add(tmp_path / "tensor.pt", "named-1").name == "named-1"
    assert SANDBOX.read(tmp_path / "tensor.pt")[0].needs_name
