"""The SDK: a farm, reached directly over Redis and S3."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentfarm_shared.errors import InvalidField, Unavailable
from latentfarm_shared.ledger import Ledger, WorkerStatus
from latentfarm_shared.ledger.ledger import queue_name
from latentfarm_shared.prompts.contract import settle
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import CheckpointRecord, Lock
from latentfarm_shared.registry import Registry
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import EmbeddingUse, HiresFix, JobSpec, SamplingOptions, drawn_seeds
from latentfarm_shared.storage import ObjectStore
from latentfarm_shared.wakeups import make_celery, ring

from latentfarm.jobs import Job
from latentfarm.library import Embeddings, Models

MAX_RANDOM_SEED = 2**32 - 2


class Farm:
    """Everything a user can ask of a farm."""

    def __init__(self, settings: Settings) -> None:
        """Connect lazily to the farm the settings name."""
        self.settings = settings
        self.ledger = Ledger.connect(settings)
        self.store = ObjectStore(settings)
        self.registry = Registry(self.ledger.redis, self.store)
        self.embeddings = Embeddings(self.registry)
        self.models = Models(self.registry)
        self._celery = make_celery(settings)
        self._tokenizers: dict[str, ClipTokenizer] = {}

    @classmethod
    def from_env(cls, data: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Farm:
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

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        embeddings: Sequence[str | EmbeddingUse] = (),
        model: str = "demo",
        sampler: str = "Euler",
        schedule: str = "Automatic",
        steps: int = 20,
        cfg_scale: float = 7.0,
        seed: int = -1,
        width: int = 128,
        height: int = 128,
        clip_skip: int = 1,
        count: int = 1,
        lane: str = "interactive",
        hires: HiresFix | None = None,
        options: SamplingOptions | None = None,
        **parameters: Any,
    ) -> Job:
        """Submit a job of `count` images with seeds `seed`, `seed + 1`, …; -1 draws one.

        `hires` is A1111's hires fix, `options` are its sampler settings; `parameters` are the other fields of JobSpec
        (variation_seed, rng, emphasis, tiling …). `embeddings` are names, or `NAME:neg` for the negative prompt; those the prompts do not mention are added.

        Raises:
            UsageError: what is wrong with the request, before anything is queued.
            Unavailable: the farm does not answer.
        """
        uses = [EmbeddingUse.parse(use) if isinstance(use, str) else use for use in embeddings]
        values = {
            "prompt": prompt, "negative_prompt": negative_prompt, "embeddings": uses, "model": model,
            "sampler": sampler, "schedule": schedule, "steps": steps, "cfg_scale": cfg_scale, "seed": seed,
            "width": width, "height": height, "clip_skip": clip_skip, "count": count, "lane": lane,
            "hires": hires, "options": options or SamplingOptions(),
        }  # fmt: skip
        return self.submit(JobSpec.check(values | parameters))

    def submit(self, spec: JobSpec, job_id: str | None = None) -> Job:
        """Freeze a spec to a lock, write the job down, ring the workers; return once the job is on disk.

        A job id that exists already is returned as it is, so a submission may be repeated.

        Raises:
            UsageError, Unavailable: as `generate`.
        """
        job = self._send(*self.freeze(spec), job_id)
        self.ledger.acknowledge()
        return job

    def submit_all(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Submit several jobs; all are checked and frozen before the first is queued."""
        frozen = [self.freeze(spec) for spec in specs]
        jobs = [self._send(spec, lock, None) for spec, lock in frozen]
        self.ledger.acknowledge()
        return jobs

    def freeze(self, spec: JobSpec) -> tuple[JobSpec, Lock]:
        """Settle seed, prompts and embeddings; return what would be queued.

        Raises:
            UsageError: an embedding that is missing, misspelt or does not fit; an unknown model.
        """
        checkpoint = self.registry.checkpoint(spec.model)
        settled = settle(spec, checkpoint, self.registry.embeddings(), self._tokenizer(checkpoint))
        final = JobSpec.check(settled.spec.model_dump() | drawn_seeds(spec, secrets.randbelow))
        return final, Lock(checkpoint=checkpoint, embeddings=settled.embeddings)

    def _send(self, spec: JobSpec, lock: Lock, job_id: str | None) -> Job:
        job_id = job_id or secrets.token_hex(8)
        self.ledger.submit(job_id, spec, lock)
        queue = queue_name(spec.lane, lock.checkpoint.hash)
        with suppress(Unavailable):  # the job is written down; a sweeper rings within a second
            ring(self._celery, queue, self.ledger.ring(queue))
        return Job(self.ledger, self.store, job_id)

    def job(self, job_id: str) -> Job:
        """Return a job by its id or an unambiguous beginning of it.

        Raises:
            UnknownName: there is none.
        """
        matches = [s.id for s in self.ledger.jobs(limit=1000) if s.id.startswith(job_id)] if len(job_id) < 16 else []
        job = Job(self.ledger, self.store, matches[0] if len(matches) == 1 else job_id)
        job.status()
        return job

    def jobs(self, limit: int = 50) -> list[Job]:
        """Return the newest jobs first."""
        return [Job(self.ledger, self.store, status.id) for status in self.ledger.jobs(limit)]

    def workers(self) -> list[WorkerStatus]:
        """Return the workers that are alive."""
        return self.ledger.workers()

    def sweep(self) -> None:
        """Take back what dead workers held and ring where wake-ups are missing; any process may, each second."""
        for queue, ticket in self.ledger.sweep():
            ring(self._celery, queue, [ticket])

    def _tokenizer(self, checkpoint: CheckpointRecord) -> ClipTokenizer:
        """Return a checkpoint's tokenizer, kept in the cache folder by hash."""
        if checkpoint.hash not in self._tokenizers:
            paths = []
            for name in ("tokenizer/vocab.json", "tokenizer/merges.txt"):
                file = checkpoint.file(name)
                if file is None:
                    raise InvalidField("model", f"{checkpoint.name!r} has no {name}")
                path = self.settings.cache / "tokenizers" / file.sha256
                if not path.exists():
                    partial = path.with_name(path.name + secrets.token_hex(4))
                    self.registry.download_blob(file.sha256, partial)
                    partial.replace(path)
                paths.append(path)
            try:
                self._tokenizers[checkpoint.hash] = ClipTokenizer(*paths)
            except ValueError as error:
                raise InvalidField("model", f"{checkpoint.name!r} has no usable tokenizer ({error})") from error
        return self._tokenizers[checkpoint.hash]
