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

from latentfarm_shared.errors import FarmError, InvalidField, UnknownName, UnreadableFile, UsageError
from latentfarm_shared.intake import embedding_paths
from latentfarm_shared.ledger import JobEvent, JobStatus, Limits, WorkerStatus
from latentfarm_shared.png import SIGNATURE
from latentfarm_shared.specs import JobSpec
from pydantic import BaseModel, ValidationError

from latentfarm.client.flows import TRIES, Call, Flow, Pause, Reply, asked, pause_after
from latentfarm.client.problems import error_of, no_farm, refuse_problem
from latentfarm.jobs import WaitTimeout
from latentfarm.planning import Plan
from latentfarm.views import BASE, CheckpointAnswer, EmbeddingAnswer, ImageAnswer
from latentfarm.waiting import Cause

M = TypeVar("M", bound=BaseModel)

POLL_S = (0.1, 1.0)
MOST_UPLOAD = 32 * 2**20
ADDRESSES = ("https://", "http://", "civitai:")
PAGE = 500
SHORTEST_ID = 16
EVERYBODY = "-"


def fetch(call: Call) -> Flow[Reply]:
    """Send a call; raise what its answer tells, if that is an error."""
    reply = yield from asked(call)
    refuse_problem(reply)
    return reply


def _values(reply: Reply) -> Any:
    """Return what an answer says in JSON.

    Raises:
        Unavailable: it is none, so no farm gave it.
    """
    try:
        return json.loads(reply.content)
    except ValueError:
        raise no_farm(reply.status) from None


def _checked(model: type[M], values: Any, status: int) -> M:
    try:
        return model.model_validate(values)
    except ValidationError:
        raise no_farm(status, "is it of another version?") from None


def _field(reply: Reply, name: str) -> Any:
    """Return a field of an answer.

    Raises:
        Unavailable: it has none, so no farm gave it.
    """
    values = _values(reply)
    if not isinstance(values, dict) or name not in values:
        raise no_farm(reply.status)
    return values[name]


def _listed(model: type[M], values: Any, status: int) -> list[M]:
    if not isinstance(values, list):
        raise no_farm(status)
    return [_checked(model, value, status) for value in values]


def get(model: type[M], path: str, **query: str | int | bool | None) -> Flow[M]:
    """Return what a route tells, checked."""
    reply = yield from fetch(Call("GET", BASE + path, query))
    return _checked(model, _values(reply), reply.status)


def _items(model: type[M], reply: Reply) -> list[M]:
    return _listed(model, _field(reply, "items"), reply.status)


# ---- jobs


def submit(spec: JobSpec, job_id: str | None = None) -> Flow[str]:
    """Submit a job and return its id, which is drawn here, so that a submission may be sent again."""
    values = spec.model_dump(mode="json", exclude_defaults=True) | {"id": job_id or secrets.token_hex(8)}
    reply = yield from fetch(Call("POST", f"{BASE}/jobs", json=values, is_safe=True))
    return str(_field(reply, "id"))


def submit_file(path: Path, *, anew: bool, defaults: Mapping[str, Any]) -> Flow[list[str]]:
    """Submit a file of jobs and return their ids; one that makes new jobs each time is not sent again."""
    query = {"name": _name(path), "anew": anew, **defaults}
    reply = yield from fetch(Call("POST", f"{BASE}/jobs/files", query, source=path, is_safe=not anew, is_long=True))
    return [status.id for status in _listed(JobStatus, _field(reply, "jobs"), reply.status)]


def _name(path: Path) -> str:
    """Return what a file is called to the farm: standard input is a table."""
    return "stdin.jsonl" if str(path) == "-" else path.name


def plan(source: JobSpec | Path, defaults: Mapping[str, Any]) -> Flow[Plan]:
    """Tell what a job or a file would do."""
    if isinstance(source, JobSpec):
        values = source.model_dump(mode="json", exclude_defaults=True)
        call = Call("POST", f"{BASE}/plan", json=values, is_safe=True)
    else:
        query = {"name": _name(source), **defaults}
        call = Call("POST", f"{BASE}/plan/files", query, source=source, is_safe=True, is_long=True)
    reply = yield from fetch(call)
    return _checked(Plan, _values(reply), reply.status)


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
        before, cursor = cursor, _field(reply, "next")
        if cursor is None or cursor == before:
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

    A farm that is away for a while is waited for, too, as long as there is time, or a few tries without an end to it.

    Raises:
        WaitTimeout: it took longer.
        Unavailable: the farm is away.
    """
    began, pause, etag, failures = time.monotonic(), POLL_S[0], "", 0
    while True:
        left = None if timeout_s is None else timeout_s - (time.monotonic() - began)
        headers = {"if-none-match": etag} if etag else {}
        reply = yield Call(
            "GET",
            f"{BASE}/jobs/{quote(job, safe='')}",
            headers=headers,
            at_most_s=left,
        )
        assert reply is not None  # noqa: S101 - a call is always answered
        again = pause_after(reply, failures + 1)
        if again is None or (timeout_s is None and failures + 1 >= TRIES):
            refuse_problem(reply)
            failures = 0
            if reply.status != 304:
                etag, pause = reply.headers.get("etag", ""), POLL_S[0]
                found = _checked(JobStatus, _values(reply), reply.status)
                tell(found)
                if found.is_final:
                    return found
        else:
            failures += 1
        left = None if timeout_s is None else timeout_s - (time.monotonic() - began)
        if timeout_s is not None and left is not None and left <= 0:
            raise WaitTimeout(job, timeout_s)
        wanted = pause if again is None else again
        yield Pause(wanted if left is None else min(wanted, left))
        pause = min(POLL_S[1], pause * 1.3)


def order(job: str, what: str, **values: Any) -> Flow[None]:
    """Steer a job: cancel, pause, resume, approve, retry, priority; each may be told again."""
    yield from fetch(Call("POST", f"{BASE}/jobs/{job}/{what}", json=values or None, is_safe=True))


def events(job: str, after: int, limit: int) -> Flow[list[JobEvent]]:
    """Return what happened since a version."""
    reply = yield from fetch(Call("GET", f"{BASE}/jobs/{job}/history", {"after": after, "limit": limit}))
    return _listed(JobEvent, _field(reply, "events"), reply.status)


def why(job: str) -> Flow[list[Cause]]:
    """Return why images of a job wait."""
    reply = yield from fetch(Call("GET", f"{BASE}/jobs/{quote(job, safe='')}/why"))
    return _listed(Cause, _field(reply, "causes"), reply.status)


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
    following = _field(reply, "next")
    if following is not None and not (str(following).isdecimal() and int(following) > start):
        raise no_farm(reply.status)
    end = None if following is None or (stop is not None and int(following) >= stop) else int(following)
    return _items(ImageAnswer, reply), end


def png(job: str, index: int) -> Flow[bytes]:
    """Return a picture.

    Raises:
        Unavailable: what came is none.
    """
    reply = yield from fetch(Call("GET", f"{BASE}/jobs/{job}/images/{index}.png"))
    if not reply.content.startswith(SIGNATURE):
        raise no_farm(reply.status, "it sent no picture")
    return reply.content


def link(job: str, index: int, expires_in: int) -> Flow[str]:
    """Return an address that expires."""
    reply = yield from fetch(Call("GET", f"{BASE}/jobs/{job}/images/{index}/link", {"expires_in": expires_in}))
    return str(_field(reply, "url"))


# ---- embeddings and checkpoints


@dataclass(frozen=True)
class Added:
    """What became of a file: the embeddings taken from it, or why it was refused."""

    source: str
    records: tuple[EmbeddingAnswer, ...] = ()
    error: FarmError | None = None


def embeddings(*, everything: bool) -> Flow[list[EmbeddingAnswer]]:
    """Return the embeddings that can be named."""
    return _items(EmbeddingAnswer, (yield from fetch(Call("GET", f"{BASE}/embeddings", {"everything": everything}))))


def embedding(name: str) -> Flow[EmbeddingAnswer]:
    """Return one."""
    reply = yield from fetch(Call("GET", f"{BASE}/embeddings/{quote(name, safe='')}"))
    return _checked(EmbeddingAnswer, _field(reply, "embedding"), reply.status)


def add_embedding(source: str | Path, name: str | None, kind: str | None, *, allow_word: bool) -> Flow[EmbeddingAnswer]:
    """Have the farm take in the one embedding of a file from here, or of an address or Civitai.

    Raises:
        UsageError: it is refused; says why.
        InvalidField: there are several; `add_all` takes them.
    """
    found = yield from add_all(source, name, kind, allow_word=allow_word)
    error = next((added.error for added in found if added.error is not None), None)
    if error is not None:
        raise error
    records = [record for added in found for record in added.records]
    if len(records) != 1:
        raise InvalidField("source", f"{source} holds {len(records)} embeddings; use add_all")
    return records[0]


def add_all(source: str | Path, name: str | None, kind: str | None, *, allow_word: bool) -> Flow[list[Added]]:
    """Take in a file, what lies at an address, or every embedding of a folder and those below; one that is refused stops none.

    Raises:
        InvalidField: a folder is given a name.
    """
    if isinstance(source, str) and source.startswith(ADDRESSES):
        values = {"source": source, "name": name, "kind": kind, "allow_word": allow_word}
        given = {key: value for key, value in values.items() if value is not None}
        return (yield from _added(source, Call("POST", f"{BASE}/embeddings/import", json=given, is_long=True)))
    if Path(source).is_dir() and name is not None:
        raise InvalidField("name", "goes with one file, not with a folder")
    paths = embedding_paths(Path(source)) if Path(source).is_dir() else [Path(source)]
    if not paths:
        raise InvalidField("source", f"{source} holds no embeddings")
    found: list[Added] = []
    for number, path in enumerate(paths):
        if path.stem.lower() in {other.stem.lower() for other in paths[:number]}:
            found.append(Added(str(path), error=InvalidField("name", f"{path} has the name of another file here")))
            continue
        form = {"allow_word": "true" if allow_word else "false"}
        form |= {"name": name} if name else {}
        form |= {"kind": kind} if kind else {}
        call = Call(
            "POST", f"{BASE}/embeddings", source=path, file_name=path.name, form=form, is_safe=True, is_long=True
        )
        found += yield from _added(str(path), call)
    return found


def _added(source: str, call: Call) -> Flow[list[Added]]:
    """Send a file or an address; return what became of it."""
    try:
        if call.source is not None:
            _refuse_size(call.source)
        reply = yield from fetch(call)
    except UsageError as error:
        return [Added(source, error=error)]
    found = []
    try:
        for row in _field(reply, "items"):
            problem = row.get("error")
            refusal = None if problem is None else error_of(problem, int(problem.get("status") or 422))
            records = tuple(_listed(EmbeddingAnswer, row.get("embeddings") or [], reply.status))
            found.append(Added(str(row.get("source") or source), records, refusal))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise no_farm(reply.status) from None
    return found


def _refuse_size(path: Path) -> None:
    """Refuse what is no embedding by its size, before it is read.

    Raises:
        UnreadableFile: it is no file, or too large.
    """
    if not path.is_file():
        raise UnreadableFile(
            str(path), "is no file; give an embedding's file, a folder, an https address or civitai:VERSION"
        )
    if path.stat().st_size > MOST_UPLOAD:
        raise UnreadableFile(str(path), f"has over {MOST_UPLOAD // 2**20} MiB, so it is no embedding")


def alias(name: str, other: str, *, allow_word: bool) -> Flow[EmbeddingAnswer]:
    """Give an embedding a second name."""
    path = f"{BASE}/embeddings/{quote(name, safe='')}/alias"
    reply = yield from fetch(Call("POST", path, json={"alias": other, "allow_word": allow_word}, is_safe=True))
    return _checked(EmbeddingAnswer, _values(reply), reply.status)


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
    return dict(_field(reply, "aside"))


def steer_worker(station: str, what: str) -> Flow[None]:
    """Drain, undrain or release a worker."""
    safe = what != "release"  # the second finds nobody set aside
    yield from fetch(Call("POST", f"{BASE}/workers/{quote(station, safe='')}/{what}", is_safe=safe))


def limits(owner: str | None) -> Flow[Limits]:
    """Return what an owner may have."""
    return (yield from get(Limits, f"/limits/{_owner(owner)}"))


def usage(owner: str | None) -> Flow[dict[str, int]]:
    """Return what an owner has."""
    reply = yield from fetch(Call("GET", f"{BASE}/limits/{_owner(owner)}/usage"))
    return {name: int(_field(reply, name)) for name in ("running", "queued")}


def set_limits(owner: str | None, values: Limits) -> Flow[None]:
    """Set what an owner may have."""
    yield from fetch(Call("PUT", f"{BASE}/limits/{_owner(owner)}", json=values.model_dump()))


def _owner(owner: str | None) -> str:
    if owner == "":
        raise InvalidField("owner", "is missing; a farm over HTTP has no owner without a name")
    return EVERYBODY if owner is None else quote(owner, safe="")


def whoami() -> Flow[str]:
    """Return in whose name we act."""
    reply = yield from fetch(Call("GET", f"{BASE}/whoami"))
    return str(_field(reply, "owner"))
