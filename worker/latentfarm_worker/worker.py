"""What one worker process does: hold checkpoints and embeddings warm, claim images, render, publish."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import TypeVar

from latentfarm_shared.embeddings.sandbox import Sandbox
from latentfarm_shared.errors import EmbeddingNotInLock, FarmError, RenderCanceled, RenderError, Unavailable
from latentfarm_shared.images import content_id, image_key
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.intake import Intake
from latentfarm_shared.ledger import Claim, Ledger
from latentfarm_shared.ledger.ledger import LANES, queue_name
from latentfarm_shared.library import EmbeddingLibrary
from latentfarm_shared.logs import log
from latentfarm_shared.prompts.contract import MAX_CHECKED, Contract, combination_misses
from latentfarm_shared.prompts.mentions import applied_embeddings
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.registry import Registry
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import ImageSpec, Lane, expand
from latentfarm_shared.storage import ObjectStore
from latentfarm_shared.vocabularies import Vocabularies

from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.capacity import Capacity
from latentfarm_worker.checkpoint import Checkpoint
from latentfarm_worker.engine import Engine
from latentfarm_worker.fetch import fetch_checkpoint
from latentfarm_worker.loading import load_checkpoint
from latentfarm_worker.memory import checkpoint_budget, engine_budget
from latentfarm_worker.packing import Packed, pack_prompt
from latentfarm_worker.packs import PackKeeper
from latentfarm_worker.png import encode_png
from latentfarm_worker.proof import checked
from latentfarm_worker.renders import Progress, Render, Rendered, RenderRequest, txt2img
from latentfarm_worker.residents import Residents
from latentfarm_worker.room import Room
from latentfarm_worker.runtime import Runtime
from latentfarm_worker.shelf import Shelf
from latentfarm_worker.vitals import RESERVE, Vitals

PUBLISHERS = 4
TELL_EVERY_S = 1.0
PATIENCE_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0)

T = TypeVar("T")


def patiently(action: Callable[[], T]) -> T:
    """Do something that a service may refuse for a while; give up after about 40 s.

    Raises:
        Unavailable: it refused to the end.
    """
    for pause_s in PATIENCE_S:
        try:
            return action()
        except Unavailable as error:
            log.warning("will try again", error=str(error), in_s=pause_s)
            time.sleep(pause_s)
    return action()


def _story(progress: Progress) -> dict[str, float | str]:
    score = {} if progress.score is None else {"left_open": round(progress.score, 4)}
    return {"stage": progress.stage, "step": progress.step, "steps": progress.steps, **score}


def _end_process(error: BaseException) -> None:
    """End a process whose device can run nothing any more; its leases run out and its images run elsewhere."""
    log.error("the device is lost", error=repr(error))
    os._exit(1)


class Worker:
    """One process's share of the farm. `serve` is called by Celery's threads, one image at a time each."""

    def __init__(self, name: str, settings: Settings, ledger: Ledger, store: ObjectStore, vitals: Vitals) -> None:
        """Hold nothing yet; `start` lets it render."""
        self.name, self._settings, self._ledger, self._store, self._vitals = name, settings, ledger, store, vitals
        self.registry = Registry(ledger.redis, store)
        self.library = EmbeddingLibrary(ledger, store)
        self.bank = EmbeddingBank(self.library, settings.embeddings_mb * 2**20)
        self._vocabularies = Vocabularies(self.registry, settings.cache)
        self.residents = Residents(self.bank, self.library, ledger, name)
        self._runtime = Runtime.from_settings(settings)
        self._served: dict[str, CheckpointRecord] = {}
        self._shelf = Shelf(checkpoint_budget(settings))
        self._slots = threading.Semaphore(settings.slots)
        self._reserve = threading.Semaphore(RESERVE)
        self._unpublished = Room(settings.unpublished_mb * 2**20)
        self._claims: dict[str, tuple[Claim, Future[Rendered]]] = {}
        self._progress: dict[str, Progress] = {}
        self._contract: tuple[str, Contract] | None = None
        self._packs = PackKeeper(self.library)
        self._strange: set[str] = set()
        self._canceled: set[str] = set()
        self._guard = threading.Lock()
        self._draining = threading.Event()
        self._publishers = ThreadPoolExecutor(PUBLISHERS, "publish")
        costs = settings.cache / "costs" / f"{settings.device.replace(':', '-')}-{self._runtime.dtype}.json"
        capacity = Capacity(engine_budget(settings), settings.device, costs)
        self._engine = Engine(
            self._vitals.beat, slots=settings.slots, policy=settings.policy, capacity=capacity, on_fatal=_end_process
        )

    def start(self) -> None:
        """Start the engine."""
        self._engine.start()

    # ---- warm

    def load(self, record: CheckpointRecord) -> list[str]:
        """Load a checkpoint and every embedding that fits it; return the names of its queues, by urgency."""
        with self._checkpoint(record):
            self._served[record.hash] = record
        try:
            self.residents.preload(served.widths for served in self._served.values())
        except FarmError as error:
            log.warning("embeddings come with the jobs that need them", error=str(error), worker=self.name)
        self._vitals.note(self._settings.slots, self._shelf.loads, len(self.bank))
        log.info("checkpoint ready", checkpoint=record.name, embeddings=len(self.bank), worker=self.name)
        return [queue_name(lane, record.hash) for lane in LANES]

    def _checkpoint(self, record: CheckpointRecord) -> AbstractContextManager[Checkpoint]:
        """Hold a checkpoint, which is fetched and loaded if it is not in memory."""
        size = sum(file.size for file in record.files)
        return self._shelf.using(record.hash, lambda: self.load_checkpoint(record), size)

    def load_checkpoint(self, record: CheckpointRecord) -> Checkpoint:
        """Fetch and load a checkpoint; a simulated worker overrides this."""
        folder = fetch_checkpoint(record, self.registry, self._settings.cache, on_progress=self._vitals.progress)
        return load_checkpoint(record, folder, self.bank, self._runtime, self._settings.upscalers)

    def has(self, record: CheckpointRecord) -> bool:
        """Tell whether a checkpoint is served."""
        return record.hash in self._served

    def advertise(self) -> None:
        """Tell the farm which checkpoints are ready and consumed."""
        self._vitals.advertise(sorted(self._served))

    def intake(self) -> Intake:
        """Return the way in for embeddings that are found on this machine; they get the farm's names."""
        return Intake(self.library, self.registry, self._vocabularies, Sandbox(self._settings.caps))

    # ---- work

    def queues(self, lanes: Sequence[Lane]) -> list[str]:
        """Return the queues of some lanes this worker can serve, the most urgent first."""
        return [queue_name(lane, checkpoint) for lane in lanes for checkpoint in list(self._served)]

    def serve(self, ring_again: Callable[[], None], *, urgent: bool) -> None:
        """Render images as long as there are any and a slot is free; `ring_again` wakes another thread.

        An `urgent` wake-up, one of the interactive lane, finds room beside the slots.
        """
        more = True
        while more and not self._draining.is_set() and (permit := self._permit(urgent=urgent)):
            try:
                more = self._serve_one(self.queues(LANES if permit is self._slots else LANES[:1]), ring_again)
            finally:
                permit.release()

    def _permit(self, *, urgent: bool) -> threading.Semaphore | None:
        """Take a slot; when all are taken, an interactive wake-up may take from the reserve."""
        if self._slots.acquire(blocking=False):
            return self._slots
        return self._reserve if urgent and self._reserve.acquire(blocking=False) else None

    def _serve_one(self, queues: list[str], ring_again: Callable[[], None]) -> bool:
        """Claim, render and hand on one image; tell whether there was one."""
        claim = self._ledger.claim(self.name, queues)
        if claim is None:
            return False
        with self._guard:  # known from now on, though nothing is in flight yet
            self._claims[claim.member] = (claim, Future())
        with suppress(Unavailable):  # the sweeper rings within a second
            ring_again()
        with ExitStack() as held:
            future = self._render(claim, held)
            self._finish(claim, future)
        self._vitals.note_cache(*self._shelf.cache_counts())
        return True

    def _render(self, claim: Claim, held: ExitStack) -> Future[Rendered]:
        """Put the claimed image in flight; what cannot even start fails its future."""
        try:
            image = expand(claim.spec, claim.index)
            checkpoint = held.enter_context(self._checkpoint(claim.lock.checkpoint))
            patiently(lambda: held.enter_context(self.bank.using(claim.lock.embeddings)))
            self._refuse_combination(claim, image, checkpoint)
            render = self._render_of(claim, image, checkpoint)
            urgent = claim.spec.lane == "interactive" and claim.spec.pack is None
            future = self._engine.submit(render, checkpoint, urgent=urgent)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one image belongs to its future
            future = Future()
            future.set_exception(error)
        with self._guard:
            self._claims[claim.member] = (claim, future)
            canceled = claim.member in self._canceled
        if canceled:
            self._engine.cancel(future)
        return future

    def _render_of(self, claim: Claim, image: ImageSpec, checkpoint: Checkpoint) -> Render:
        """Return the render of an image, or the packing of a prompt, whose progress is told now and then."""
        pack = claim.spec.pack
        if pack is None:
            return txt2img(RenderRequest.build(image, claim.lock, checkpoint.tokenizer), checkpoint)
        progress = self._progress[claim.member] = Progress()
        return pack_prompt(image.job, pack, claim.lock, checkpoint, progress)

    def _refuse_combination(self, claim: Claim, image: ImageSpec, checkpoint: Checkpoint) -> None:
        """Check what submission left open: what the combined texts of a large sweep ask for.

        Raises:
            EmbeddingNotInLock: an embedding that the job does not hold.
        """
        if claim.spec.text_variants > MAX_CHECKED:
            missing = combination_misses(image, claim.lock, self._contract_of(claim, checkpoint))
            if missing and claim.spec.on_missing == "fail":
                raise EmbeddingNotInLock(missing[0])

    def _contract_of(self, claim: Claim, checkpoint: Checkpoint) -> Contract:
        """Return what a job could name when it was submitted, kept for its next image."""
        held = self._contract
        if held is None or held[0] != claim.job:
            known = self.library.visible(claim.lock.owner, at=claim.lock.frozen_at)
            held = self._contract = claim.job, Contract(claim.lock.checkpoint, known, checkpoint.tokenizer)
        return held[1]

    def _finish(self, claim: Claim, future: Future[Rendered]) -> None:
        """Wait for the picture, compare what entered the encoder with the lock, and hand the picture to a publisher."""
        try:
            rendered = checked(self._result(claim, future), expand(claim.spec, claim.index), claim.lock)
        except (RenderCanceled, Unavailable) as error:
            self._settle(claim, "image handed back", lambda: self._ledger.release(claim, self.name), str(error))
        except Exception as error:  # noqa: BLE001 - one image's failure must not stop the others
            self._fail(claim, error)
        else:
            self._unpublished.take(rendered.pixels.nbytes)
            self._publishers.submit(self._publish, claim, rendered)

    def _result(self, claim: Claim, future: Future[Rendered]) -> Rendered:
        """Wait for a render; of one that is followed, tell every second how far it is."""
        progress = self._progress.pop(claim.member, None)
        while progress is not None and not future.done():
            with suppress(TimeoutError):
                return future.result(TELL_EVERY_S)
            with suppress(Unavailable):
                self._ledger.progress(claim, _story(progress))
        return future.result()

    def _publish(self, claim: Claim, rendered: Rendered) -> None:
        """Write the picture where (job, index) decides, then tell the ledger; hand it back if nobody listens."""
        try:
            image = expand(claim.spec, claim.index)
            patiently(lambda: self._put(claim, image, rendered))
            self._settle(claim, "image published", lambda: self._ledger.succeed(claim, self.name))
        except Unavailable as error:
            self._settle(claim, "image handed back", lambda: self._ledger.release(claim, self.name), str(error))
        except Exception as error:  # noqa: BLE001 - one image's failure must not stop the others
            self._fail(claim, error)
        finally:
            self._unpublished.give(rendered.pixels.nbytes)

    def _put(self, claim: Claim, image: ImageSpec, rendered: Rendered) -> None:
        if isinstance(rendered, Packed):
            self._keep_packed(claim, rendered)
        tokenizer = self._vocabularies.of(claim.lock.checkpoint) if image.point else None
        used = None if tokenizer is None else [a.record for a in applied_embeddings(image, claim.lock, tokenizer)]
        png = encode_png(rendered.pixels, format_infotext(image, claim.lock, used))
        self._store.put_once(image_key(claim.job, claim.index), png, "image/png", content_id(image, claim.lock))

    def _keep_packed(self, claim: Claim, packed: Packed) -> None:
        """Put a packed prompt into the library, in the name of the job's owner, and say how good it is."""
        if claim.spec.pack is None:
            raise RenderError("nobody asked for a packed prompt")
        if not self._ledger.progress(claim, {"stage": "keeping"}):
            raise RenderCanceled("the claim was lost, or the job canceled, before the embedding was kept")
        record = self._packs.keep(claim.spec, claim.spec.pack, claim.lock.owner, packed, claim.job)
        story: dict[str, float | str] = {"stage": "done", "name": record.name, "version": record.version}
        self._ledger.progress(claim, story | {"quality": round(packed.quality, 4)})

    def _fail(self, claim: Claim, error: Exception) -> None:
        code = error.code if isinstance(error, FarmError) else RenderError.code
        message = str(error) or type(error).__name__
        self._settle(claim, "image failed", lambda: self._ledger.fail(claim, self.name, code, message), message)

    def _settle(self, claim: Claim, what: str, transition: Callable[[], bool], error: str | None = None) -> None:
        """Make a claim's last transition and forget it; if the ledger stays away, `reconcile` hands it back later."""
        bound = log.bind(job=claim.job, index=claim.index, worker=self.name)
        try:
            held = patiently(transition)
            bound.info(what, **({"error": error} if error else {}), **({} if held else {"claim": "lost before"}))
        except Unavailable as away:
            bound.warning("could not settle the claim", wanted=what, error=str(away))
        finally:
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
        """Stop rendering an image of a canceled job; may be repeated."""
        with self._guard:
            held = self._claims.get(member)
            if held:
                self._canceled.add(member)
        if held:
            self._engine.cancel(held[1])

    @property
    def in_flight(self) -> int:
        """How many claimed images are not settled yet."""
        with self._guard:
            return len(self._claims)

    def stop_claiming(self) -> None:
        """Take no more images."""
        self._draining.set()

    def hand_back(self) -> None:
        """Stop rendering and give every unfinished image back to the queue; what is rendered is still published."""
        with self._guard:
            held = list(self._claims.values())
        for _claim, future in held:
            self._engine.cancel(future)
