"""A submitted job and its images, as users hold them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from latentfarm_shared.errors import FarmError, InvalidField
from latentfarm_shared.housekeeping import manifest_key
from latentfarm_shared.images import image_key
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.ledger import ImageState, JobEvent, JobStatus, Ledger
from latentfarm_shared.prompts.mentions import AppliedEmbedding, applied_embeddings
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import ImageSpec, JobSpec, expand
from latentfarm_shared.storage import ObjectStore
from latentfarm_shared.sweeps.axes import Point
from latentfarm_shared.tables import TableStore
from latentfarm_shared.vocabularies import Vocabularies
from PIL import Image as PilImage

from latentfarm.bars import told
from latentfarm.comparison import comparison
from latentfarm.pictures import Picture, Pictures, download, job_html
from latentfarm.waiting import Cause, causes

POLL_S = (0.05, 0.5)
PAGE = 1000


class WaitTimeout(FarmError):
    """The job was not done after `timeout_s` seconds; it goes on."""

    exit_code = 4
    code = "TIMEOUT"

    def __init__(self, job: str, timeout_s: float) -> None:
        super().__init__(job, timeout_s)
        self.job, self.timeout_s = job, timeout_s

    def __str__(self) -> str:
        return f"job {self.job} is not done after {self.timeout_s:g} s; it goes on"


class ImageNotReady(FarmError):
    """The image has no picture, because it is not rendered yet or failed."""

    code = "NOT_READY"

    def __init__(self, job: str, index: int, state: str, reason: str = "") -> None:
        super().__init__(job, index, state, reason)
        self.job, self.index, self.state, self.reason = job, index, state, reason

    def __str__(self) -> str:
        return f"image {self.index} of job {self.job} is {self.state}" + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class FarmImage(Picture):
    """One image of a job, at the moment it was asked for."""

    ledger: Ledger
    store: ObjectStore
    job: str
    index: int
    state: ImageState
    spec: JobSpec
    lock: Lock
    vocabularies: Vocabularies
    tables: TableStore

    @cached_property
    def image(self) -> ImageSpec:
        """Everything that decides the picture."""
        return expand(self.spec, self.index, self.tables.of(self.spec))

    @property
    def seed(self) -> int:
        """The image's own seed."""
        return self.image.seed

    @property
    def point(self) -> Point:
        """Where it lies on the job's axes."""
        return self.image.point

    @property
    def key(self) -> str:
        """Where the picture lies in the bucket."""
        return image_key(self.job, self.index)

    @property
    def s3_url(self) -> str:
        """The `s3://` address of the picture."""
        return self.store.url(self.key)

    @property
    def parameters(self) -> str:
        """The infotext, as written into the picture."""
        return format_infotext(self.image, self.lock, [applied.record for applied in self.embeddings])

    @cached_property
    def embeddings(self) -> list[AppliedEmbedding]:
        """The embeddings applied to it, and in which prompts."""
        if not self.lock.embeddings:
            return []
        return applied_embeddings(self.image, self.lock, self.vocabularies.of(self.lock.checkpoint))

    @property
    def error(self) -> dict[str, str] | None:
        """`code`, `message` and `worker`, if it failed."""
        return self.ledger.image_error(self.job, self.index)

    def require(self) -> None:
        """Make sure that there is a picture.

        Raises:
            ImageNotReady: there is none; says why.
        """
        if self.state != "succeeded":
            story = self.error if self.state == "failed" else None
            raise ImageNotReady(self.job, self.index, self.state, story["message"] if story else "")

    def png(self) -> bytes:
        """Return the picture's bytes.

        Raises:
            ImageNotReady: there is no picture.
        """
        self.require()
        return self.store.get(self.key)

    def link(self, expires_in: int = 300) -> str:
        """Return an address of the picture that whoever has it can read for so many seconds, 3600 at most.

        Raises:
            ImageNotReady: there is no picture.
        """
        self.require()
        return self.store.link(self.key, expires_in)

    def summary(self) -> dict[str, Any]:
        """Return what the command line prints as JSON."""
        return {
            "index": self.index,
            "state": self.state,
            "seed": self.seed,
            "s3_url": self.s3_url if self.state == "succeeded" else None,
            "parameters": self.parameters,
            "embeddings": [applied.row() for applied in self.embeddings],
            **({"dropped": [d.model_dump() for d in self.lock.dropped]} if self.lock.dropped else {}),
            **({"point": self.point} if self.spec.is_sweep else {}),
            **({"error": self.error} if self.state == "failed" else {}),
        }


class Job:
    """A job on the farm, by its id."""

    def __init__(
        self,
        ledger: Ledger,
        store: ObjectStore,
        vocabularies: Vocabularies,
        tables: TableStore,
        job_id: str,
        *,
        is_known: bool = False,
    ) -> None:
        """Hold the job; nothing is asked yet. `is_known` says that its submission was repeated."""
        self.ledger, self.store, self.vocabularies, self.tables, self.id = ledger, store, vocabularies, tables, job_id
        self.is_known = is_known

    def __repr__(self) -> str:
        """Show the id."""
        return f"Job({self.id!r})"

    @cached_property
    def _frozen(self) -> tuple[JobSpec, list[Lock]]:
        return self.ledger.spec(self.id), self.ledger.locks(self.id)

    @property
    def spec(self) -> JobSpec:
        """What was asked for, with prompts and seed settled."""
        return self._frozen[0]

    @property
    def lock(self) -> Lock:
        """What the job was frozen to; of one that draws on several checkpoints, for the first."""
        return self._frozen[1][0]

    @property
    def created(self) -> float:
        """When it was submitted, in seconds since 1970."""
        return self.status().created

    def status(self) -> JobStatus:
        """Return where the job stands."""
        return self.ledger.status(self.id)

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
            return self._wait(timeout_s, tell)

    def _wait(self, timeout_s: float | None, tell: Callable[[JobStatus], None]) -> JobStatus:
        started, pause, version = time.monotonic(), POLL_S[0], -1
        while True:
            status = self.status()
            if status.version != version:
                version, pause = status.version, POLL_S[0]
                tell(status)
            if status.is_final:
                return status
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                raise WaitTimeout(self.id, timeout_s)
            time.sleep(pause)
            pause = min(POLL_S[1], pause * 1.3)

    def follow(self, on_progress: Callable[[dict[str, float | str]], None]) -> JobStatus:
        """Wait for a job of one image that tells how far it is; `on_progress` hears its story every half second."""
        while not (status := self.status()).is_final:
            on_progress(status.progress or {"stage": status.state})
            time.sleep(POLL_S[1])
        return status

    def cancel(self) -> None:
        """Cancel what is not rendered yet."""
        self.ledger.cancel(self.id)

    def pause(self) -> None:
        """Hand out no more images; what is in flight goes on."""
        self.ledger.pause(self.id)

    def resume(self) -> None:
        """Go on after a pause."""
        self.ledger.resume(self.id)

    def approve(self) -> None:
        """Go on behind the images that a person was to see first."""
        self.ledger.approve(self.id)

    def retry(self, *, missing: bool = False) -> None:
        """Hand out again what failed; if `missing`, what was canceled or has expired too."""
        self.ledger.retry(self.id, missing=missing)

    def prioritise(self, priority: int) -> None:
        """Put the job before (above 0) or behind (below 0) the owner's others."""
        if not -100 <= priority <= 100:
            raise InvalidField("priority", f"should be -100 to 100, got {priority}")
        self.ledger.prioritise(self.id, priority)

    def events(self, after: int = 0, limit: int = 1000) -> list[JobEvent]:
        """Return what happened since a version of the job's status."""
        return self.ledger.events(self.id, after, limit)

    def manifest(self, name: Literal["manifest", "failed"] = "manifest") -> bytes:
        """Return the manifest in JSON lines, or the jobs of the images that failed.

        Raises:
            MissingObject: it is not written yet; it is, seconds after the job's end.
        """
        return self.store.get(manifest_key(self.id, name))

    def why(self) -> list[Cause]:
        """Return why images wait, each cause with a count and what would help; none if nothing does."""
        return causes(self.ledger, self.id)

    @property
    def images(self) -> Pictures[FarmImage]:
        """All images in order, as they stand now."""
        return Pictures(self.iter_images())

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

    def iter_images(self, start: int = 0, stop: int | None = None) -> Iterator[FarmImage]:
        """Yield images `start` to `stop` (not included), asking for them page by page."""
        stop = self.spec.total if stop is None else min(stop, self.spec.total)
        for first in range(start, stop, PAGE):
            last = min(first + PAGE, stop)
            states = self.ledger.image_states(self.id, first, last)
            for offset, state in enumerate(states):
                index = first + offset
                yield self._image(index, state)

    def _image(self, index: int, state: ImageState) -> FarmImage:
        spec, locks = self._frozen
        lock = locks[spec.layout.part_of(index)]
        return FarmImage(self.ledger, self.store, self.id, index, state, spec, lock, self.vocabularies, self.tables)

    def download(self, folder: str | Path, on_saved: Callable[[Path], None] | None = None) -> list[Path]:
        """Save every finished image as `<index>-<seed>.png`, several at a time; return the files.

        Files that are there already are kept, so that a download may be repeated; `on_saved` hears of each.
        """
        return download(self.iter_images(), Path(folder), on_saved=on_saved)
