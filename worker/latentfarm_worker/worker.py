"""What one worker process does: claim images, render them on its backend, publish them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
from latentfarm_shared.errors import FarmError, RenderCanceled, RenderError, Unavailable, UnknownName
from latentfarm_shared.images import content_id, image_key
from latentfarm_shared.ledger import SOMEBODY_LOOKS, Claim, Ledger
from latentfarm_shared.ledger.queues import LANES, checkpoint_of, lacking, required_by
from latentfarm_shared.logs import log
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import ImageSpec, Lane, expand
from latentfarm_shared.storage import Store
from latentfarm_shared.tables import TableStore

from latentfarm_worker.backend import Backend
from latentfarm_worker.engine import Engine
from latentfarm_worker.operations import Model, Progress, Rendered
from latentfarm_worker.patience import patiently
from latentfarm_worker.png import encode_png
from latentfarm_worker.proof import checked
from latentfarm_worker.room import Room
from latentfarm_worker.vitals import RESERVE, Vitals

PUBLISHERS = 4
TELL_EVERY_S = 0.5


def _story(progress: Progress) -> dict[str, float | str]:
    score = {} if progress.score is None else {"left_open": round(progress.score, 4)}
    return {"stage": progress.stage, "step": progress.step, "steps": progress.steps, **score}


def _end_process(error: BaseException) -> None:
    """End a process whose device can run nothing any more; its leases run out and its images run elsewhere."""
    log.error("the device is lost", error=repr(error))
    os._exit(1)


class Worker:
    """One process's share of the farm. `serve` is called by Celery's threads, one image at a time each."""

    def __init__(
        self, name: str, settings: Settings, ledger: Ledger, store: Store, vitals: Vitals, backend: Backend
    ) -> None:
        """Hold nothing yet; `start` lets it render."""
        self.name, self._settings, self._ledger, self._store, self._vitals = name, settings, ledger, store, vitals
        self._backend, self._tables = backend, TableStore(store)
        self._served: dict[str, CheckpointRecord] = {}
        self._tagged: list[str] = []
        self._slots = threading.Semaphore(settings.slots)
        self._reserve = threading.Semaphore(RESERVE)
        self._unpublished = Room(settings.unpublished_mb * 2**20)
        self._claims: dict[str, tuple[Claim, Future[Rendered]]] = {}
        self._progress: dict[str, Progress] = {}
        self._fitted: dict[str, Future[Rendered] | None] = {}
        self._strange: set[str] = set()
        self._canceled: set[str] = set()
        self._guard = threading.Lock()
        self._draining = threading.Event()
        self._publishers = ThreadPoolExecutor(PUBLISHERS, "publish")
        self._engine = Engine(
            self._vitals.beat,
            slots=settings.slots,
            policy=settings.policy,
            capacity=backend.capacity,
            device=backend.device,
            on_fatal=_end_process,
        )

    def start(self) -> None:
        """Start the engine."""
        self._engine.start()

    # ---- warm

    def load(self, record: CheckpointRecord) -> None:
        """Make a checkpoint ready."""
        self._backend.load(record)
        self._served[record.hash] = record
        self._note_counts()
        log.info("checkpoint ready", checkpoint=record.name, worker=self.name)

    def has(self, record: CheckpointRecord) -> bool:
        """Tell whether a checkpoint is served."""
        return record.hash in self._served

    def advertise(self) -> list[str]:
        """Tell the farm what is ready and consumed; return the queues, by urgency."""
        self._tagged = [
            queue for queue in self._ledger.tagged_queues() if not lacking(self._settings.tags, required_by(queue))
        ]
        queues = self.queues(self._settings.lanes)
        self._vitals.advertise(sorted(self._served), queues)
        return queues

    def _note_counts(self) -> None:
        self._vitals.note(self._settings.slots, self._backend.counts())

    # ---- work

    def queues(self, lanes: Sequence[Lane]) -> list[str]:
        """Return the queues of some lanes this worker can serve, the most urgent first."""
        checkpoints, tagged = list(self._served), self._tagged
        return [
            queue
            for lane in lanes
            for queue in (
                *(f"{lane}:{checkpoint}" for checkpoint in checkpoints),
                *(q for q in tagged if q.startswith(f"{lane}:") and checkpoint_of(q) in checkpoints),
            )
        ]

    def serve(self, ring_again: Callable[[], None], *, urgent: bool) -> bool:
        """Render images as long as there are any and a slot is free; `ring_again` wakes another thread, once.

        An `urgent` wake-up, one of the interactive lane, finds room beside the slots. False if there was no room at all, so
        that somebody else should be woken.
        """
        more, had_room = True, False
        while more and not self._draining.is_set() and (permit := self._permit(urgent=urgent)):
            had_room = True
            try:
                lanes = self._settings.lanes if permit is self._slots else LANES[:1]
                more = self._serve_one(self.queues(lanes), ring_again)
            finally:
                permit.release()
            ring_again = _not_again
        return had_room

    def _permit(self, *, urgent: bool) -> threading.Semaphore | None:
        """Take a slot; when all are taken, an interactive wake-up may take from the reserve."""
        if self._slots.acquire(blocking=False):
            return self._slots
        return self._reserve if urgent and self._reserve.acquire(blocking=False) else None

    def _serve_one(self, queues: list[str], ring_again: Callable[[], None]) -> bool:
        """Claim, render and hand on one image; tell whether there was one."""
        cold = [queue for queue in queues if not self._backend.is_warm(checkpoint_of(queue))]
        claim = self._ledger.claim(self.name, queues, cold)
        if claim is None:
            return False
        with self._guard:  # known from now on, though nothing is in flight yet
            self._claims[claim.member] = (claim, Future())
        try:
            ring_again()
        except Exception as error:  # noqa: BLE001 - the sweeper rings within a second; the claim is ours to finish
            log.warning("could not ring", error=repr(error), worker=self.name)
        try:
            image = patiently(lambda: expand(claim.spec, claim.index, self._tables.of(claim.spec)))
            if self._has_it(claim, content_id(image, claim.lock)):
                return True
        except Unavailable as error:
            self._settle(claim, "image handed back", lambda: self._ledger.release(claim, self.name), str(error))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one image belongs to it
            self._fail(claim, error)
        else:
            with ExitStack() as held:
                self._finish(claim, image, self._render(claim, image, held))
            self._note_counts()
        return True

    def _has_it(self, claim: Claim, content: str) -> bool:
        """Tell whether a claim needs no render: its picture is there, the owner has it, or somebody renders it now."""
        key = image_key(claim.job, claim.index)
        if claim.doubtful and patiently(lambda: self._store.content_id(key)) == content:
            self._settle(claim, "image was published", lambda: self._ledger.succeed(claim, self.name, 0))
            return True
        if not claim.spec.reuse or claim.spec.pack is not None:
            return False
        found = patiently(lambda: self._ledger.reserve(claim, content))
        if found.have is not None and self._copied(claim, found.have, content):
            self._settle(claim, "image copied", lambda: self._ledger.succeed(claim, self.name, 0))
            return True
        if found.have is None and not found.render:
            self._forget(claim)
            return True
        return False

    def _copied(self, claim: Claim, source: tuple[str, int], content: str) -> bool:
        """Copy the owner's picture in the store; false if it is not there any more."""
        try:
            spec = self._ledger.spec(source[0])
        except UnknownName:
            return False
        old, new = image_key(source[0], spec.layout.index_at(source[1])), image_key(claim.job, claim.index)
        return patiently(lambda: self._store.copy(old, new, content))

    def _render(self, claim: Claim, image: ImageSpec, held: ExitStack) -> Future[Rendered]:
        """Put the claimed image in flight; what cannot even start fails its future."""
        try:
            model = held.enter_context(self._backend.holding(claim))
            progress = Progress()
            if claim.spec.pack is not None or claim.spec.lane == "interactive":
                self._progress[claim.member] = progress  # somebody waits and may want to see
                self._fit(claim, model)
            render = self._backend.render(claim, image, model, progress)
            urgent = claim.spec.lane == "interactive" and claim.spec.pack is None
            future = self._engine.submit(render, model, urgent=urgent)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one image belongs to its future
            future = Future()
            future.set_exception(error)
        with self._guard:
            self._claims[claim.member] = (claim, future)
            canceled = claim.member in self._canceled
        if canceled:
            self._engine.cancel(future)
        return future

    def _finish(self, claim: Claim, image: ImageSpec, future: Future[Rendered]) -> None:
        """Wait for the picture, compare what entered the encoder with the lock, and hand the picture to a publisher."""
        try:
            rendered = checked(self._result(claim, future), image, claim.lock)
        except (RenderCanceled, Unavailable) as error:
            self._settle(claim, "image handed back", lambda: self._ledger.release(claim, self.name), str(error))
        except Exception as error:  # noqa: BLE001 - one image's failure must not stop the others
            self._fail(claim, error)
        else:
            self._unpublished.take(rendered.pixels.nbytes)
            self._publishers.submit(self._publish, claim, image, rendered)

    def _result(self, claim: Claim, future: Future[Rendered]) -> Rendered:
        """Wait for a render; of one that is followed, tell twice a second how far it is, and show it to who looks."""
        followed = self._progress.pop(claim.member, None)
        while followed is not None and not future.done():
            with suppress(TimeoutError):
                return future.result(TELL_EVERY_S)
            with suppress(Unavailable):
                if self._ledger.progress(claim, _story(followed)) == SOMEBODY_LOOKS:
                    self._show(claim, followed)
        return future.result()

    def _fit(self, claim: Claim, model: Model) -> None:
        """Have what previews need fitted to a checkpoint, before its first image takes the device."""
        with self._guard:
            if claim.lock.checkpoint.hash not in self._fitted and claim.spec.pack is None:
                fitting = self._backend.fitting()
                done = None if fitting is None else self._engine.submit(fitting, model, urgent=True)
                self._fitted[claim.lock.checkpoint.hash] = done

    def _show(self, claim: Claim, progress: Progress) -> None:
        """Show what a render sees now."""
        fitted = self._fitted.get(claim.lock.checkpoint.hash)
        if fitted is None or not fitted.done() or claim.spec.pack is not None:
            return
        try:
            seen = self._backend.preview(progress, fitted.result())
            if seen is not None:
                self._ledger.show(claim, seen)
        except Exception as error:  # noqa: BLE001 - a picture is not to fail for its preview
            log.warning("no preview", job=claim.job, index=claim.index, error=repr(error))

    def _publish(self, claim: Claim, image: ImageSpec, rendered: Rendered) -> None:
        """Write the picture where (job, index) decides, then tell the ledger; hand it back if nobody listens."""
        cost = image.job.pixel_steps
        try:
            self._keep(claim, rendered)
            png = encode_png(np.asarray(rendered.pixels), self._backend.infotext(claim, image))
            key, content = image_key(claim.job, claim.index), content_id(image, claim.lock)
            patiently(lambda: self._store.put_once(key, png, "image/png", content))
            self._settle(claim, "image published", lambda: self._ledger.succeed(claim, self.name, cost))
            self._vitals.note_image(cost)
            self._backend.praise(claim)
        except (RenderCanceled, Unavailable) as error:
            self._settle(claim, "image handed back", lambda: self._ledger.release(claim, self.name), str(error))
        except Exception as error:  # noqa: BLE001 - one image's failure must not stop the others
            self._fail(claim, error)
        finally:
            self._unpublished.give(rendered.pixels.nbytes)

    def _keep(self, claim: Claim, rendered: Rendered) -> None:
        """Have the backend keep what a packing made, and tell how good it is."""
        if claim.spec.pack is None:
            return
        if not self._ledger.progress(claim, {"stage": "keeping"}):
            raise RenderCanceled("the claim was lost, or the job canceled, before the embedding was kept")
        story = patiently(lambda: self._backend.keep(claim, rendered))
        self._ledger.progress(claim, story)

    def _fail(self, claim: Claim, error: Exception) -> None:
        code = error.code if isinstance(error, FarmError) else RenderError.code
        message = str(error) or type(error).__name__
        self._vitals.note_error(f"{claim.member}: {message}")
        self._settle(claim, "image failed", lambda: self._ledger.fail(claim, self.name, code, message), message)
        with suppress(FarmError):
            self._backend.blame(claim)

    def _settle(self, claim: Claim, what: str, transition: Callable[[], bool], error: str | None = None) -> None:
        """Make a claim's last transition and forget it; if the ledger stays away, `reconcile` hands it back later."""
        bound = log.bind(job=claim.job, index=claim.index, worker=self.name)
        try:
            held = patiently(transition)
            bound.info(what, **({"error": error} if error else {}), **({} if held else {"claim": "lost before"}))
        except Unavailable as away:
            bound.warning("could not settle the claim", wanted=what, error=str(away))
        finally:
            self._forget(claim)

    def _forget(self, claim: Claim) -> None:
        with self._guard:
            self._claims.pop(claim.member, None)
            self._canceled.discard(claim.member)

    def reconcile(self) -> None:
        """Hand back claims in our name that we know nothing of, such as one whose answer was lost on the way.

        A claim must look strange twice, a sweep apart, for one just granted is not registered yet.
        """
        claimed = self._ledger.claims(self.name)
        with self._guard:
            strange = claimed - set(self._claims)
        for member in strange & self._strange:
            log.warning("claim handed back", claim=member, worker=self.name)
            self._ledger.disown(self.name, member)
        self._strange = strange

    # ---- control

    def cancel(self, member: str) -> None:
        """Stop rendering an image of a closed job; may be repeated."""
        with self._guard:
            held = self._claims.get(member)
            if held:
                self._canceled.add(member)
        if held:
            self._engine.cancel(held[1])

    def cancel_job(self, job: str) -> None:
        """Stop rendering all images of a closed job."""
        with self._guard:
            members = [member for member, (claim, _) in self._claims.items() if claim.job == job]
        for member in members:
            self.cancel(member)

    @property
    def in_flight(self) -> int:
        """How many claimed images are not settled yet."""
        with self._guard:
            return len(self._claims)

    def stop_claiming(self) -> None:
        """Take no more images."""
        self._draining.set()

    def go_on_claiming(self) -> None:
        """Take images again."""
        self._draining.clear()

    def hand_back(self, patience_s: float) -> None:
        """Stop rendering and give every unfinished image back to the queue.

        What the device does not let go of in `patience_s` seconds is given back all the same; nothing of it counts any more.
        """
        with self._guard:
            held = list(self._claims.values())
        for _claim, future in held:
            self._engine.cancel(future)
        until = time.monotonic() + patience_s
        while self.in_flight and time.monotonic() < until:
            time.sleep(0.02)
        with self._guard:
            held = list(self._claims.values())
        for claim, _future in held:
            with suppress(FarmError):
                self._ledger.release(claim, self.name)


def _not_again() -> None:
    """Ring nobody: the first call did."""
