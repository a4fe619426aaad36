"""The object store and the registry on a real S3 server."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from latentfarm.farm import DirectFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.checkpoints import describe_folder
from latentfarm_shared.errors import Unavailable, UnknownName, UnreadableFile
from latentfarm_shared.storage import MissingObject, ObjectConflict, ObjectStore
from latentfarm_worker.fetch import fetch_checkpoint
from safetensors.numpy import save

from tests.conftest import parse_embedding


def test_second_write_of_the_same_content_is_no_error(servers: DirectFarm) -> None:
    assert servers.store.put_once("t/once", b"a", "image/png", "id-1")
    assert not servers.store.put_once("t/once", b"a", "image/png", "id-1")
    assert servers.store.get("t/once") == b"a"


def test_other_content_at_a_key_is_a_conflict(servers: DirectFarm) -> None:
    servers.store.put_once("t/conflict", b"a", "image/png", "id-1")

    with pytest.raises(ObjectConflict):
        servers.store.put_once("t/conflict", b"b", "image/png", "id-2")

    assert servers.store.get("t/conflict") == b"a"


def test_of_many_writers_one_writes(servers: DirectFarm) -> None:
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda _: servers.store.put_once("t/race", b"a", "image/png", "id"), range(16)))

    assert sum(wrote) == 1


def test_missing_object_is_named(servers: DirectFarm) -> None:
    with pytest.raises(MissingObject, match="nothing-here"):
        servers.store.get("t/nothing-here")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"s3_secret_key": "wrong"}, "denied"),
        ({"s3_access_key": "nobody"}, "denied"),
        ({"s3_bucket": "no-such-bucket"}, "no-such-bucket"),
        ({"s3_endpoint": "http://127.0.0.1:1"}, "no answer"),
    ],
)
def test_store_trouble_is_one_sentence(servers: DirectFarm, change: dict[str, str], says: str) -> None:
    with pytest.raises(Unavailable, match=says):
        ObjectStore(servers.settings.model_copy(update=change)).check()


def test_embedding_is_found_by_name_in_any_case_and_by_the_nearest(servers: DirectFarm) -> None:
    file = parse_embedding(save({"emb_params": np.ones((3, 128), np.float32)}), "My Style-2.safetensors")
    record = servers.library.add(file)

    assert servers.library.find("my style-2") == record
    with pytest.raises(UnknownName, match="My Style-2"):
        servers.library.find("my stile-2")


def test_index_is_rebuilt_from_the_store(servers: DirectFarm) -> None:
    file = parse_embedding(save({"emb_params": np.ones((1, 128), np.float32)}), "猫.safetensors")
    record = servers.library.add(file)
    servers.ledger.redis.delete("lf:names", "lf:names:number", "lf:names:changes", "lf:checkpoints")

    servers.registry.reindex()
    servers.library.reindex()

    assert servers.library.find("猫") == record


def test_checkpoint_is_fetched_by_hash_and_verified(servers: DirectFarm, tmp_path: Path) -> None:
    record = servers.models.add(CHECKPOINT, "demo")
    folder = fetch_checkpoint(record, servers.registry, tmp_path)

    assert describe_folder(folder, "demo").hash == record.hash
    assert fetch_checkpoint(record, servers.registry, tmp_path) == folder


def test_damaged_file_of_a_checkpoint_is_refused(servers: DirectFarm, tmp_path: Path) -> None:
    record = servers.models.add(CHECKPOINT, "demo")
    lying = record.model_copy(
        update={"files": tuple(f.model_copy(update={"sha256": "0" * 64}) for f in record.files[:1])}
    )
    servers.store.put("checkpoints/blobs/" + "0" * 64, b"something else")

    with pytest.raises(UnreadableFile, match="sha256"):
        fetch_checkpoint(lying, servers.registry, tmp_path)

    assert not list(tmp_path.rglob("*.partial"))


def test_folder_that_is_no_checkpoint_says_what_is_missing(servers: DirectFarm, tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match=r"model_index\.json"):
        servers.models.add(tmp_path, "x")
