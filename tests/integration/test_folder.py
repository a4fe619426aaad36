"""A watched folder: dropping a file in is enough; what people changed since is left alone."""

import os
from pathlib import Path

import numpy as np
import pytest
from latentfarm.farm import DirectFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.intake import Intake
from latentfarm_shared.library import name_key
from latentfarm_shared.vocabularies import Vocabularies
from latentfarm_worker.folder import FolderWatch
from safetensors.numpy import save

from tests.conftest import SANDBOX


def write(path: Path, value: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({"emb_params": np.full((2, 128), value, np.float32)}))
    return path


def look(watch: FolderWatch) -> None:
    """Look twice, as after a second: a file must have stopped growing."""
    watch.look()
    watch.look()


@pytest.fixture
def intake(servers: DirectFarm) -> Intake:
    servers.models.add(CHECKPOINT, "demo")
    for record in servers.embeddings.ls():
        servers.embeddings.rm(record.name, force=True)
    vocabularies = Vocabularies(servers.registry, servers.settings.cache)
    return Intake(servers.library, servers.registry, vocabularies, SANDBOX)


@pytest.fixture
def watch(tmp_path: Path, intake: Intake) -> FolderWatch:
    return FolderWatch(tmp_path, intake)


def names(farm: DirectFarm) -> set[str]:
    return {record.name for record in farm.embeddings.ls()}


def test_files_are_taken_as_they_come_change_and_are_disabled(
    servers: DirectFarm, watch: FolderWatch, tmp_path: Path
) -> None:
    write(tmp_path / "first-1.safetensors", 0.1)
    (tmp_path / "broken.pt").write_bytes(b"PK nothing")
    (tmp_path / "first-1.preview.png").write_bytes(b"\x89PNG")
    look(watch)
    assert names(servers) == {"first-1"}

    write(tmp_path / "deep" / "er" / "second 猫-1.pt", 0.2)
    look(watch)
    assert names(servers) == {"first-1", "second 猫-1"}

    before = servers.embeddings.show("first-1")
    write(tmp_path / "first-1.safetensors", 0.3)
    os.utime(tmp_path / "first-1.safetensors", (1, 1))
    look(watch)
    assert servers.embeddings.show("first-1").content_id != before.content_id

    (tmp_path / "first-1.safetensors").rename(tmp_path / "first-1.safetensors.disabled")
    look(watch)
    assert servers.embeddings.show("first-1").state == "disabled"
    (tmp_path / "first-1.safetensors.disabled").rename(tmp_path / "first-1.safetensors")
    look(watch)
    assert servers.embeddings.show("first-1").state == "active"

    (tmp_path / "first-1.safetensors").unlink()
    look(watch)
    assert servers.embeddings.show("first-1").state == "active"


def test_file_that_still_grows_is_waited_for(servers: DirectFarm, watch: FolderWatch, tmp_path: Path) -> None:
    watch.look()
    whole = write(tmp_path / "slow-1.safetensors", 0.1).read_bytes()
    (tmp_path / "slow-1.safetensors").write_bytes(whole[:500])
    watch.look()
    (tmp_path / "slow-1.safetensors").write_bytes(whole)
    watch.look()
    assert names(servers) == set()

    watch.look()

    assert names(servers) == {"slow-1"}


def test_restart_does_not_undo_what_people_did_since(servers: DirectFarm, watch: FolderWatch, tmp_path: Path) -> None:
    for name in ("replaced-1", "removed-1", "same-1"):
        write(tmp_path / f"{name}.safetensors", 0.1)
    look(watch)
    newer = servers.embeddings.add(write(tmp_path / "elsewhere.safetensors", 0.7), "replaced-1")
    (tmp_path / "elsewhere.safetensors").unlink()
    servers.embeddings.rm("removed-1")

    look(FolderWatch(tmp_path, watch._intake))

    assert servers.embeddings.show("replaced-1").content_id == newer.content_id
    assert servers.embeddings.show("removed-1").state == "removed"
    assert len(list(servers.library.history(name_key("", "same-1")))) == 1


def test_of_two_files_with_one_stem_the_first_counts(servers: DirectFarm, watch: FolderWatch, tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "twin-1.safetensors", 0.1)
    write(tmp_path / "b" / "Twin-1.pt", 0.2)

    look(watch)
    look(watch)

    assert servers.embeddings.show("twin-1").content_id == SANDBOX.read(first)[0].content_id


def test_name_that_prompts_use_is_not_taken_by_dropping_a_file(
    servers: DirectFarm, watch: FolderWatch, tmp_path: Path
) -> None:
    write(tmp_path / "girl.safetensors", 0.1)

    look(watch)

    assert names(servers) == set()
