"""A farm in memory, for the tests of programs that use one: no servers, no checkpoint, nothing to wait for.

>>> from latentfarm.testing import MemoryFarm
>>> farm = MemoryFarm(embeddings=["corneo_dva"])
>>> farm.generate("masterpiece, corneo_dva", seed=43).wait().state
'succeeded'

It takes and refuses jobs as a farm does: fields, sweeps, files, names of embeddings that are not there. Pictures are of one
colour, drawn from everything that decides an image, with its infotext written in.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from latentfarm_shared.errors import AlreadyTaken, FarmError, InvalidField, RenderError, UnknownName
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.ledger import ImageState, JobEvent, JobState, JobStatus, Limits
from latentfarm_shared.parameters import Side
from latentfarm_shared.records import BlobFile, CheckpointRecord, EmbeddingRecord, Lock
from latentfarm_shared.specs import ImageSpec, JobSpec, drawn_seeds, expand
from latentfarm_shared.storage import MissingObject
from latentfarm_shared.tables import TableStore
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentfarm.client.aio import AsyncFarm
from latentfarm.client.flows import Call, Reply
from latentfarm.client.sync import Farm
from latentfarm.jobfiles import read_job_file
from latentfarm.jobs import ImageNotReady
from latentfarm.planning import Plan, PlannedEmbedding
from latentfarm.views import BASE, CheckpointAnswer, EmbeddingAnswer, ImageAnswer

Draw = Callable[[ImageSpec], bytes]
OPEN: tuple[ImageState, ...] = ("queued",)


def flat_picture(image: ImageSpec, infotext: str) -> bytes:
    """Return a PNG of one colour, which changes with anything that decides the image."""
    text = image.job.model_dump_json(exclude={"name", "tags", "key", "count"}) + str(image.seed)
    colour = tuple(hashlib.sha256(text.encode()).digest()[:3])
    scale = image.job.hires.scale if image.job.hires is not None else 1
    size = round(image.job.width * scale), round(image.job.height * scale)
    info = PngInfo()
    info.add_text("parameters", infotext)
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@dataclass
class _Job:
    id: str
    spec: JobSpec
    lock: Lock
    asked: str
    created: float = field(default_factory=time.time)
    paused: bool = False
    priority: int = 0
    states: list[ImageState] = field(default_factory=list)
    errors: dict[int, dict[str, str]] = field(default_factory=dict)
    pictures: dict[int, bytes] = field(default_factory=dict)
    events: list[JobEvent] = field(default_factory=list)

    def note(self, what: str, index: int | None = None) -> None:
        self.events.append(JobEvent(version=len(self.events) + 1, what=what, index=index, at=time.time()))

    @property
    def state(self) -> JobState:
        if "queued" in self.states:
            return "paused" if self.paused else "running" if len(set(self.states)) > 1 else "queued"
        order: tuple[JobState, ...] = ("failed", "canceled")
        return next((state for state in order if state in self.states), "succeeded")

    def status(self) -> JobStatus:
        names: tuple[ImageState, ...] = ("queued", "running", "succeeded", "failed", "canceled", "expired")
        return JobStatus(
            id=self.id, state=self.state, total=len(self.states), counts={name: self.states.count(name) for name in names},
            version=len(self.events), created=self.created, model=self.spec.model, prompt=self.spec.prompt,
            reason="owner" if self.state == "paused" else "", starts=len(self.pictures) + len(self.errors),
            lane=self.spec.lane, priority=self.priority, name=self.spec.name, tags=self.spec.tags,
            finished_at=None if "queued" in self.states else self.events[-1].at,
        )  # fmt: skip


@dataclass(frozen=True)
class _Asked:
    """A call with the bytes of its file."""

    call: Call
    data: bytes

    @property
    def method(self) -> str:
        return self.call.method

    @property
    def query(self) -> Mapping[str, str | int | bool | None]:
        return self.call.query

    @property
    def json(self) -> Any:
        return self.call.json


class _Store:
    """What tables are kept in."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def put_once(self, key: str, data: bytes, _content_type: str, _content_id: str) -> bool:
        self._objects.setdefault(key, data)
        return True

    def get(self, key: str) -> bytes:
        if key not in self._objects:
            raise MissingObject(key)
        return self._objects[key]


_routes: list[tuple[str, str, Callable[..., Reply]]] = []
R = TypeVar("R", bound=Callable[..., Reply])


def _route(method: str, pattern: str) -> Callable[[R], R]:
    """Register what answers calls of paths like this."""

    def registered(answer: R) -> R:
        _routes.append((method, pattern, answer))
        return answer

    return registered


class Memory:
    """The farm behind `MemoryFarm`: what it knows, and hands to turn.

    `is_held` keeps jobs waiting until `draw()`; `draws` is called for every picture and may raise `RenderError`, so that
    an image fails.
    """

    def __init__(self, embeddings: Iterable[str], models: Iterable[str], draws: Draw | None) -> None:
        """Know these names."""
        self.embeddings = {name.lower(): _embedding(name) for name in embeddings}
        self.models = {name: _checkpoint(name) for name in models}
        self.draws, self.is_held = draws, False
        self.jobs: dict[str, _Job] = {}
        self.limits: dict[str, Limits] = {}
        self._tables = TableStore(_Store())  # type: ignore[arg-type] # it puts and gets, which is all that tables need

    def send(self, call: Call, data: bytes) -> Reply:
        """Answer a call as a farm would; errors are told as they are."""
        try:
            return self._answer(call, data)
        except FarmError as error:
            return Reply(422, error=error)

    def _answer(self, call: Call, data: bytes) -> Reply:
        path = unquote(call.path.removeprefix(BASE))
        for method, pattern, answer in _routes:
            found = re.fullmatch(pattern, path)
            if found is not None and method == call.method:
                return answer(self, _Asked(call, data), *found.groups())
        raise InvalidField("path", f"the farm in memory has no {call.method} {call.path}")

    def draw(self) -> None:
        """Draw all that waits."""
        for job in self.jobs.values():
            self._draw(job)

    # ---- jobs

    def _accept(self, values: Mapping[str, Any]) -> _Job:
        values = dict(values)
        job_id, asked = str(values.pop("id")), json.dumps(values, sort_keys=True)
        spec = JobSpec.check(values)
        known = next((job for job in self.jobs.values() if spec.key and job.spec.key == spec.key), None)
        known = self.jobs.get(job_id, known)
        if known is not None:
            if known.asked != asked:
                raise AlreadyTaken("job", job_id, "came with another request before; choose another id or key")
            return known
        return self._begin(job_id, spec, asked)

    def _begin(self, job_id: str, spec: JobSpec, asked: str) -> _Job:
        spec, lock = self._settle(spec)
        job = _Job(job_id, spec, lock, asked, states=["queued"] * spec.total, priority=spec.priority)
        self.jobs[job_id] = job
        job.note("queued")
        if not self.is_held:
            self._draw(job)
        return job

    def _settle(self, spec: JobSpec) -> tuple[JobSpec, Lock]:
        """Return the spec with its seed drawn, and the names it is frozen to."""
        for model in spec.models:
            if model not in self.models:
                raise UnknownName.among("model", model, self.models)
        names = {use.name.partition("@")[0].lower(): use.name for use in spec.embeddings}
        for lower, name in names.items():
            if lower not in self.embeddings:
                raise UnknownName.among("embedding", name, [record.name for record in self.embeddings.values()])
        said = f"{spec.prompt}\n{spec.negative_prompt}".lower()
        names |= {lower: lower for lower in self.embeddings if re.search(rf"(?<!\w){re.escape(lower)}(?!\w)", said)}
        lock = Lock(
            checkpoint=self.models[spec.models[0]], embeddings=tuple(self.embeddings[lower] for lower in sorted(names))
        )
        return JobSpec.check(spec.model_dump() | drawn_seeds(spec, secrets.randbelow)), lock

    def _draw(self, job: _Job) -> None:
        if job.paused:
            return
        for index, state in enumerate(job.states):
            if state == "queued":
                self._draw_one(job, index)

    def _draw_one(self, job: _Job, index: int) -> None:
        image = expand(job.spec, index, self._tables.of(job.spec))
        try:
            picture = self.draws(image) if self.draws else flat_picture(image, format_infotext(image, job.lock))
        except RenderError as error:
            job.states[index] = "failed"
            job.errors[index] = {"code": error.code, "message": str(error), "worker": "memory"}
            job.note("failed", index)
        else:
            job.states[index] = "succeeded"
            job.pictures[index] = picture
            job.note("succeeded", index)

    def _job(self, job_id: str) -> _Job:
        if job_id not in self.jobs:
            raise UnknownName.among("job", job_id, self.jobs)
        return self.jobs[job_id]

    def _side_of(self, name: str) -> Side:
        known = self.embeddings.get(name.lower())
        return "negative" if known is not None and known.kind == "Negative" else "positive"

    def _read(self, call: _Asked) -> list[JobSpec]:
        defaults = {name: value for name, value in call.query.items() if name in ("lane", "model") and value}
        with tempfile.TemporaryDirectory(prefix="latentfarm-") as folder:
            path = Path(folder) / str(call.query["name"])
            path.write_bytes(call.data)
            return list(read_job_file(path, self._tables, defaults, self._side_of).specs)

    # ---- routes

    @_route("POST", "/jobs")
    def _post_job(self, call: _Asked) -> Reply:
        return _json(self._accept(call.json).status().model_dump(mode="json"), 202)

    @_route("POST", "/jobs/files")
    def _post_file(self, call: _Asked) -> Reply:
        specs = self._read(call)
        for spec in specs:
            self._settle(spec)  # all are checked before the first is queued
        digest = hashlib.sha256(call.data).hexdigest()
        jobs = []
        for number, spec in enumerate(specs):
            asked = secrets.token_hex(8) if call.query.get("anew") else f"file:{digest}:{number}"
            known = next((job for job in self.jobs.values() if job.asked == asked), None)
            if known is not None:
                self._retry(known, missing=True)
            jobs.append(known or self._begin(secrets.token_hex(8), spec, asked))
        return _json({"jobs": [job.status().model_dump(mode="json") for job in jobs]}, 202)

    @_route("POST", "/plan(/files)?")
    def _post_plan(self, call: _Asked, files: str | None) -> Reply:
        specs = self._read(call) if files else [JobSpec.check(call.json)]
        locks = [self._settle(spec)[1] for spec in specs]
        used = {record.name: record for lock in locks for record in lock.embeddings}
        images = sum(spec.total for spec in specs)
        planned = tuple(
            PlannedEmbedding(name=record.name, version=record.version, vectors=record.vectors)
            for record in used.values()
        )
        found = Plan(
            jobs=len(specs), images=images, looked_at=images, duplicates=0, embeddings=planned, missing=(), long_prompts=0,
            pixel_steps=float(sum(s.total * s.width * s.height * s.steps for s in specs)), estimate=None,
            samples=tuple(spec.prompt for spec in specs[:3]),
        )  # fmt: skip
        return _json(found.model_dump(mode="json"))

    @_route("GET", "/jobs")
    def _get_jobs(self, call: _Asked) -> Reply:
        found = [job.status() for job in reversed(self.jobs.values())]
        state = call.query.get("state")
        items = [status.model_dump(mode="json") for status in found if state in (None, status.state)]
        start, limit = int(call.query.get("cursor") or 0), int(call.query.get("limit") or 50)
        end = start + limit
        return _json({"items": items[start:end], "next": str(end) if end < len(items) else None})

    @_route("GET", "/jobs/([^/]+)")
    def _get_job(self, call: _Asked, job_id: str) -> Reply:
        status = self._job(job_id).status()
        etag = f'"{hashlib.sha256(status.model_dump_json().encode()).hexdigest()[:16]}"'
        if call.call.headers.get("if-none-match") == etag:
            return Reply(304, headers={"etag": etag})
        return Reply(200, status.model_dump_json().encode(), {"etag": etag})

    @_route("GET", "/jobs/([^/]+)/images")
    def _get_images(self, call: _Asked, job_id: str) -> Reply:
        job = self._job(job_id)
        start = int(call.query.get("cursor") or 0)
        end = min(start + int(call.query.get("limit") or 100), len(job.states))
        items = [self._described(job, index).model_dump(mode="json") for index in range(start, end)]
        return _json({"items": items, "next": str(end) if end < len(job.states) else None})

    def _described(self, job: _Job, index: int) -> ImageAnswer:
        image = expand(job.spec, index, self._tables.of(job.spec))
        return ImageAnswer(
            id=f"{job.id}/{index}", index=index, state=job.states[index], seed=image.seed,
            url=f"{BASE}/jobs/{job.id}/images/{index}.png" if index in job.pictures else None,
            parameters=format_infotext(image, job.lock), point=dict(image.point) if job.spec.is_sweep else {},
            embeddings=[{"name": record.name, "vectors": record.vectors} for record in job.lock.embeddings],
            error=job.errors.get(index),
        )  # fmt: skip

    @_route("GET", r"/jobs/([^/]+)/images/(\d+)\.png")
    def _get_png(self, _call: _Asked, job_id: str, index: str) -> Reply:
        job, number = self._job(job_id), int(index)
        if number >= len(job.states):
            raise UnknownName("image", f"{job_id}/{index}")
        if number not in job.pictures:
            reason = job.errors.get(number, {}).get("message", "")
            raise ImageNotReady(job_id, number, job.states[number], reason)
        return Reply(200, job.pictures[number])

    @_route("GET", r"/jobs/([^/]+)/images/(\d+)/link")
    def _get_link(self, call: _Asked, job_id: str, index: str) -> Reply:
        self._get_png(call, job_id, index)
        return _json({"url": f"memory://{job_id}/{index}", "expires_in": call.query["expires_in"]})

    @_route("GET", "/jobs/([^/]+)/history")
    def _get_history(self, call: _Asked, job_id: str) -> Reply:
        after, limit = int(call.query.get("after") or 0), int(call.query.get("limit") or 1000)
        found = [event for event in self._job(job_id).events if event.version > after][:limit]
        return _json({"events": [event.model_dump() for event in found]})

    @_route("GET", "/jobs/([^/]+)/why")
    def _get_why(self, _call: _Asked, job_id: str) -> Reply:
        job = self._job(job_id)
        waits = job.states.count("queued")
        causes = [{"code": "paused", "count": waits, "message": "the job is paused"}] if job.state == "paused" else []
        return _json({"causes": causes})

    @_route("GET", "/jobs/([^/]+)/manifest")
    def _get_manifest(self, call: _Asked, job_id: str) -> Reply:
        job = self._job(job_id)
        if "queued" in job.states:
            raise MissingObject(f"manifest of {job_id}")
        wanted = ("failed",) if call.query.get("name") == "failed" else ("succeeded", "failed", "canceled")
        rows = [self._described(job, index) for index, state in enumerate(job.states) if state in wanted]
        return Reply(200, "".join(row.model_dump_json() + "\n" for row in rows).encode())

    @_route("POST", "/jobs/([^/]+)/(cancel|pause|resume|approve|retry|priority)")
    def _post_order(self, call: _Asked, job_id: str, order: str) -> Reply:
        job, given = self._job(job_id), call.json or {}
        if order == "retry":
            self._retry(job, missing=bool(given.get("missing")))
        elif order == "priority":
            if not -100 <= given["priority"] <= 100:
                raise InvalidField("priority", f"should be -100 to 100, got {given['priority']}")
            job.priority = given["priority"]
            job.note(f"priority {job.priority}")
        elif "queued" not in job.states or (order in ("pause", "resume") and job.paused == (order == "pause")):
            pass  # nothing changes
        elif order == "cancel":
            job.states = ["canceled" if state in OPEN else state for state in job.states]
            job.note("canceled")
        else:
            job.paused = order == "pause"
            job.note("paused" if job.paused else "resumed")
            if not self.is_held:
                self._draw(job)
        return _json(job.status().model_dump(mode="json"))

    def _retry(self, job: _Job, *, missing: bool) -> None:
        again = ("failed", "canceled") if missing else ("failed",)
        for index, state in enumerate(job.states):
            if state in again:
                job.states[index] = "queued"
                job.errors.pop(index, None)
        job.note("retried")
        if not self.is_held:
            self._draw(job)

    @_route("GET", "/embeddings")
    def _get_embeddings(self, _call: _Asked) -> Reply:
        records = sorted(self.embeddings.values(), key=lambda record: record.name.lower())
        return _json({"items": [EmbeddingAnswer.of(record).model_dump() for record in records]})

    @_route("GET", "/embeddings/([^/]+)")
    def _get_embedding(self, _call: _Asked, name: str) -> Reply:
        return _json({"embedding": EmbeddingAnswer.of(self._embedding(name)).model_dump()})

    @_route("POST", "/embeddings(/import)?")
    def _post_embedding(self, call: _Asked, imported: str | None) -> Reply:
        source = str((call.json or {}).get("source", "")) if imported else str(call.call.file_name)
        given = (call.json if imported else call.call.form).get("name")
        name = str(given or Path(source.replace(":", "-")).stem)
        record = _embedding(name)
        self.embeddings[name.lower()] = record
        return _json({"items": [{"source": source, "embeddings": [EmbeddingAnswer.of(record).model_dump()]}]}, 201)

    @_route("POST", "/embeddings/([^/]+)/alias")
    def _post_alias(self, call: _Asked, name: str) -> Reply:
        record = self._embedding(name).model_copy(update={"name": call.json["alias"]})
        self.embeddings[record.name.lower()] = record
        return _json(EmbeddingAnswer.of(record).model_dump(), 201)

    @_route("DELETE", "/embeddings/([^/]+)")
    def _delete_embedding(self, _call: _Asked, name: str) -> Reply:
        del self.embeddings[self._embedding(name).name.lower()]
        return Reply(204)

    def _embedding(self, name: str) -> EmbeddingRecord:
        known = self.embeddings.get(name.partition("@")[0].lower())
        if known is None:
            raise UnknownName.among("embedding", name, [record.name for record in self.embeddings.values()])
        return known

    @_route("GET", "/checkpoints")
    def _get_checkpoints(self, _call: _Asked) -> Reply:
        return _json({"items": [CheckpointAnswer.of(record).model_dump() for record in self.models.values()]})

    @_route("GET", "/workers")
    def _get_workers(self, _call: _Asked) -> Reply:
        return _json({"items": [], "aside": {}})

    @_route("POST", "/workers/([^/]+)/(?:drain|undrain|release)")
    def _worker(self, _call: _Asked, station: str) -> Reply:
        raise UnknownName("worker", station)

    @_route("PUT", "/limits/([^/]+)")
    @_route("GET", "/limits/([^/]+)")
    def _limits(self, call: _Asked, owner: str) -> Reply:
        if call.method == "PUT":
            self.limits[owner] = Limits.model_validate(call.json)
        return _json(self.limits.get(owner, Limits()).model_dump())

    @_route("GET", "/limits/([^/]+)/usage")
    def _usage(self, _call: _Asked, _owner: str) -> Reply:
        return _json({"running": 0, "queued": sum(job.states.count("queued") for job in self.jobs.values())})

    @_route("GET", "/whoami")
    def _whoami(self, _call: _Asked) -> Reply:
        return _json({"owner": "memory"})


class _AsyncMemory:
    """The same for an event loop."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def send(self, call: Call, data: bytes) -> Reply:
        return self._memory.send(call, data)


class MemoryFarm(Farm):
    """A `Farm` in memory; `memory` is what stands behind it."""

    def __init__(
        self, embeddings: Iterable[str] = (), models: Iterable[str] = ("demo",), draws: Draw | None = None
    ) -> None:
        """Begin with these names; `draws` makes the PNG of an image instead of one colour."""
        self.memory = Memory(embeddings, models, draws)
        super().__init__(sends=self.memory)

    def asynchronous(self) -> AsyncFarm:
        """Return the same farm, to be awaited."""
        return AsyncFarm(sends=_AsyncMemory(self.memory))


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(status, json.dumps(value).encode())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _embedding(name: str) -> EmbeddingRecord:
    digest = _digest(name)
    return EmbeddingRecord(
        name=name, content_id=digest, file_sha256=digest, vectors=1, widths={"clip_l": 128}, layout="a1111"
    )


def _checkpoint(name: str) -> CheckpointRecord:
    file = BlobFile(path="unet/diffusion_pytorch_model.safetensors", sha256=_digest(name), size=0)
    return CheckpointRecord(name=name, family="demo", widths={"clip_l": 128}, prediction_type="epsilon", files=(file,))
