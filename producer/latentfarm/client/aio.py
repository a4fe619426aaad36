"""A farm reached over HTTP, from an event loop: what `Farm` has, to be awaited."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from latentfarm_shared.ledger import JobEvent, JobStatus, Limits, WorkerStatus
from latentfarm_shared.specs import JobSpec
from PIL import Image as PilImage

from latentfarm.asking import Generates
from latentfarm.bars import told
from latentfarm.client import calls
from latentfarm.client.described import Described
from latentfarm.client.flows import Call, Flow, Reply, SendsAsync, run_async
from latentfarm.client.http import TIMEOUT_S, AsyncHttp
from latentfarm.client.profiles import address_of
from latentfarm.client.sync import Image
from latentfarm.comparison import Grid, thumbnail
from latentfarm.pictures import AT_ONCE, is_saved, remove_parts, write_whole
from latentfarm.planning import Plan
from latentfarm.views import CheckpointAnswer, EmbeddingAnswer
from latentfarm.waiting import Cause

T = TypeVar("T")


@dataclass(frozen=True)
class AsyncImage(Described):
    """One image of a job, at the moment it was asked for."""

    sends: SendsAsync

    async def png(self) -> bytes:
        """Return the picture's bytes.

        Raises:
            ImageNotReady: there is no picture.
        """
        return await run_async(calls.png(self.job, self.index), self.sends)

    async def pil(self) -> PilImage.Image:
        """Return the picture as Pillow has it, RGB."""
        with PilImage.open(io.BytesIO(await self.png())) as picture:
            return picture.convert("RGB")

    async def save(self, path: str | Path) -> Path:
        """Write the picture to a file, making its folder; the file is there whole or not at all."""
        path, data = Path(path), await self.png()
        await asyncio.to_thread(write_whole, path, data)
        return path

    async def link(self, expires_in: int = 300) -> str:
        """Return an address of the picture that whoever has it can read for so many seconds, 3600 at most.

        Raises:
            ImageNotReady: there is no picture.
        """
        return await run_async(calls.link(self.job, self.index, expires_in), self.sends)


class AsyncJob:
    """A job on a farm, by its id."""

    def __init__(self, sends: SendsAsync, job_id: str) -> None:
        """Hold the job; nothing is asked yet."""
        self._sends, self.id = sends, job_id

    def __repr__(self) -> str:
        """Show the id."""
        return f"AsyncJob({self.id!r})"

    async def _run(self, flow: Flow[T]) -> T:
        return await run_async(flow, self._sends)

    async def status(self) -> JobStatus:
        """Return where the job stands."""
        return await self._run(calls.status(self.id))

    async def wait(
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
            return await self._run(calls.waited(self.id, timeout_s, tell))

    async def cancel(self) -> None:
        """Cancel what is not rendered yet."""
        await self._run(calls.order(self.id, "cancel"))

    async def pause(self) -> None:
        """Hand out no more images; what is in flight goes on."""
        await self._run(calls.order(self.id, "pause"))

    async def resume(self) -> None:
        """Go on after a pause."""
        await self._run(calls.order(self.id, "resume"))

    async def approve(self) -> None:
        """Go on behind the images that a person was to see first."""
        await self._run(calls.order(self.id, "approve"))

    async def retry(self, *, missing: bool = False) -> None:
        """Hand out again what failed; if `missing`, what was canceled or has expired too."""
        await self._run(calls.order(self.id, "retry", missing=missing))

    async def prioritise(self, priority: int) -> None:
        """Put the job before (above 0) or behind (below 0) the owner's others."""
        await self._run(calls.order(self.id, "priority", priority=priority))

    async def events(self, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """Return what happened since a version of the job's status."""
        return await self._run(calls.events(self.id, after, limit))

    async def why(self) -> list[Cause]:
        """Return why images wait, each cause with a count and what would help; none if nothing does."""
        return await self._run(calls.why(self.id))

    async def manifest(self, name: Literal["manifest", "failed"] = "manifest") -> bytes:
        """Return the manifest in JSON lines, or the jobs of the images that failed.

        Raises:
            MissingObject: it is not written yet; it is, seconds after the job's end.
        """
        return await self._run(calls.manifest(self.id, name))

    @property
    def images(self) -> Coroutine[Any, Any, list[AsyncImage]]:
        """All images in order, as they stand now; to be awaited."""
        return self._images()

    async def _images(self) -> list[AsyncImage]:
        return [image async for image in self.iter_images()]

    async def iter_images(self, start: int = 0, stop: int | None = None) -> AsyncIterator[AsyncImage]:
        """Yield images `start` to `stop` (not included), asking for them page by page."""
        at: int | None = start
        while at is not None:
            page, at = await self._run(calls.image_page(self.id, at, stop))
            for answer in page:
                yield AsyncImage(self.id, answer.index, answer.state, answer, self._sends)

    async def compare(self, x: str, y: str | None = None) -> PilImage.Image:
        """Return a grid of the job's pictures, `x` varying across and `y` down, each value written beside it.

        Both are fields (`seed`, `sampler`, `cfg_scale`, `embedding` …) or axes of a sweep (`strength:NAME`).

        Raises:
            InvalidField: the images have no such field; names the nearest.
        """
        grid = Grid(x, y)
        async for image in self.iter_images():
            grid.add(Image(self.id, image.index, image.state, image.told, _Nobody()))
        thumbnails = {}
        for place, shown in grid.wanted().items():
            png = await run_async(calls.png(self.id, shown.index), self._sends)
            thumbnails[place] = await asyncio.to_thread(thumbnail, png)
        return await asyncio.to_thread(grid.drawn, (await self.status()).prompt, thumbnails)

    async def download(self, folder: str | Path, on_saved: Callable[[Path], None] | None = None) -> list[Path]:
        """Save every finished image as `<index>-<seed>.png`, several at a time; return the files.

        Files that are there already are kept, so that a download may be repeated; `on_saved` hears of each.
        """
        await asyncio.to_thread(remove_parts, Path(folder))
        files: list[Path] = []
        batch: list[AsyncImage] = []
        async for image in self.iter_images():
            if image.state == "succeeded":
                files.append(Path(folder) / image.file_name)
                batch.append(image)
            if len(batch) == AT_ONCE:
                await _save_all(batch, Path(folder), on_saved)
                batch = []
        await _save_all(batch, Path(folder), on_saved)
        return files


class _Nobody:
    """Stands in for a farm that is not asked."""

    def send(self, call: Call, data: bytes) -> Reply:
        raise NotImplementedError(call.path, data)


async def _save_all(batch: list[AsyncImage], folder: Path, on_saved: Callable[[Path], None] | None) -> None:
    async def save(image: AsyncImage) -> None:
        path = folder / image.file_name
        if not await asyncio.to_thread(is_saved, path, image.parameters):
            await image.save(path)
        if on_saved is not None:
            on_saved(path)

    results = await asyncio.gather(*(save(image) for image in batch), return_exceptions=True)
    for result in results:  # all have ended, so that nothing goes on behind the caller's back
        if result is not None:
            raise result


class AsyncEmbeddings:
    """The embeddings that can be named: one's own and the farm's."""

    def __init__(self, sends: SendsAsync) -> None:
        """Ask nothing yet."""
        self._sends = sends

    async def _run(self, flow: Flow[T]) -> T:
        return await run_async(flow, self._sends)

    async def ls(self, *, everything: bool = False) -> list[EmbeddingAnswer]:
        """Return all that can be named, by name; with `everything` those disabled and removed too."""
        return await self._run(calls.embeddings(everything=everything))

    async def show(self, name: str) -> EmbeddingAnswer:
        """Return one, by `NAME` or `NAME@version`.

        Raises:
            UnknownName: there is none; names the nearest.
        """
        return await self._run(calls.embedding(name))

    async def add(
        self, source: str | Path, name: str | None = None, *, allow_word: bool = False, kind: str | None = None
    ) -> EmbeddingAnswer:
        """Take in a file from here, or what lies at an https address or on Civitai (`civitai:VERSION`).

        Raises:
            NotAnEmbedding: it is none; `code` says why.
            UsageError: the name cannot be used.
        """
        return await self._run(calls.add_embedding(source, name, kind, allow_word=allow_word))

    async def add_all(
        self, source: str | Path, name: str | None = None, *, allow_word: bool = False, kind: str | None = None
    ) -> list[calls.Added]:
        """Take in a file, what lies at an address, or every file of a folder; one that is refused stops none of the others."""
        return await self._run(calls.add_all(source, name, kind, allow_word=allow_word))

    async def alias(self, name: str, alias: str, *, allow_word: bool = False) -> EmbeddingAnswer:
        """Give an embedding a second name."""
        return await self._run(calls.alias(name, alias, allow_word=allow_word))

    async def rm(self, name: str, *, force: bool = False) -> None:
        """Remove a name; jobs that have the embedding keep it.

        Raises:
            EmbeddingInUse: unfinished jobs use it, and it is not to be forced.
        """
        await self._run(calls.remove_embedding(name, force=force))


class AsyncModels:
    """The checkpoints that jobs can ask for."""

    def __init__(self, sends: SendsAsync) -> None:
        """Ask nothing yet."""
        self._sends = sends

    async def ls(self) -> list[CheckpointAnswer]:
        """Return all, by name."""
        return await run_async(calls.checkpoints(), self._sends)


class AsyncFarm(Generates[Coroutine[Any, Any, AsyncJob]]):
    """A farm reached over HTTP. Belongs to one event loop; several tasks may use it at once."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        sends: SendsAsync | None = None,
    ) -> None:
        """Connect lazily to the farm at an address.

        Without one, to that of LATENTFARM_API_URL and LATENTFARM_API_KEY, or of 'latentfarm login'. `timeout_s` is that of
        one try of a call, of which there may be a few. `sends` sends calls some other way, as `latentfarm.testing` does.

        Raises:
            InvalidField: no address is given, or set; or it is none.
        """
        if sends is None:
            sends = AsyncHttp(*address_of(url, api_key), timeout_s)
        self._sends = sends
        self.embeddings, self.models = AsyncEmbeddings(sends), AsyncModels(sends)

    async def _run(self, flow: Flow[T]) -> T:
        return await run_async(flow, self._sends)

    def _job(self, job_id: str) -> AsyncJob:
        return AsyncJob(self._sends, job_id)

    async def submit(self, spec: JobSpec, job_id: str | None = None) -> AsyncJob:
        """Submit a job; return once it is on disk. It is sent again if no answer comes, and is one job nevertheless.

        Raises:
            UsageError: what is wrong with the request, before anything is queued.
            AlreadyTaken: the id is another job's.
            Busy: too much is waiting; says when to try again.
            Unavailable: the farm does not answer.
        """
        return self._job(await self._run(calls.submit(spec, job_id)))

    async def submit_file(
        self, path: str | Path, *, anew: bool = False, defaults: Mapping[str, Any] | None = None
    ) -> list[AsyncJob]:
        """Submit a sweep file (YAML, JSON) or a table (JSONL, CSV); the whole file is checked before anything is queued.

        The same file again resumes: what failed or was canceled is handed out again, what is there is kept. `anew` makes
        new jobs of it. `defaults` are `lane` and `model`, where the file does not say.

        Raises:
            InvalidRows: what is wrong, and where.
            UsageError, Busy, Unavailable: as `submit`.
        """
        ids = await self._run(calls.submit_file(Path(path), anew=anew, defaults=defaults or {}))
        return [self._job(job_id) for job_id in ids]

    async def plan(self, source: JobSpec | str | Path, defaults: Mapping[str, Any] | None = None) -> Plan:
        """Tell what a job or file would do, without queueing anything: count, embeddings, long prompts, time.

        Raises:
            UsageError: what is wrong with it, as `submit` would.
        """
        return await self._run(calls.plan(source if isinstance(source, JobSpec) else Path(source), defaults or {}))

    async def job(self, job_id: str) -> AsyncJob:
        """Return a job by its id or an unambiguous beginning of it.

        Raises:
            UnknownName: there is none.
        """
        return self._job(await self._run(calls.job_called(job_id)))

    async def jobs(self, limit: int = 50) -> list[AsyncJob]:
        """Return the newest jobs first."""
        return [self._job(status.id) for status in await self.statuses(limit)]

    async def statuses(self, limit: int = 50, state: str | None = None) -> list[JobStatus]:
        """Return where the newest jobs stand, of those in a `state` if given."""
        return await self._run(calls.statuses(limit, state))

    async def why(self, job_id: str) -> list[Cause]:
        """Return why a job's images wait, each cause with a count; none if nothing does."""
        return await self._run(calls.why(job_id))

    async def workers(self) -> list[WorkerStatus]:
        """Return the workers that are alive."""
        return await self._run(calls.workers())

    async def aside(self) -> dict[str, str]:
        """Return the workers that are set aside because they kept dying, each with its story."""
        return await self._run(calls.aside())

    async def drain(self, station: str, *, on: bool = True) -> None:
        """Let a worker claim nothing more, or go on.

        Raises:
            UnknownName: no worker of this name is alive.
        """
        await self._run(calls.steer_worker(station, "drain" if on else "undrain"))

    async def release(self, station: str) -> None:
        """Let a worker that was set aside work again.

        Raises:
            UnknownName: none of this name is set aside.
        """
        await self._run(calls.steer_worker(station, "release"))

    async def limits(self, owner: str | None) -> Limits:
        """Return what an owner may have; None is everybody who has no limits of their own."""
        return await self._run(calls.limits(owner))

    async def usage(self, owner: str | None) -> dict[str, int]:
        """Return how many images of an owner, or of those without a name, are `running` and `queued`."""
        return await self._run(calls.usage(owner))

    async def set_limits(self, owner: str | None, limits: Limits) -> None:
        """Set what an owner may have."""
        await self._run(calls.set_limits(owner, limits))

    async def whoami(self) -> str:
        """Return in whose name the farm takes jobs from here.

        Raises:
            NotAllowed: the key is missing, unknown or expired.
        """
        return await self._run(calls.whoami())

    async def close(self) -> None:
        """Close the connections."""
        if isinstance(self._sends, AsyncHttp):
            await self._sends.close()

    async def __aenter__(self) -> Self:
        """Use the farm for as long as a block lasts."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.close()
