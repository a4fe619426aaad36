"""The doctor on real servers: well when all is well, and precise when something is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from latentfarm.doctor import Finding, examine
from latentfarm.farm import DirectFarm
from latentfarm_demo import CHECKPOINT
from latentfarm_shared.registry import blob_key


def of(farm: DirectFarm, part: str) -> list[Finding]:
    return [finding for finding in examine(farm) if finding.part == part]


@pytest.fixture
def farm(servers: DirectFarm) -> Iterator[DirectFarm]:
    servers.models.add(CHECKPOINT, "demo")
    yield servers
    servers.ledger.redis.config_set("maxmemory-policy", "noeviction")


def test_all_is_well_but_for_the_workers_that_are_not_there(farm: DirectFarm) -> None:
    found = list(examine(farm))

    assert {finding.part for finding in found if finding.verdict != "ok"} <= {"workers", "disk"}
    assert {"Redis", "clock", "log", "memory", "S3", "S3 conditions", "checkpoints", "device", "API"} <= {
        finding.part for finding in found
    }
    assert all(finding.advice for finding in found if finding.verdict != "ok")


def test_redis_that_may_throw_jobs_away_is_bad(farm: DirectFarm) -> None:
    farm.ledger.redis.config_set("maxmemory-policy", "allkeys-lru")

    assert "noeviction" in next(f for f in of(farm, "memory") if f.verdict == "bad").advice


def test_checkpoint_whose_files_are_gone_is_bad(farm: DirectFarm) -> None:
    record = farm.models.show("demo")
    small = min(record.files, key=lambda file: file.size)
    data = farm.store.get(blob_key(small.sha256))
    farm.store.delete_all(blob_key(small.sha256))
    try:
        assert [f.verdict for f in of(farm, "checkpoints") if f.message.startswith("demo")] == ["bad"]
    finally:
        farm.store.put(blob_key(small.sha256), data)


def test_one_trouble_hides_none_of_the_others(farm: DirectFarm) -> None:
    away = DirectFarm(farm.settings.model_copy(update={"s3_endpoint": "http://127.0.0.1:9"}))
    found = list(examine(away))

    assert [f.verdict for f in found if f.part == "S3"] == ["bad"]
    assert [f.verdict for f in found if f.part == "Redis"] == ["ok"]
    assert any(f.part == "API" for f in found)
