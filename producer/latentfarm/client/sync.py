"""A farm reached over HTTP, from ordinary code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from latentfarm_shared.ledger import JobEvent, JobStatus, Limits, WorkerStatus
from latentfarm_shared.specs import JobSpec
from PIL import Image as PilImage

from latentfarm.asking import Generates
from latentfarm.bars import told
from latentfarm.client import calls
from latentfarm.client.described import Described
from latentfarm.client.flows import Flow, Sends, run
from latentfarm.client.http import TIMEOUT_S, Http
from latentfarm.client.profiles import address_of
from latentfarm.comparison import comparison
from latentfarm.pictures import Picture, Pictures, download, job_html
from latentfarm.planning import Plan
from latentfarm.views import CheckpointAnswer, EmbeddingAnswer
from latentfarm.waiting import Cause

if TYPE_CHECKING:
    from latentfarm.farm import DirectFarm

T = TypeVar("T")


@dataclass(frozen=True)
class Image(Described, Picture):
    """One image of a job, at the moment it was asked for."""

    sends: Sends

    def png(self) -> bytes:
        """Return the picture's bytes.

        Raises:
            ImageNotReady: there is no picture.
        """
        return run(calls.png(self.job, self.index), self.sends)

    def link(self, expires_in: int = 300) -> str:
        """Return an address of the picture that whoever has it can read for so many seconds, 3600 at most.

        Raises:
            ImageNotReady: there is no picture.
        """
        return run(calls.link(self.job, self.index, expires_in), self.sends)


class Job:
    """A job on a farm, by its id."""

    def __init__(self, sends: Sends, job_id: str) -> None:
        """Hold the job; nothing is asked yet."""
        self._sends, self.id = sends, job_id

    def __repr__(self) -> str:
        """Show the id."""
        return f"Job({self.id!r})"

    def _run(self, flow: Flow[T]) -> T:
        return run(flow, self._sends)

    def status(self) -> JobStatus:
        """Return where the job stands."""
        return self._run(calls.status(self.id))

    def wait(
        self,
        timeout_s: float | None = None,
        on_change: Callable[[JobStatus], None] | None = None,
        *,
        progress: bool = False,
    ) -> JobStatus:
        """Wait until every image is in a final state; `on_change` hears of every change on the way.

        `progress` shows a bar, on stderr or in a notebook.

        Raises:
            WaitTimeout: it took longer than `timeout_s` seconds.
        """
        with told(on_change, progress=progress) as tell:
            return self._run(calls.waited(self.id, timeout_s, tell))

    def cancel(self) -> None:
        """Cancel what is not rendered yet."""
        self._run(calls.order(self.id, "cancel"))

    def pause(self) -> None:
        """Hand out no more images; what is in flight goes on."""
        self._run(calls.order(self.id, "pause"))

    def resume(self) -> None:
        """Go on after a pause."""
        self._run(calls.order(self.id, "resume"))

    def approve(self) -> None:
        """Go on behind the images that a person was to see first."""
        self._run(calls.order(self.id, "approve"))

    def retry(self, *, missing: bool = False) -> None:
        """Hand out again what failed; if `missing`, what was canceled or has expired too."""
        self._run(calls.order(self.id, "retry", missing=missing))

    def prioritise(self, priority: int) -> None:
        """Put the job before (above 0) or behind (below 0) the owner's others."""
        self._run(calls.order(self.id, "priority", priority=priority))

    def events(self, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """Return what happened since a version of the job's status."""
        return self._run(calls.events(self.id, after, limit))

    def why(self) -> list[Cause]:
        """Return why images wait, each cause with a count and what would help; none if nothing does."""
        return self._run(calls.why(self.id))

    def manifest(self, name: Literal["manifest", "failed"] = "manifest") -> bytes:
        """Return the manifest in JSON lines, or the jobs of the images that failed.

        Raises:
            MissingObject: it is not written yet; it is, seconds after the job's end.
        """
        return self._run(calls.manifest(self.id, name))

    @property
    def images(self) -> Pictures[Image]:
        """All images in order, as they stand now."""
        return Pictures(self.iter_images())

    def iter_images(self, start: int = 0, stop: int | None = None) -> Iterator[Image]:
        """Yield images `start` to `stop` (not included), asking for them page by page."""
        at: int | None = start
        while at is not None:
            page, at = self._run(calls.image_page(self.id, at, stop))
            for answer in page:
                yield Image(self.id, answer.index, answer.state, answer, self._sends)

    def download(self, folder: str | Path, on_saved: Callable[[Path], None] | None = None) -> list[Path]:
        """Save every finished image as `<index>-<seed>.png`, several at a time; return the files.

        Files that are there already are kept, so that a download may be repeated; `on_saved` hears of each.
        """
        return download(self.iter_images(), Path(folder), on_saved=on_saved)

    def compare(self, x: str, y: str | None = None) -> PilImage.Image:
        """Return a grid of the job's pictures, `x` varying across and `y` down, each value written beside it.

        Both are fields (`seed`, `sampler`, `cfg_scale`, `embedding` …) or axes of a sweep (`strength:NAME`).

        Raises:
            InvalidField: the images have no such field; names the nearest.
        """
        return comparison(self.iter_images(), x, y, self.status().prompt)

    def _repr_html_(self) -> str:
        status = self.status()
        return job_html(self.id, status.state, status.finished, status.total, status.prompt)


class Embeddings:
    """The embeddings that can be named: one's own and the farm's."""

    def __init__(self, sends: Sends) -> None:
        """Ask nothing yet."""
        self._sends = sends

    def _run(self, flow: Flow[T]) -> T:
        return run(flow, self._sends)

    def ls(self, *, everything: bool = False) -> list[EmbeddingAnswer]:
        """Return all that can be named, by name; with `everything` those disabled and removed too."""
        return self._run(calls.embeddings(everything=everything))

    def show(self, name: str) -> EmbeddingAnswer:
        """Return one, by `NAME` or `NAME@version`.

        Raises:
            UnknownName: there is none; names the nearest.
        """
        return self._run(calls.embedding(name))

    def add(
        self, source: str | Path, name: str | None = None, *, allow_word: bool = False, kind: str | None = None
    ) -> EmbeddingAnswer:
        """Take in a file from here, or what lies at an https address or on Civitai (`civitai:VERSION`).

        Raises:
            NotAnEmbedding: it is none; `code` says why.
            UsageError: the name cannot be used.
        """
        return self._run(calls.add_embedding(source, name, kind, allow_word=allow_word))

    def add_all(
        self, source: str | Path, name: str | None = None, *, allow_word: bool = False, kind: str | None = None
    ) -> list[calls.Added]:
        """Take in a file, what lies at an address, or every file of a folder; one that is refused stops none of the others."""
        return self._run(calls.add_all(source, name, kind, allow_word=allow_word))

    def alias(self, name: str, alias: str, *, allow_word: bool = False) -> EmbeddingAnswer:
        """Give an embedding a second name."""
        return self._run(calls.alias(name, alias, allow_word=allow_word))

    def rm(self, name: str, *, force: bool = False) -> None:
        """Remove a name; jobs that have the embedding keep it.

        Raises:
            EmbeddingInUse: unfinished jobs use it, and it is not to be forced.
        """
        self._run(calls.remove_embedding(name, force=force))


class Models:
    """The checkpoints that jobs can ask for."""

    def __init__(self, sends: Sends) -> None:
        """Ask nothing yet."""
        self._sends = sends

    def ls(self) -> list[CheckpointAnswer]:
        """Return all, by name."""
        return run(calls.checkpoints(), self._sends)


class Farm(Generates[Job]):
    """A farm reached over HTTP. Connections are kept; several threads may use it at once."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        sends: Sends | None = None,
    ) -> None:
        """Connect lazily to the farm at an address.

        Without one, to that of LATENTFARM_API_URL and LATENTFARM_API_KEY, or of 'latentfarm login'. `timeout_s` is that of
        one try of a call, of which there may be a few. `sends` sends calls some other way, as `latentfarm.testing` does.

        Raises:
            InvalidField: no address is given, or set; or it is none.
        """
        if sends is None:
            sends = Http(*address_of(url, api_key), timeout_s)
        self._sends = sends
        self.embeddings, self.models = Embeddings(sends), Models(sends)

    @classmethod
    def from_env(cls, data: str | Path | None = None, environ: Mapping[str, str] | None = None) -> DirectFarm:
        """Find the farm that docs/settings.md describes, directly over its Redis and S3, and make sure it answers.

        Raises:
            NoFarm, Unavailable: none is there, or it does not let us in.
            BadSettings: a variable is malformed.
        """
        from latentfarm.farm import DirectFarm  # noqa: PLC0415 - which brings clients of Redis and S3

        return DirectFarm.from_env(data, environ)

    def _run(self, flow: Flow[T]) -> T:
        return run(flow, self._sends)

    def _job(self, job_id: str) -> Job:
        return Job(self._sends, job_id)

    def submit(self, spec: JobSpec, job_id: str | None = None) -> Job:
        """Submit a job; return once it is on disk. It is sent again if no answer comes, and is one job nevertheless.

        Raises:
            UsageError: what is wrong with the request, before anything is queued.
            AlreadyTaken: the id is another job's.
            Busy: too much is waiting; says when to try again.
            Unavailable: the farm does not answer.
        """
        return self._job(self._run(calls.submit(spec, job_id)))

    def submit_file(
        self, path: str | Path, *, anew: bool = False, defaults: Mapping[str, Any] | None = None
    ) -> list[Job]:
        """Submit a sweep file (YAML, JSON) or a table (JSONL, CSV); the whole file is checked before anything is queued.

        The same file again resumes: what failed or was canceled is handed out again, what is there is kept. `anew` makes
        new jobs of it. `defaults` are `lane` and `model`, where the file does not say.

        Raises:
            InvalidRows: what is wrong, and where.
            UsageError, Busy, Unavailable: as `submit`.
        """
        ids = self._run(calls.submit_file(Path(path), anew=anew, defaults=defaults or {}))
        return [self._job(job_id) for job_id in ids]

    def plan(self, source: JobSpec | str | Path, defaults: Mapping[str, Any] | None = None) -> Plan:
        """Tell what a job or file would do, without queueing anything: count, embeddings, long prompts, time.

        Raises:
            UsageError: what is wrong with it, as `submit` would.
        """
        return self._run(calls.plan(source if isinstance(source, JobSpec) else Path(source), defaults or {}))

    def job(self, job_id: str) -> Job:
        """Return a job by its id or an unambiguous beginning of it.

        Raises:
            UnknownName: there is none.
        """
        return self._job(self._run(calls.job_called(job_id)))

    def jobs(self, limit: int = 50) -> list[Job]:
        """Return the newest jobs first."""
        return [self._job(status.id) for status in self.statuses(limit)]

    def statuses(self, limit: int = 50, state: str | None = None) -> list[JobStatus]:
        """Return where the newest jobs stand, of those in a `state` if given."""
        return self._run(calls.statuses(limit, state))

    def why(self, job_id: str) -> list[Cause]:
        """Return why a job's images wait, each cause with a count; none if nothing does."""
        return self._run(calls.why(job_id))

    def workers(self) -> list[WorkerStatus]:
        """Return the workers that are alive."""
        return self._run(calls.workers())

    def aside(self) -> dict[str, str]:
        """Return the workers that are set aside because they kept dying, each with its story."""
        return self._run(calls.aside())

    def drain(self, station: str, *, on: bool = True) -> None:
        """Let a worker claim nothing more, or go on.

        Raises:
            UnknownName: no worker of this name is alive.
        """
        self._run(calls.steer_worker(station, "drain" if on else "undrain"))

    def release(self, station: str) -> None:
        """Let a worker that was set aside work again.

        Raises:
            UnknownName: none of this name is set aside.
        """
        self._run(calls.steer_worker(station, "release"))

    def limits(self, owner: str | None) -> Limits:
        """Return what an owner may have; None is everybody who has no limits of their own."""
        return self._run(calls.limits(owner))

    def usage(self, owner: str | None) -> dict[str, int]:
        """Return how many images of an owner, or of those without a name, are `running` and `queued`."""
        return self._run(calls.usage(owner))

    def set_limits(self, owner: str | None, limits: Limits) -> None:
        """Set what an owner may have."""
        self._run(calls.set_limits(owner, limits))

    def whoami(self) -> str:
        """Return in whose name the farm takes jobs from here.

        Raises:
            NotAllowed: the key is missing, unknown or expired.
        """
        return self._run(calls.whoami())

    def close(self) -> None:
        """Close the connections."""
        if isinstance(self._sends, Http):
            self._sends.close()

    def __enter__(self) -> Self:
        """Use the farm for as long as a block lasts."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()
