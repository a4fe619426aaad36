"""What can be asked of a farm over HTTP, each as a flow: the routes of `/api/v1`, their values and their answers."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from latentfarm_shared.errors import UnknownName, UnreadableFile, UsageError
from latentfarm_shared.ledger import JobEvent, JobStatus, Limits, WorkerStatus
from latentfarm_shared.specs import JobSpec
from pydantic import BaseModel, TypeAdapter

from latentfarm.client.flows import Call, Flow, Pause, Reply, asked
from latentfarm.client.problems import refuse_problem
from latentfarm.jobs import WaitTimeout
from latentfarm.planning import Plan
from latentfarm.views import BASE, CheckpointAnswer, EmbeddingAnswer, ImageAnswer
from latentfarm.waiting import Cause

M = TypeVar("M", bound=BaseModel)

POLL_S = (0.1, 1.0)
PAGE = 500
SHORTEST_ID = 16
EVERYBODY = "-"


def fetch(call: Call) -> Flow[Reply]:
    """Send a call; raise what its answer tells, if that is an error."""
    reply = yield from asked(call)
    refuse_problem(reply)
    return reply


def get(model: type[M], path: str, **query: str | int | bool | None) -> Flow[M]:
    """Return what a route tells, checked."""
    reply = yield from fetch(Call("GET", BASE + path, query))
    return model.model_validate_json(reply.content)


def _items(model: type[M], reply: Reply) -> list[M]:
    return TypeAdapter(list[model]).validate_python(json.loads(reply.content)["items"])  # type: ignore[valid-type]


# ---- jobs


def submit(spec: JobSpec, job_id: str | None = None) -> Flow[str]:
    """Submit a job and return its id, which is drawn here, so that a submission may be sent again."""
    values = spec.model_dump(mode="json", exclude_defaults=True) | {"id": job_id or secrets.token_hex(8)}
    reply = yield from fetch(Call("POST", f"{BASE}/jobs", json=values))
    return str(json.loads(reply.content)["id"])


def submit_file(path: Path, *, anew: bool, defaults: Mapping[str, Any]) -> Flow[list[str]]:
    """Submit a file of jobs and return their ids; one that makes new jobs each time is not sent again."""
    query = {"name": path.name, "anew": anew, **defaults}
    call = Call("POST", f"{BASE}/jobs/files", query, content=path.read_bytes(), is_safe=not anew)
    reply = yield from fetch(call)
    return [str(job["id"]) for job in json.loads(reply.content)["jobs"]]


def plan(source: JobSpec | Path, defaults: Mapping[str, Any]) -> Flow[Plan]:
    """Tell what a job or a file would do."""
    if isinstance(source, JobSpec):
        values = source.model_dump(mode="json", exclude_defaults=True)
        reply = yield from fetch(Call("POST", f"{BASE}/plan", json=values))
    else:
        query = {"name": source.name, **defaults}
        reply = yield from fetch(Call("POST", f"{BASE}/plan/files", query, content=source.read_bytes()))
    return Plan.model_validate_json(reply.content)


def status(job: str) -> Flow[JobStatus]:
    """Return where a job stands."""
    return (yield from get(JobStatus, f"/jobs/{job}"))


def statuses(limit: int, state: str | None) -> Flow[list[JobStatus]]:
    """Return where the newest jobs stand, page by page."""
    found: list[JobStatus] = []
    cursor: str | None = None
    while len(found) < limit:
        query = {"limit": min(PAGE, limit - len(found)), "state": state, "cursor": cursor}
        reply = yield from fetch(Call("GET", f"{BASE}/jobs", query))
        found += _items(JobStatus, reply)
        cursor = json.loads(reply.content)["next"]
        if cursor is None:
            break
    return found


def job_called(name: str) -> Flow[str]:
    """Return the id of a job, by an unambiguous beginning of it.

    Raises:
        UnknownName: there is none.
    """
    try:
        return (yield from status(quote(name, safe=""))).id
    except UnknownName:
        if len(name) >= SHORTEST_ID or not name:
            raise
        matches = [found.id for found in (yield from statuses(2 * PAGE, None)) if found.id.startswith(name)]
        if len(matches) != 1:
            raise
        return matches[0]


def waited(job: str, timeout_s: float | None, tell: Callable[[JobStatus], None]) -> Flow[JobStatus]:
    """Wait until a job is over, asking again and again; an answer that has not changed costs the farm next to nothing.

    Raises:
        WaitTimeout: it took longer.
    """
    began, pause, etag = time.monotonic(), POLL_S[0], ""
    while True:
        headers = {"if-none-match": etag} if etag else {}
        reply = yield from fetch(Call("GET", f"{BASE}/jobs/{job}", headers=headers))
        if reply.status != 304:
            etag, pause = reply.headers.get("etag", ""), POLL_S[0]
            found = JobStatus.model_validate_json(reply.content)
            tell(found)
            if found.is_final:
                return found
        left = None if timeout_s is None else timeout_s - (time.monotonic() - began)
        if timeout_s is not None and left is not None and left <= 0:
            raise WaitTimeout(job, timeout_s)
        yield Pause(pause if left is None else min(pause, left))
        pause = min(POLL_S[1], pause * 1.3)


def order(job: str, what: str, **values: Any) -> Flow[None]:
    """Steer a job: cancel, pause, resume, approve, retry, priority; each may be told again."""
    yield from fetch(Call("POST", f"{BASE}/jobs/{job}/{what}", json=values or None))


def events(job: str, after: int, limit: int) -> Flow[list[JobEvent]]:
    """Return what happened since a version."""
    reply = yield from fetch(Call("GET", f"{BASE}/jobs/{job}/history", {"after": after, "limit": limit}))
    return TypeAdapter(list[JobEvent]).validate_python(json.loads(reply.content)["events"])


def why(job: str) -> Flow[list[Cause]]:
    """Return why images of a job wait."""
    reply = yield from fetch(Call("GET", f"{BASE}/jobs/{job}/why"))
    return TypeAdapter(list[Cause]).validate_python(json.loads(reply.content)["causes"])


def manifest(job: str, name: str) -> Flow[bytes]:
    """Return the manifest of a job that is over."""
    return (yield from fetch(Call("GET", f"{BASE}/jobs/{job}/manifest", {"name": name}))).content


# ---- images


def image_page(job: str, start: int, stop: int | None) -> Flow[tuple[list[ImageAnswer], int | None]]:
    """Return images from `start` on, and where the next page begins; None after the last."""
    limit = PAGE if stop is None else max(0, min(PAGE, stop - start))
    if not limit:
        return [], None
    reply = yield from fetch(Call("GET", f"{BASE}/jobs/{job}/images", {"limit": limit, "cursor": str(start)}))
    following = json.loads(reply.content)["next"]
    end = None if following is None or (stop is not None and int(following) >= stop) else int(following)
    return _items(ImageAnswer, reply), end


def png(job: str, index: int) -> Flow[bytes]:
    """Return a picture."""
    return (yield from fetch(Call("GET", f"{BASE}/jobs/{job}/images/{index}.png"))).content


# ---- embeddings and checkpoints


@dataclass(frozen=True)
class Added:
    """What became of a file: the embeddings taken from it, or why it was refused."""

    source: str
    records: tuple[EmbeddingAnswer, ...] = ()
    error: UsageError | None = None


def embeddings(*, everything: bool) -> Flow[list[EmbeddingAnswer]]:
    """Return the embeddings that can be named."""
    return _items(EmbeddingAnswer, (yield from fetch(Call("GET", f"{BASE}/embeddings", {"everything": everything}))))


def embedding(name: str) -> Flow[EmbeddingAnswer]:
    """Return one."""
    reply = yield from fetch(Call("GET", f"{BASE}/embeddings/{quote(name, safe='')}"))
    return EmbeddingAnswer.model_validate(json.loads(reply.content)["embedding"])


def add_embedding(source: str | Path, name: str | None, kind: str | None, *, allow_word: bool) -> Flow[EmbeddingAnswer]:
    """Have the farm take in a file from here, or what lies at an address or on Civitai.

    Raises:
        UnreadableFile: there is no such file here.
    """
    if isinstance(source, str) and source.startswith(("https://", "http://", "civitai:")):
        values = {"source": source, "name": name, "kind": kind, "allow_word": allow_word}
        given = {key: value for key, value in values.items() if value is not None}
        reply = yield from fetch(Call("POST", f"{BASE}/embeddings/import", json=given))
    else:
        path = Path(source)
        if not path.is_file():
            raise UnreadableFile(
                str(path), "is no file; give one embedding's file, an https address or civitai:VERSION"
            )
        form = {"allow_word": "true" if allow_word else "false"}
        form |= {"name": name} if name else {}
        form |= {"kind": kind} if kind else {}
        reply = yield from fetch(Call("POST", f"{BASE}/embeddings", file=(path.name, path.read_bytes()), form=form))
    taken = [item for row in json.loads(reply.content)["items"] for item in row["embeddings"]]
    return EmbeddingAnswer.model_validate(taken[0])


def add_all(source: str | Path, name: str | None, kind: str | None, *, allow_word: bool) -> Flow[list[Added]]:
    """Take in a file, what lies at an address, or every file of a folder; one that is refused stops none of the others."""
    folder = Path(source)
    paths = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else [source]
    found = []
    for path in paths:
        try:
            record = yield from add_embedding(path, name, kind, allow_word=allow_word)
            found.append(Added(str(path), (record,)))
        except UsageError as error:
            found.append(Added(str(path), error=error))
    return found


def alias(name: str, other: str, *, allow_word: bool) -> Flow[EmbeddingAnswer]:
    """Give an embedding a second name."""
    path = f"{BASE}/embeddings/{quote(name, safe='')}/alias"
    reply = yield from fetch(Call("POST", path, json={"alias": other, "allow_word": allow_word}))
    return EmbeddingAnswer.model_validate_json(reply.content)


def remove_embedding(name: str, *, force: bool) -> Flow[None]:
    """Remove a name."""
    yield from fetch(Call("DELETE", f"{BASE}/embeddings/{quote(name, safe='')}", {"force": force}))


def checkpoints() -> Flow[list[CheckpointAnswer]]:
    """Return the checkpoints that jobs can ask for."""
    return _items(CheckpointAnswer, (yield from fetch(Call("GET", f"{BASE}/checkpoints"))))


# ---- the farm


def workers() -> Flow[list[WorkerStatus]]:
    """Return the workers that are alive."""
    return _items(WorkerStatus, (yield from fetch(Call("GET", f"{BASE}/workers"))))


def aside() -> Flow[dict[str, str]]:
    """Return the workers that are set aside, each with its story."""
    reply = yield from fetch(Call("GET", f"{BASE}/workers"))
    return dict(json.loads(reply.content)["aside"])


def steer_worker(station: str, what: str) -> Flow[None]:
    """Drain, undrain or release a worker."""
    yield from fetch(Call("POST", f"{BASE}/workers/{quote(station, safe='')}/{what}"))


def limits(owner: str | None) -> Flow[Limits]:
    """Return what an owner may have."""
    return (yield from get(Limits, f"/limits/{_owner(owner)}"))


def usage(owner: str) -> Flow[dict[str, int]]:
    """Return what an owner has."""
    reply = yield from fetch(Call("GET", f"{BASE}/limits/{_owner(owner)}/usage"))
    return dict(json.loads(reply.content))


def set_limits(owner: str | None, values: Limits) -> Flow[None]:
    """Set what an owner may have."""
    yield from fetch(Call("PUT", f"{BASE}/limits/{_owner(owner)}", json=values.model_dump()))


def _owner(owner: str | None) -> str:
    return EVERYBODY if not owner else quote(owner, safe="")


def whoami() -> Flow[str]:
    """Return in whose name we act."""
    reply = yield from fetch(Call("GET", f"{BASE}/whoami"))
    return str(json.loads(reply.content)["owner"])
