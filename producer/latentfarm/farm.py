"""The SDK: a farm, reached directly over Redis and S3."""

from __future__ import annotations

import copy
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentfarm_shared.embeddings.sandbox import Sandbox
from latentfarm_shared.errors import AlreadyTaken, InvalidField, RenderError, Unavailable, UnknownName, UsageError
from latentfarm_shared.explicit import plain_name
from latentfarm_shared.intake import Intake
from latentfarm_shared.ledger import JobStatus, Ledger, Limits, WorkerStatus
from latentfarm_shared.ledger.queues import part_name, queue_name
from latentfarm_shared.library import EmbeddingLibrary, check_owner, name_key
from latentfarm_shared.parameters import Side
from latentfarm_shared.prompts.contract import Contract
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord, Lock
from latentfarm_shared.registry import Registry
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import JobSpec, Pack, drawn_seeds
from latentfarm_shared.storage import ObjectStore
from latentfarm_shared.tables import TableStore
from latentfarm_shared.vocabularies import Vocabularies
from latentfarm_shared.wakeups import make_celery, ring

from latentfarm.asking import Generates
from latentfarm.jobfiles import JobFile, read_job_file
from latentfarm.jobs import Job
from latentfarm.library import Embeddings, Models
from latentfarm.planning import Plan, plan, with_variants
from latentfarm.studies import PREVIEW_PROMPT, Preview, pack_spec, preview, sweep_spec
from latentfarm.waiting import Cause, causes
from latentfarm.words import nearest_words

MAX_RANDOM_SEED = 2**32 - 2
PAGE = 500
_JOB_ID = re.compile(r"[\w-]{1,64}")


class DirectFarm(Generates[Job]):
    """Everything a user can ask of a farm."""

    def __init__(self, settings: Settings, owner: str | None = None) -> None:
        """Connect lazily to the farm the settings name, as `owner`, by default the settings'."""
        self.settings = settings
        self.ledger = Ledger.connect(settings)
        self.store = ObjectStore(settings)
        self.registry = Registry(self.ledger.redis, self.store)
        self.library = EmbeddingLibrary(self.ledger, self.store)
        self._vocabularies = Vocabularies(self.registry, settings.cache)
        self.owner = settings.owner if owner is None else check_owner(owner)
        self._sandbox = Sandbox(settings.caps)
        self.embeddings = self._embeddings()
        self.models = Models(self.registry)
        self.tables = TableStore(self.store)
        self._celery = make_celery(settings)
        self._contracts: dict[str, tuple[object, Contract]] = {}

    def _embeddings(self) -> Embeddings:
        intake = Intake(self.library, self.registry, self._vocabularies, self._sandbox, self.owner)
        return Embeddings(self.library, intake, self.settings)

    def seen_by(self, owner: str) -> DirectFarm:
        """Return the same farm in another owner's name, over the same connections."""
        other = copy.copy(self)
        other.owner = check_owner(owner)
        other.embeddings, other._contracts = other._embeddings(), {}  # noqa: SLF001 - of its own class
        return other

    @classmethod
    def from_env(cls, data: str | Path | None = None, environ: Mapping[str, str] | None = None) -> DirectFarm:
        """Find the farm as docs/settings.md says and make sure it answers.

        Raises:
            NoFarm, Unavailable: none is there, or it does not let us in.
            BadSettings: a variable is malformed.
        """
        path = Path(data) if data is not None else None
        farm = cls(Settings.load(path) if environ is None else Settings.load(path, environ))
        farm.ledger.check()
        farm.store.check()
        return farm

    def submit(self, spec: JobSpec, job_id: str | None = None, request: str | None = None) -> Job:
        """Freeze a spec to a lock, write the job down, ring the workers; return once the job is on disk.

        A job of this id exists already, or one of the same client key: it is returned as it is, so a submission may be
        repeated. `request`, a digest of what was asked for, tells a repetition from another request under the same key.

        Raises:
            UsageError, Unavailable: as `generate`.
            AlreadyTaken: the id is somebody else's job's, or the key came with another request.
            Busy: too much is waiting; says when to try again.
        """
        known = self.submitted(spec, job_id, request)  # whatever has changed since: the request was accepted then
        return known or self.submit_frozen(*self.freeze(spec), job_id, request)

    def submitted(self, spec: JobSpec, job_id: str | None = None, request: str | None = None) -> Job | None:
        """Return the job that was submitted with this client key or id before, None if none was.

        Raises:
            AlreadyTaken: it was another request.
        """
        if spec.key is None and job_id is None:
            return None
        known = self.ledger.submitted(self.owner, spec.key, job_id, request)
        return None if known is None else self._job(known, is_known=True)

    def submit_frozen(
        self, spec: JobSpec, locks: Sequence[Lock], job_id: str | None = None, request: str | None = None
    ) -> Job:
        """Submit what `freeze` returned.

        Raises:
            EmbeddingRefused: a name was removed since.
            AlreadyTaken, Busy, Unavailable: as `submit`.
        """
        job = self._send(spec, locks, job_id, request)
        self.ledger.acknowledge()
        return job

    def submit_all(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Submit several jobs; all are checked and frozen before the first is queued."""
        frozen = [self.freeze(spec) for spec in specs]
        jobs = [self._send(spec, locks) for spec, locks in frozen]
        self.ledger.acknowledge()
        return jobs

    def submit_file(
        self, path: str | Path, *, anew: bool = False, defaults: Mapping[str, Any] | None = None
    ) -> list[Job]:
        """Submit a sweep file (YAML, JSON) or a table (JSONL, CSV); the whole file is checked before anything is queued.

        The same file again resumes: what failed or was canceled is handed out again, what is there is kept. `anew` makes
        new jobs of it.

        Raises:
            InvalidRows: what is wrong, and where.
            UsageError, Busy, Unavailable: as `submit`.
        """
        found = self.read_file(path, defaults)
        keys = [None if anew else f"file:{found.digest}:{number}" for number in range(len(found.specs))]
        specs = [s if s.key else s.model_copy(update={"key": k}) for s, k in zip(found.specs, keys, strict=True)]
        frozen = []
        for number, spec in enumerate(specs):
            try:
                frozen.append(self.freeze(spec))
            except UsageError as error:
                raise found.wrong(number, error) from error
        jobs = [self._send(spec, locks) for spec, locks in frozen]
        self.ledger.acknowledge()
        for job in jobs:
            if job.is_known and job.status().state in ("failed", "canceled", "expired"):
                job.retry(missing=True)
        return jobs

    def read_file(self, path: str | Path, defaults: Mapping[str, Any] | None = None) -> JobFile:
        """Read a sweep file or table; its rows lie in the store afterwards, unused until a job is submitted.

        Raises:
            InvalidRows, UnreadableFile: what is wrong, and where.
        """
        return read_job_file(Path(path), self.tables, dict(defaults or {}), self.side_of)

    def side_of(self, name: str) -> Side:
        """Return which prompt an embedding belongs in; one that is not known is refused later."""
        known = self.library.visible(self.owner).get(plain_name(name).lower())
        return "negative" if known is not None and known.kind == "Negative" else "positive"

    def plan(self, source: JobSpec | Sequence[JobSpec] | str | Path, defaults: Mapping[str, Any] | None = None) -> Plan:
        """Tell what a job or file would do, without queueing anything: count, embeddings, long prompts, time.

        `defaults` are what is meant where a file does not say.

        Raises:
            UsageError: what is wrong with it, as `submit` would.
        """
        if isinstance(source, JobSpec):
            specs: Sequence[JobSpec] = [source]
        else:
            specs = self.read_file(source, defaults).specs if isinstance(source, str | Path) else source
        return plan(self, specs)

    def freeze(self, spec: JobSpec) -> tuple[JobSpec, tuple[Lock, ...]]:
        """Settle seed, prompts and embeddings; return what would be queued, a lock for every checkpoint it draws on.

        Raises:
            UsageError: an embedding that is missing, misspelt or does not fit; an unknown model.
        """
        if spec.pack is not None:
            self.embeddings.refuse_name(spec.pack.name, allow_word=spec.pack.allow_word)
        data = self.tables.of(spec)
        try:
            spec = with_variants(spec, data)
            if spec.rows is not None:
                data.row(spec.rows.total - 1)
        except RenderError as error:
            raise InvalidField(
                "rows" if spec.rows else "wildcards", f"{error}; submit the file they come from"
            ) from error
        checkpoints = [self.registry.checkpoint(model) for model in spec.models]
        if len({checkpoint.hash for checkpoint in checkpoints}) < len(checkpoints):
            raise InvalidField("model", "the axis names one checkpoint twice")
        settled = [self.contract(checkpoint).settle(spec, data) for checkpoint in checkpoints]
        if any(found.spec != settled[0].spec for found in settled):
            raise InvalidField(
                "model", "the prompts mean different embeddings on these checkpoints; make a job for each"
            )
        final = JobSpec.check(settled[0].spec.model_dump() | drawn_seeds(spec, secrets.randbelow))
        at = time.time()
        locks = [
            Lock(checkpoint=c, embeddings=f.embeddings, dropped=f.dropped, owner=self.owner, frozen_at=at)
            for c, f in zip(checkpoints, settled, strict=True)
        ]
        return final, tuple(locks)

    def contract(self, checkpoint: CheckpointRecord) -> Contract:
        """Return what may be asked of a checkpoint, made anew when names changed."""
        names = self.library.names()
        held = self._contracts.get(checkpoint.hash)
        if held is None or held[0] is not names:
            held = (
                names,
                Contract(
                    checkpoint,
                    self.library.visible(self.owner),
                    self._vocabularies.of(checkpoint),
                    tuple(self.registry.checkpoints().values()),
                    lambda name: self.library.find(name, self.owner),
                ),
            )
            self._contracts[checkpoint.hash] = held
        return held[1]

    def _pins(self, locks: Sequence[Lock]) -> list[tuple[str, str]]:
        """Return the names a job holds on to, with their contents: those it uses, and what aliases among them stand for."""
        names = self.library.names()
        pins: dict[str, str] = {}
        for record in (record for lock in locks for record in lock.embeddings):
            key = name_key(record.owner, record.name)
            pins |= {pin: record.content_id for pin in (key, names[key].alias_of) if pin}
        return list(pins.items())

    def _send(self, spec: JobSpec, locks: Sequence[Lock], job_id: str | None = None, request: str | None = None) -> Job:
        done = self.ledger.submit(job_id or secrets.token_hex(8), spec, locks, self._pins(locks), request)
        for lock in locks if done.is_new else ():
            queue = queue_name(spec.lane, part_name(lock.checkpoint.hash, spec.requires))
            with suppress(Unavailable):  # the job is written down; a sweeper rings within a second
                ring(self._celery, queue, self.ledger.ring(queue))
        return self._job(done.job, is_known=not done.is_new)

    def _job(self, job_id: str, *, is_known: bool = False) -> Job:
        return Job(self.ledger, self.store, self._vocabularies, self.tables, job_id, is_known=is_known)

    def pack(
        self, prompt: str, name: str, *, vectors: int = 8, negative: bool = False, steps: int = 600, model: str = "demo",
        size: tuple[int, int] = (128, 128), seed: int = 0, allow_word: bool = False,
    ) -> Job:  # fmt: skip
        """Have a worker pack a prompt into an embedding called `name`, which exists when the job has succeeded.

        The job's status tells how far it is, and at the end its `quality`: the share of the way from no word to the long
        prompt on held-out seeds. Its picture shows both. `size` is that of the pictures it learns from.

        Raises:
            UsageError: the name cannot be used, or the prompt changes while it is drawn.
        """
        pack = Pack(name=name, vectors=vectors, negative=negative, steps=steps, allow_word=allow_word)
        return self.submit(pack_spec(prompt, pack, model, size, seed))

    def preview(
        self, name: str, *, model: str = "demo", prompt: str = PREVIEW_PROMPT, timeout_s: float | None = None
    ) -> Preview:
        """Render with and without an embedding at fixed seeds, keep a picture for its card, and measure its effect."""
        return preview(self, name, model, prompt, timeout_s)

    def sweep_strength(
        self,
        name: str,
        strengths: Sequence[float],
        *,
        seeds: int = 4,
        model: str = "demo",
        prompt: str = PREVIEW_PROMPT,
    ) -> Job:
        """Submit a job that draws an embedding at several strengths and seeds; `studies.sheet_of` lays it out."""
        return self.submit(sweep_spec(self.embeddings.show(name), name, model, prompt, strengths, seeds))

    def statuses(self, limit: int = 50, state: str | None = None) -> list[JobStatus]:
        """Return where the newest jobs stand, of those in a `state` if given."""
        if state is None:
            return self.ledger.jobs(limit)
        found: list[JobStatus] = []
        before: int | None = None
        while len(found) < limit:
            page, before = self.ledger.jobs_before(PAGE, before)
            found += [status for status in page if status.state == state]
            if before is None:
                break
        return found[:limit]

    def job(self, job_id: str) -> Job:
        """Return a job by its id or an unambiguous beginning of it.

        Raises:
            UnknownName: there is none.
        """
        matches = [s.id for s in self.ledger.jobs(limit=1000) if s.id.startswith(job_id)] if len(job_id) < 16 else []
        job = self._job(matches[0] if len(matches) == 1 else job_id)
        job.status()
        return job

    def refuse_taken(self, job_id: str) -> None:
        """Make sure that no job of somebody else has an id.

        Raises:
            AlreadyTaken: one has.
        """
        with suppress(UnknownName):
            if self.ledger.status(job_id).owner != self.owner:
                raise AlreadyTaken("job", job_id, "is somebody else's; choose another id")

    def own_job(self, job_id: str, *, anybodys: bool = False) -> Job:
        """Return a job by its whole id, if it is this owner's or may be `anybodys`.

        Raises:
            UnknownName: there is none, as far as this owner is to know.
        """
        if not _JOB_ID.fullmatch(job_id):
            raise UnknownName("job", job_id)
        if self.ledger.status(job_id).owner != self.owner and not anybodys:
            raise UnknownName("job", job_id)
        return self._job(job_id)

    def jobs(self, limit: int = 50) -> list[Job]:
        """Return the newest jobs first."""
        return [self._job(status.id) for status in self.ledger.jobs(limit)]

    def nearest_words(self, record: EmbeddingRecord, count: int = 3) -> dict[str, list[list[str]]]:
        """Return, for each checkpoint it fits whose word vectors lie in the store, each vector's nearest words."""
        file = self.library.tensors(record)
        found = {}
        for checkpoint in self.registry.checkpoints().values():
            if record.fits(checkpoint.widths):
                near = nearest_words(file, checkpoint, self.registry, self._vocabularies.of(checkpoint), count)
                if near:
                    found[checkpoint.name] = near
        return found

    def why(self, job_id: str) -> list[Cause]:
        """Return why a job's images wait, each cause with a count; none if nothing does."""
        return causes(self.ledger, job_id)

    def workers(self) -> list[WorkerStatus]:
        """Return the workers that are alive."""
        return self.ledger.workers()

    def aside(self) -> dict[str, str]:
        """Return the workers that are set aside because they kept dying, each with its story."""
        return self.ledger.aside()

    def drain(self, station: str, *, on: bool = True) -> None:
        """Let a worker claim nothing more, or go on.

        Raises:
            UnknownName: no worker of this name is alive.
        """
        self.ledger.drain(station, on=on)

    def release(self, station: str) -> None:
        """Let a worker that was set aside work again.

        Raises:
            UnknownName: none of this name is set aside.
        """
        self.ledger.let_back(station)

    def limits(self, owner: str | None) -> Limits:
        """Return what an owner may have; None is everybody who has no limits of their own."""
        return self.ledger.limits(owner)

    def usage(self, owner: str | None) -> dict[str, int]:
        """Return how many images of an owner, or of those without a name, are `running` and `queued`."""
        return self.ledger.usage(owner or "")

    def set_limits(self, owner: str | None, limits: Limits) -> None:
        """Set what an owner may have."""
        self.ledger.set_limits(owner, limits)

    def sweep(self) -> None:
        """Take back what dead workers held and ring where wake-ups are missing; any process may, each second."""
        for queue, ticket in self.ledger.sweep():
            ring(self._celery, queue, [ticket])
