"""What one worker process does: hold checkpoints and embeddings warm, claim images, render, publish."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from latentfarm_shared.errors import EmbeddingNotApplied, FarmError, RenderCanceled, RenderError
from latentfarm_shared.images import content_id, image_key
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.ledger import Claim, Ledger
from latentfarm_shared.ledger.ledger import LANES, queue_name
from latentfarm_shared.logs import log
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.registry import Registry
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import ImageSpec, expand
from latentfarm_shared.storage import ObjectStore
from torch import Tensor

from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.checkpoint import Checkpoint
from latentfarm_worker.engine import Engine
from latentfarm_worker.fetch import fetch_checkpoint
from latentfarm_worker.png import encode_png
from latentfarm_worker.renders import RenderRequest, txt2img
from latentfarm_worker.vitals import Vitals

PUBLISHERS = 4


class Worker:
    """One process's share of the farm. `serve` is called by Celery's threads, one image at a time each."""

    def __init__(self, name: str, settings: Settings, ledger: Ledger, store: ObjectStore, vitals: Vitals) -> None:
        """Start the engine; no checkpoint is loaded yet."""
        self.name, self._settings, self._ledger, self._store, self._vitals = name, settings, ledger, store, vitals
        self.registry = Registry(ledger.redis, store)
        self.bank = EmbeddingBank(self.registry)
        self.loads = 0
        self._checkpoints: dict[str, Checkpoint] = {}
        self._slots = threading.Semaphore(settings.slots)
        self._unpublished = threading.Semaphore(2 * settings.slots)
        self._claims: dict[str, tuple[Claim, Future[Tensor]]] = {}
        self._guard = threading.Lock()
        self._draining = threading.Event()
        self._publishers = ThreadPoolExecutor(PUBLISHERS, "publish")
        self._engine = Engine(self._vitals.beat)
        self._engine.start()

    # ---- warm

    def load(self, record: CheckpointRecord) -> list[str]:
        """Load a checkpoint and every embedding that fits it; return the names of its queues, by urgency."""
        self._sign("loading")
        folder = fetch_checkpoint(record, self.registry, self._settings.cache)
        self._checkpoints[record.hash] = Checkpoint(record, folder, self.bank, self._settings.device)
        self.loads += 1
        for embedding in self.registry.embeddings().values():
            if embedding.fits(record.widths):
                self.bank.hold(embedding)
        self._sign("idle")
        self._vitals.advertise(sorted(self._checkpoints))
        log.info("checkpoint ready", checkpoint=record.name, embeddings=len(self.bank), worker=self.name)
        return [queue_name(lane, record.hash) for lane in LANES]

    def has(self, record: CheckpointRecord) -> bool:
        """Tell whether a checkpoint is loaded."""
        return record.hash in self._checkpoints

    def _sign(self, phase: str) -> None:
        self._vitals.update(phase, self._settings.slots, self.loads, len(self.bank))

    # ---- work

    @property
    def queues(self) -> list[str]:
        """The queues this worker can serve, the most urgent first."""
        return [queue_name(lane, checkpoint) for lane in LANES for checkpoint in self._checkpoints]

    def serve(self, ring_again: Callable[[], None]) -> int:
        """Render images as long as there are any and a slot is free; return how many."""
        served = 0
        while not self._draining.is_set() and self._slots.acquire(blocking=False):
            future = None
            try:
                claim = self._ledger.claim(self.name, self.queues)
                if claim is not None:
                    ring_again()
                    future = self._render(claim)
                    self._finish(claim, future)
            finally:
                self._slots.release()
            if claim is None:
                self._vitals.beat("idle") if not self._claims else None
                break
            served += 1
        return served

    def _render(self, claim: Claim) -> Future[Tensor]:
        """Put the claimed image in flight; what cannot even start fails its future."""
        try:
            image = expand(claim.spec, claim.index)
            checkpoint = self._checkpoints[claim.lock.checkpoint.hash]
            for embedding in claim.lock.embeddings:
                self.bank.hold(embedding)
            request = RenderRequest.build(image, claim.lock, checkpoint.tokenizer)
            missing = request.missing(claim.lock)
            if missing:
                raise EmbeddingNotApplied(f"the prompts place no vectors of {', '.join(missing)}")
            urgent = claim.spec.lane == "interactive"
            future = self._engine.submit(txt2img(request, checkpoint.noise), checkpoint, urgent=urgent)
        except FarmError as error:
            future = Future()
            future.set_exception(error)
        with self._guard:
            self._claims[claim.member] = (claim, future)
        return future

    def _finish(self, claim: Claim, future: Future[Tensor]) -> None:
        """Wait for the pixels and hand them to a publisher, or settle the claim without any."""
        bound = log.bind(job=claim.job, index=claim.index, worker=self.name)
        try:
            pixels = future.result()
        except RenderCanceled:
            self._forget(claim)
            settled = self._ledger.release(claim, self.name)
            bound.info("image handed back", held=settled)
        except Exception as error:  # noqa: BLE001 - one image's failure must not stop the others
            self._forget(claim)
            code = error.code if isinstance(error, FarmError) else RenderError.code
            self._ledger.fail(claim, self.name, code, str(error) or type(error).__name__)
            bound.warning("image failed", code=code, error=str(error))
        else:
            self._unpublished.acquire()
            self._publishers.submit(self._publish, claim, pixels)

    def _publish(self, claim: Claim, pixels: Tensor) -> None:
        """Write the picture where (job, index) decides, then tell the ledger."""
        bound = log.bind(job=claim.job, index=claim.index, worker=self.name)
        try:
            image = expand(claim.spec, claim.index)
            self._put(claim, image, pixels)
            if self._ledger.succeed(claim, self.name):
                bound.info("image published")
            else:
                bound.warning("image published, but the claim was lost to another worker")
        except FarmError as error:
            self._ledger.fail(claim, self.name, error.code, str(error))
            bound.warning("image not published", error=str(error))
        finally:
            self._forget(claim)
            self._unpublished.release()

    def _put(self, claim: Claim, image: ImageSpec, pixels: Tensor) -> None:
        png = encode_png(pixels, format_infotext(image, claim.lock))
        self._store.put_once(image_key(claim.job, claim.index), png, "image/png", content_id(image, claim.lock))

    def _forget(self, claim: Claim) -> None:
        with self._guard:
            self._claims.pop(claim.member, None)

    # ---- control

    def cancel(self, member: str) -> None:
        """Stop rendering an image of a canceled job."""
        with self._guard:
            held = self._claims.get(member)
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
