"""What a job would do, told before anything is queued: how many images, which embeddings, what is long, how long it takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Protocol

from latentfarm_shared.errors import InvalidField
from latentfarm_shared.images import content_id
from latentfarm_shared.ledger import Ledger
from latentfarm_shared.prompts.contract import Contract
from latentfarm_shared.records import CheckpointRecord, Lock
from latentfarm_shared.specs import MAX_IMAGES, Data, JobSpec, expand
from latentfarm_shared.tables import TableStore
from pydantic import BaseModel, ConfigDict

LOOKED_AT = 5000
CHUNK_TOKENS = 75
SAMPLES = 3


class Planner(Protocol):
    """What planning needs of a farm."""

    ledger: Ledger
    tables: TableStore

    def freeze(self, spec: JobSpec) -> tuple[JobSpec, tuple[Lock, ...]]:
        """Settle a job."""
        ...

    def contract(self, checkpoint: CheckpointRecord) -> Contract:
        """Return what may be asked of a checkpoint."""
        ...


class Estimate(BaseModel):
    """Seconds of the device, and until all is done with the workers there are: median, and where 80 % of the rates lie."""

    model_config = ConfigDict(frozen=True)

    gpu_seconds: float
    eta_s: float
    eta_low_s: float
    eta_high_s: float
    workers: int


class PlannedEmbedding(BaseModel):
    """An embedding that would be applied."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    vectors: int


class Plan(BaseModel):
    """What jobs would do. Of more than `looked_at` images, duplicates and long prompts are told of as many."""

    model_config = ConfigDict(frozen=True)

    jobs: int
    images: int
    looked_at: int
    duplicates: int
    embeddings: tuple[PlannedEmbedding, ...]
    missing: tuple[str, ...]
    long_prompts: int
    pixel_steps: float
    estimate: Estimate | None
    samples: tuple[str, ...]


def with_variants(spec: JobSpec, data: Data) -> JobSpec:
    """Return a spec that says how many texts its templates make, where all of them are asked for.

    Raises:
        InvalidField: a template cannot be read, or makes too many.
    """
    if spec.dynamic == "off":
        return spec
    count = 1
    for node in spec.templates(spec.point_of(0, data), data).values():
        count *= node.count
    if spec.dynamic == "random":
        return spec
    if count > MAX_IMAGES:
        raise InvalidField("dynamic", f"the prompts make {count} texts; {MAX_IMAGES} images are possible, or 'random'")
    return JobSpec.check(spec.model_dump() | {"variants": count})


def plan(farm: Planner, specs: Sequence[JobSpec]) -> Plan:
    """Tell what jobs would do; embeddings that are not there are told instead of refused.

    Raises:
        UsageError: something else is wrong, as a submission would say.
    """
    frozen = [farm.freeze(spec.model_copy(update={"on_missing": "warn"})) for spec in specs]
    used = {e.content_id: e for _, locks in frozen for lock in locks for e in lock.embeddings}
    dropped = [f"{d.name} ({d.field}): {d.reason}" for _, locks in frozen for lock in locks for d in lock.dropped]
    seen: set[str] = set()
    looked_at = long = 0
    samples: list[str] = []
    for spec, locks in frozen:
        data = farm.tables.of(spec)
        numbers = list(_spread(spec.total, LOOKED_AT // len(frozen) + 1))
        texts: dict[str, bool] = {}
        for index in numbers:
            image = expand(spec, index, data)
            lock = locks[spec.layout.part_of(index)]
            seen.add(content_id(image, lock))
            prompt = image.job.prompt
            if prompt not in texts:
                texts[prompt] = _is_long(prompt, farm.contract(lock.checkpoint))
            long += texts[prompt]
        looked_at += len(numbers)
        samples += [expand(spec, index, data).job.prompt for index in _spread(spec.total, SAMPLES)]
    cost = sum(spec.mean_cost * spec.total for spec, _ in frozen)
    return Plan(
        jobs=len(frozen),
        images=sum(spec.total for spec, _ in frozen),
        looked_at=looked_at,
        duplicates=looked_at - len(seen),
        embeddings=tuple(PlannedEmbedding(name=e.name, version=e.version, vectors=e.vectors) for e in used.values()),
        missing=tuple(dict.fromkeys(dropped)),
        long_prompts=long,
        pixel_steps=cost,
        estimate=_estimate(farm.ledger, cost, frozen),
        samples=tuple(samples[:SAMPLES]),
    )


def _spread(total: int, most: int) -> Iterator[int]:
    """Yield up to so many indexes, evenly over all."""
    count = min(total, most)
    yield from (number * total // count for number in range(count))


def _is_long(prompt: str, contract: Contract) -> bool:
    return len(contract.tokenizer.encode(prompt)) > CHUNK_TOKENS


def _estimate(ledger: Ledger, cost: float, frozen: Sequence[tuple[JobSpec, tuple[Lock, ...]]]) -> Estimate | None:
    """Estimate from what workers measured with these checkpoints; None if they never did."""
    hashes = {lock.checkpoint.hash for _, locks in frozen for lock in locks}
    rates = sorted(rate for name in hashes for rate in ledger.rates(name))
    if not rates:
        return None
    workers = max(1, sum(bool(hashes & set(worker.checkpoints)) for worker in ledger.workers()))
    middle = statistics.median(rates)
    slow, fast = rates[int(0.1 * len(rates))], rates[min(int(0.9 * len(rates)), len(rates) - 1)]
    return Estimate(
        gpu_seconds=round(cost / middle, 1),
        eta_s=round(cost / middle / workers, 1),
        eta_low_s=round(cost / fast / workers, 1),
        eta_high_s=round(cost / slow / workers, 1),
        workers=workers,
    )
