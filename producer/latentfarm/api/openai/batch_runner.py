"""Batches brought forward: the file read, its jobs submitted and watched, the answers written.

Whoever runs a batch may die at any moment: each step can be done again, the jobs are submitted under keys that are the
batch's, and any process of the farm's API goes on.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentfarm_shared.errors import FarmError, Unavailable, UnknownName
from latentfarm_shared.logs import log
from latentfarm_shared.specs import JobSpec
from latentfarm_shared.storage import MissingObject

from latentfarm.api.callers import ANYBODY, Caller, Callers
from latentfarm.api.links import Links
from latentfarm.api.openai.batch_files import Line, Reading, Refused, structure, texts
from latentfarm.api.openai.batch_records import Batches, LineError, LineErrors, Record, RequestCounts, Status, now
from latentfarm.api.openai.files import Files
from latentfarm.api.openai.images import Order, answer_of
from latentfarm.api.openai.requests import wanted
from latentfarm.api.problems import openai_style, problem_of
from latentfarm.api.submitting import charged
from latentfarm.farm import DirectFarm
from latentfarm.jobfiles.located import Enough
from latentfarm.jobfiles.rows import Placed
from latentfarm.jobs import FarmImage, Job

TURN_S, MOST_ERRORS = 15.0, 100
JSONL = "application/x-ndjson"
LINK_S = 30 * 86400


class BatchRunner:
    """Brings batches forward; call `step` about once a second, in as many processes as you like."""

    def __init__(self, callers: Callers, links: Links) -> None:
        """Run those of this farm."""
        self._callers, self._farm, self._links = callers, callers.farm, links
        self._batches = Batches(self._farm)

    def step(self) -> None:
        """Do the next thing for every batch that nobody else does something for.

        Raises:
            Unavailable: Redis or S3 does not answer; the next call goes on.
        """
        for batch_id in self._batches.unfinished():
            if self._farm.ledger.take_turn(_turn(batch_id), TURN_S):
                try:
                    self._forward(self._batches.get(batch_id))
                except Unavailable as error:
                    log.warning("a batch waits", batch=batch_id, error=str(error))
                except Exception as error:  # noqa: BLE001 - one batch must not stop the others
                    log.error("a batch is broken", batch=batch_id, error=type(error).__name__)
                    self._give_up(batch_id)
                finally:
                    self._farm.ledger.end_turn(_turn(batch_id), 0.2)

    def _give_up(self, batch_id: str) -> None:
        """End a batch that cannot be run; the log tells where."""
        with suppress(UnknownName):
            message = "something in it broke the farm; its log tells what"
            self._fail(self._batches.get(batch_id), [LineError(code="internal_error", line=None, message=message)])

    def _forward(self, record: Record) -> None:
        farm = self._farm.seen_by(record.owner)
        status = record.batch.status
        try:
            if status == "validating":
                self._begin(record, farm)
            elif status in ("in_progress", "cancelling"):
                self._look(record, farm)
            elif status == "finalizing":
                self._finish(record, farm)
        except Unavailable:
            raise
        except (FarmError, Enough) as error:
            message = str(error) or "its requests make too many different jobs; make several batches"
            self._fail(record, [LineError(code="invalid_batch", line=None, message=message)])

    # ---- the file read, the jobs submitted

    def _begin(self, record: Record, farm: DirectFarm) -> None:
        """Read the file whole and write down what it comes to, then submit the jobs; both may be done again."""
        batch = record.batch
        if not farm.store.exists(_kept(batch.id, "jobs.json")):
            wrong = self._read(record, farm)
            if wrong:
                self._fail(record, wrong)
                return
        kept = json.loads(farm.store.get(_kept(batch.id, "jobs.json")))
        jobs = self._submitted(record, farm, [JobSpec.decode(json.dumps(spec)) for spec in kept["specs"]])
        counts = RequestCounts(total=kept["taken"] + kept["refused"], failed=kept["refused"])
        status: Status = "in_progress" if jobs else "finalizing"
        begun = record.changed(status=status, in_progress_at=now(), request_counts=counts)
        begun = begun.model_copy(update={"jobs": tuple(job.id for job in jobs)})
        if not self._batches.put(begun, instead_of="validating"):  # it was cancelled meanwhile
            for job in jobs:
                job.cancel()

    def _read(self, record: Record, farm: DirectFarm) -> list[LineError]:
        """Read the file of a batch and keep what it comes to; return what is wrong with its structure."""
        batch = record.batch
        with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
            path = Path(folder) / "input"
            try:
                Files(farm).download(batch.input_file_id, path)
            except (UnknownName, MissingObject):
                return [LineError(code="file_gone", line=None, message="the input file was deleted")]
            wrong = list(structure(path))
            if wrong:
                return wrong
            reading = Reading(farm, batch)
            for number, text in enumerate(texts(path), 1):
                reading.take(number, text)
                if number % 100 == 0:
                    farm.ledger.end_turn(_turn(batch.id), TURN_S)  # it goes on
        lines = "".join(line.model_dump_json() + "\n" for line in reading.lines)
        refused = "".join(json.dumps(vars(item), ensure_ascii=False) + "\n" for item in reading.refused)
        specs = [json.loads(spec.encode()) for spec in reading.specs()]
        kept = {"specs": specs, "taken": len(reading.lines), "refused": len(reading.refused)}
        farm.store.put(_kept(batch.id, "lines.jsonl"), lines.encode(), JSONL)
        farm.store.put(_kept(batch.id, "refused.jsonl"), refused.encode(), JSONL)
        farm.store.put(_kept(batch.id, "jobs.json"), json.dumps(kept).encode(), "application/json")
        return []

    def _submitted(self, record: Record, farm: DirectFarm, specs: list[JobSpec]) -> list[Job]:
        key = next((key for key in self._callers.keys.ls() if key.id == record.key), None) if record.key else None
        caller = Caller(record.key or ANYBODY, farm, key)
        keyed = [spec.model_copy(update={"key": f"{record.batch.id}:{n}"}) for n, spec in enumerate(specs)]
        return charged(self._callers, caller, keyed, lambda: [farm.submit(spec) for spec in keyed])

    def _fail(self, record: Record, errors: list[LineError]) -> None:
        failed = record.changed(status="failed", failed_at=now(), errors=LineErrors(data=errors[:MOST_ERRORS]))
        self._batches.put(failed, instead_of=record.batch.status)

    # ---- the jobs watched

    def _look(self, record: Record, farm: DirectFarm) -> None:
        """Count what is done; go on when all jobs are over."""
        batch = record.batch
        if batch.status == "cancelling":  # whoever asked for it may have died before the jobs heard
            self._cancel(record, farm)
        statuses = [farm.ledger.status(job) for job in record.jobs]
        done = sum(status.counts["succeeded"] for status in statuses)
        total = sum(status.total for status in statuses)
        drawn = batch.request_counts.total - batch.request_counts.failed
        if all(status.is_final for status in statuses):
            self._batches.put(record.changed(status="finalizing", finalizing_at=now()), instead_of=batch.status)
        elif total:
            completed = done * drawn // total
            if completed != batch.request_counts.completed:
                counts = batch.request_counts.model_copy(update={"completed": completed})
                self._batches.put(record.changed(request_counts=counts), instead_of=batch.status)

    def _cancel(self, record: Record, farm: DirectFarm) -> None:
        """Cancel a batch's jobs, also those it never heard of; without any it is over."""
        jobs = list(record.jobs)
        if not jobs and farm.store.exists(_kept(record.batch.id, "jobs.json")):
            kept = json.loads(farm.store.get(_kept(record.batch.id, "jobs.json")))
            keys = [f"{record.batch.id}:{number}" for number in range(len(kept["specs"]))]
            jobs = [job for job in (farm.ledger.submitted(record.owner, key) for key in keys) if job is not None]
        for job in jobs:
            farm.ledger.cancel(job)

    # ---- the files written

    def _finish(self, record: Record, farm: DirectFarm) -> None:
        """Write both files and end the batch. An output file is written though no request succeeded."""
        batch = record.batch
        if not record.jobs and batch.cancelling_at:  # it never began
            self._batches.put(record.changed(status="cancelled", cancelled_at=now()), instead_of="finalizing")
            return
        lines = [Line.model_validate_json(text) for text in _lines(farm, batch.id, "lines.jsonl")]
        refused = [Refused(**json.loads(text)) for text in _lines(farm, batch.id, "refused.jsonl")]
        jobs = [farm.own_job(job) for job in record.jobs]
        expired = any(job.status().state == "expired" for job in jobs)
        completed = failed = 0
        with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
            good, bad = Path(folder) / "output", Path(folder) / "errors"
            with good.open("w", encoding="utf-8") as output, bad.open("w", encoding="utf-8") as errors:
                for item in refused:
                    errors.write(_answer_line(batch.id, item.custom_id, item.status, item.body))
                    failed += 1
                for number, line in enumerate(lines):
                    if number % 100 == 0:
                        farm.ledger.end_turn(_turn(batch.id), TURN_S)  # it goes on
                    status, body = self._answer(record, farm, jobs[line.placed.job], line)
                    (output if status == 200 else errors).write(_answer_line(batch.id, line.custom_id, status, body))
                    completed, failed = completed + (status == 200), failed + (status != 200)
            files = Files(farm)
            named = batch.id.removeprefix("batch_")
            written = files.put(good, f"{batch.id}_output.jsonl", "batch_output", file_id=f"file-{named}o").id
            refused_id = (
                files.put(bad, f"{batch.id}_error.jsonl", "batch_output", file_id=f"file-{named}e").id
                if failed
                else None
            )
        end: Status = "cancelled" if batch.cancelling_at else "expired" if expired else "completed"
        counts = RequestCounts(total=completed + failed, completed=completed, failed=failed)
        changed = record.changed(
            status=end,
            output_file_id=written,
            error_file_id=refused_id,
            request_counts=counts,
            **{f"{end}_at": now()},
        )
        self._batches.put(changed, instead_of="finalizing")

    def _answer(self, record: Record, farm: DirectFarm, job: Job, line: Line) -> tuple[int, dict[str, Any]]:
        """Return what a single request would have been answered."""
        try:
            order = Order(_Part(job, line.placed), wanted(line.body, farm), record.base, self._links, farm.ledger)
            return 200, answer_of(order, LINK_S)
        except FarmError as error:
            problem = problem_of(error)
            return problem.status, openai_style(problem, problem.model_dump(exclude_none=True))


def _turn(batch_id: str) -> str:
    return f"batch:{batch_id}"


def _kept(batch_id: str, name: str) -> str:
    return f"batches/{batch_id}/{name}"


def _lines(farm: DirectFarm, batch_id: str, name: str) -> list[str]:
    return [line for line in farm.store.get(_kept(batch_id, name)).decode().split("\n") if line]


def _answer_line(batch_id: str, custom_id: str, status: int, body: dict[str, Any]) -> str:
    response = {"status_code": status, "request_id": f"{batch_id}:{custom_id}", "body": body}
    line = {"id": f"batch_req_{secrets.token_hex(8)}", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(line, ensure_ascii=False) + "\n"


class _Part:
    """The images of a job that one request of a batch asked for."""

    def __init__(self, job: Job, placed: Placed) -> None:
        self._job, self._placed, self.id = job, placed, job.id

    @property
    def images(self) -> list[FarmImage]:
        """Its images, as they stand now."""
        return list(self._job.iter_images(self._placed.first, self._placed.first + self._placed.count))

    @property
    def created(self) -> float:
        """When it was asked for."""
        return self._job.status().created
