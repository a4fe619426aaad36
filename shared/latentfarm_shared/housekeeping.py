"""What any process of the farm does now and then: write manifests, and delete what was to be kept until now.

A job's manifest lies at `manifests/<job>/manifest.jsonl`, a line for every image that has succeeded or failed, in the
order they were handed out; `failed.jsonl` beside it can be submitted again. A job of many images is written in segments
as it goes, which are put together when it is final. What is behind is noted in the ledger with the image's own
transition, so whoever dies at whatever moment, the next process writes the rest.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from latentfarm_shared.errors import FarmError
from latentfarm_shared.images import image_key
from latentfarm_shared.ledger import JobStatus, Ledger
from latentfarm_shared.logs import log
from latentfarm_shared.specs import Data, JobSpec, expand
from latentfarm_shared.storage import MissingObject, ObjectStore
from latentfarm_shared.tables import TableStore

SEGMENT = 1000
TURN_S, PAUSE_S, TURN_OF_ALL_S = 120.0, 3.0, 0.9
JSONL = "application/x-ndjson"


def manifest_key(job: str, name: str = "manifest") -> str:
    """Return where a job's manifest lies, or its list of failed images."""
    return f"manifests/{job}/{name}.jsonl"


def _segment_key(job: str, segment: int) -> str:
    return f"manifests/{job}/segments/{segment:06d}.jsonl"


class Housekeeper:
    """Does what is due; call `keep` about once a second, in as many processes as you like."""

    def __init__(self, ledger: Ledger, store: ObjectStore) -> None:
        self._ledger, self._store, self._tables = ledger, store, TableStore(store)

    def keep(self) -> None:
        """Write the manifests that are behind and delete the jobs that are over.

        Raises:
            Unavailable: Redis or S3 does not answer; the next call goes on.
        """
        if not self._ledger.take_turn("house", TURN_OF_ALL_S):
            return
        for job in self._ledger.dirty():
            self._bring_up_to_date(job)
        for job in self._ledger.outdated():
            if self._ledger.take_turn(f"delete:{job}", TURN_S):
                self._delete(job)

    def _bring_up_to_date(self, job: str) -> None:
        """Write what is behind of one job's manifest, unless somebody did a moment ago or does right now."""
        turn = f"manifest:{job}"
        if not self._ledger.take_turn(turn, TURN_S):
            return
        try:
            status = self._ledger.status(job)
            self._write(status)
        except FarmError as error:
            log.warning("manifest will be written later", job=job, error=str(error))
        finally:
            self._ledger.end_turn(turn, PAUSE_S)

    def _write(self, status: JobStatus) -> None:
        touched = self._ledger.touched(status.id)
        spec = self._ledger.spec(status.id)
        data = self._tables.of(spec)
        for segment, _ in touched:
            lines = "".join(self._lines(status.id, spec, data, segment))
            self._store.put(_segment_key(status.id, segment), lines.encode(), JSONL)
        if self._ledger.written(status.id, touched) == 0 and status.is_final:
            self._put_together(status.id, spec, data)
            self._ledger.clean(status.id)

    def _lines(self, job: str, spec: JobSpec, data: Data, segment: int) -> Iterator[str]:
        """Yield the lines of one segment."""
        positions = range(segment * SEGMENT, min((segment + 1) * SEGMENT, spec.total))
        states = self._ledger.states_at(job, positions)
        failed = [position for position, state in zip(positions, states, strict=True) if state == "failed"]
        stories = dict(zip(failed, self._ledger.errors_at(job, failed), strict=True))
        for position, state in zip(positions, states, strict=True):
            if state in ("succeeded", "failed"):
                index = spec.layout.index_at(position)
                image = expand(spec, index, data)
                row: dict[str, object] = {"index": index, "state": state, "seed": image.seed}
                row |= {"point": image.point} if image.point else {}
                row |= {"prompt": image.job.prompt} if spec.rows or spec.dynamic != "off" else {}
                row |= {"error": stories[position]} if state == "failed" else {"key": image_key(job, index)}
                yield json.dumps(row, ensure_ascii=False) + "\n"

    def _put_together(self, job: str, spec: JobSpec, data: Data) -> None:
        """Write the whole manifest, and what failed, from the segments; memory stays flat."""
        with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
            whole, failed = Path(folder) / "manifest", Path(folder) / "failed"
            with whole.open("w", encoding="utf-8") as lines, failed.open("w", encoding="utf-8") as again:
                for segment in range(-(-spec.total // SEGMENT)):
                    self._append(job, spec, data, segment, (lines, again))
            self._store.upload(manifest_key(job), whole)
            self._store.upload(manifest_key(job, "failed"), failed)

    def _append(self, job: str, spec: JobSpec, data: Data, segment: int, files: tuple[IO[str], IO[str]]) -> None:
        try:
            text = self._store.get(_segment_key(job, segment)).decode()
        except MissingObject:
            return  # none of its images has succeeded or failed
        files[0].write(text)
        for line in text.splitlines():
            row = json.loads(line)
            if row["state"] == "failed":
                files[1].write(json.dumps(again(job, spec, data, row), ensure_ascii=False) + "\n")

    def _delete(self, job: str) -> None:
        """Delete a final job: pictures first, so that what is left can be found again by its record."""
        count = self._store.delete_all(f"jobs/{job}/") + self._store.delete_all(f"manifests/{job}/")
        if self._ledger.delete(job):
            log.info("job deleted, its time was over", job=job, objects=count)


def again(job: str, spec: JobSpec, data: Data, row: dict[str, object]) -> dict[str, object]:
    """Return the job of one image that failed, as a line to submit; it tells which job it comes from."""
    image = expand(spec, int(str(row["index"])), data)
    values = image.job.model_dump(mode="json", exclude_defaults=True, exclude={"key", "count", "expander"})
    values |= {"seed": image.seed, "model": image.job.model}
    values |= {"variation_seed": image.variation_seed} if image.job.variation_strength else {}
    return values | {"metadata": spec.metadata | {"failed_in": job}}
