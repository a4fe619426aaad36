"""The real backend: checkpoints and embeddings in PyTorch's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from latentfarm_shared.embeddings.sandbox import Sandbox
from latentfarm_shared.errors import EmbeddingNotInLock, FarmError, InvalidField, RenderError, UsageError
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.intake import Intake
from latentfarm_shared.ledger import Claim, Ledger
from latentfarm_shared.library import EmbeddingLibrary
from latentfarm_shared.logs import log
from latentfarm_shared.prompts.contract import MAX_CHECKED, Contract, combination_misses
from latentfarm_shared.prompts.mentions import applied_embeddings
from latentfarm_shared.records import CheckpointRecord
from latentfarm_shared.registry import Registry
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import ImageSpec
from latentfarm_shared.storage import ObjectStore
from latentfarm_shared.vocabularies import Vocabularies

from latentfarm_worker import previews
from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.capacity import Capacity
from latentfarm_worker.checkpoint import Checkpoint
from latentfarm_worker.counts import Counts
from latentfarm_worker.device import Device
from latentfarm_worker.fetch import fetch_checkpoint
from latentfarm_worker.folder import FolderWatch
from latentfarm_worker.loading import load_checkpoint
from latentfarm_worker.memory import checkpoint_budget, engine_budget
from latentfarm_worker.operations import Model, Progress, Render, Rendered
from latentfarm_worker.packing import Packed, pack_prompt
from latentfarm_worker.packs import PackKeeper
from latentfarm_worker.patience import patiently
from latentfarm_worker.png import encode_png
from latentfarm_worker.renders import RenderRequest, txt2img
from latentfarm_worker.residents import Residents
from latentfarm_worker.runtime import Runtime
from latentfarm_worker.shelf import Shelf
from latentfarm_worker.torch_device import TorchDevice

LOOK_AT_FOLDER_S = 1.0
ENLARGED = 4  # how much a preview is, of a latent's size


class TorchBackend:
    """Holds checkpoints and embeddings warm on one device of PyTorch's."""

    def __init__(
        self, name: str, settings: Settings, ledger: Ledger, store: ObjectStore, on_progress: Callable[[], None]
    ) -> None:
        """Hold nothing yet; `name` is the worker's, and `on_progress` hears that a fetch goes on.

        Raises:
            InvalidField: there is no such device or folder.
        """
        _check_device(settings.device)
        if settings.embeddings_dir is not None and not settings.embeddings_dir.is_dir():
            raise InvalidField("embeddings-dir", f"{settings.embeddings_dir} is no folder")
        self._name, self._settings, self._ledger, self._on_progress = name, settings, ledger, on_progress
        self._worked: set[str] = set()
        self._registry = Registry(ledger.redis, store)
        self._library = EmbeddingLibrary(ledger, store)
        self._bank = EmbeddingBank(self._library, settings.embeddings_mb * 2**20)
        self._vocabularies = Vocabularies(self._registry, settings.cache)
        self._residents = Residents(self._bank, self._library, ledger, name)
        self._runtime = Runtime.from_settings(settings)
        self._served: dict[str, CheckpointRecord] = {}
        self._shelf = Shelf(checkpoint_budget(settings))
        self._contract: tuple[str, Contract] | None = None
        self._packs = PackKeeper(self._library)
        self.device: Device = TorchDevice(settings.device)
        costs = settings.cache / "costs" / f"{settings.device.replace(':', '-')}-{self._runtime.dtype}.json"
        self.capacity = Capacity(engine_budget(settings), self.device, costs)

    # ---- warm

    def checkpoints(self) -> Sequence[CheckpointRecord]:
        """Return the checkpoints registered on the farm."""
        return list(self._registry.checkpoints().values())

    def load(self, record: CheckpointRecord) -> None:
        """Load a checkpoint and every embedding that fits it."""
        with self._checkpoint(record):
            self._served[record.hash] = record
        try:
            self._residents.preload(served.widths for served in self._served.values())
        except FarmError as error:
            log.warning("embeddings come with the jobs that need them", error=str(error), worker=self._name)

    def is_warm(self, checkpoint_hash: str) -> bool:
        """Tell whether a checkpoint is in memory right now."""
        return checkpoint_hash in self._shelf

    @contextmanager
    def _checkpoint(self, record: CheckpointRecord) -> Iterator[Checkpoint]:
        """Hold a checkpoint, which is fetched and loaded if it is not in memory."""
        size = sum(file.size for file in record.files)
        with self._shelf.using(record.hash, lambda: self._load(record), size) as checkpoint:
            yield checkpoint

    def _load(self, record: CheckpointRecord) -> Checkpoint:
        folder = fetch_checkpoint(record, self._registry, self._settings.cache, on_progress=self._on_progress)
        return load_checkpoint(record, folder, self._bank, self._runtime, self._settings.upscalers)

    @contextmanager
    def holding(self, claim: Claim) -> Iterator[Model]:
        """Hold an image's checkpoint and embeddings."""
        with ExitStack() as held:
            checkpoint = held.enter_context(self._checkpoint(claim.lock.checkpoint))
            patiently(lambda: held.enter_context(self._bank.using(claim.lock.embeddings)))
            yield checkpoint

    # ---- work

    def render(self, claim: Claim, image: ImageSpec, model: Model, progress: Progress) -> Render:
        """Return the render of an image, or the packing of a prompt."""
        checkpoint = _checkpoint_of(model)
        self._refuse_combination(claim, image, checkpoint)
        if claim.spec.pack is not None:
            return pack_prompt(image.job, claim.spec.pack, claim.lock, checkpoint, progress)
        return txt2img(RenderRequest.build(image, claim.lock, checkpoint.tokenizer, progress=progress), checkpoint)

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
            known = self._library.visible(claim.lock.owner, at=claim.lock.frozen_at)
            held = self._contract = claim.job, Contract(claim.lock.checkpoint, known, checkpoint.tokenizer)
        return held[1]

    def fitting(self) -> Render | None:
        """Return what fits a map from latents to colours."""
        return previews.fitting()

    def preview(self, progress: Progress, fitted: Rendered) -> bytes | None:
        """Return what a render sees now, enlarged, as a PNG."""
        seen = previews.preview(progress, fitted.pixels)
        return None if seen is None else encode_png(seen.numpy().repeat(ENLARGED, 0).repeat(ENLARGED, 1), "")

    def keep(self, claim: Claim, rendered: Rendered) -> dict[str, float | str]:
        """Put a packed prompt into the library, in the name of the job's owner; tell how good it is."""
        if claim.spec.pack is None or not isinstance(rendered, Packed):
            raise RenderError("nobody asked for a packed prompt")
        record = self._packs.keep(claim.spec, claim.spec.pack, claim.lock.owner, rendered, claim.job)
        quality = round(rendered.quality, 4)
        return {"stage": "done", "name": record.name, "version": record.version, "quality": quality}

    def blame(self, claim: Claim) -> None:
        """Disable embeddings with which nothing ever worked."""
        records = {record.content_id: record for record in claim.lock.embeddings}
        for content_id in self._ledger.embeddings_failed(list(records)):
            record = records[content_id]
            reason = f"set aside: the first images with it all failed, the last was {claim.job}/{claim.index}"
            with suppress(UsageError):  # a person may have removed it meanwhile
                self._library.disable(record.name, owner=record.owner, reason=reason)
                log.warning("embedding set aside", embedding=record.name, job=claim.job, index=claim.index)

    def praise(self, claim: Claim) -> None:
        """Remember which embeddings worked."""
        fresh = {record.content_id for record in claim.lock.embeddings} - self._worked
        if fresh:
            self._ledger.embeddings_worked(sorted(fresh))
            self._worked |= fresh

    def infotext(self, claim: Claim, image: ImageSpec) -> str:
        """Return the parameters to write into a picture; a point of a sweep tells which embeddings it has."""
        used = None
        if image.varies:
            tokenizer = self._vocabularies.of(claim.lock.checkpoint)
            used = [applied.record for applied in applied_embeddings(image, claim.lock, tokenizer)]
        return format_infotext(image, claim.lock, used)

    def counts(self) -> Counts:
        """Return what is counted."""
        return Counts(self._shelf.loads, len(self._bank), *self._shelf.cache_counts())

    def duties(self) -> Sequence[tuple[str, float, Callable[[], None]]]:
        """Keep up with the library, and with the watched folder if there is one."""
        duties: list[tuple[str, float, Callable[[], None]]] = [("embeddings", 0.0, self._residents.follow)]
        if self._settings.embeddings_dir is not None:
            intake = Intake(self._library, self._registry, self._vocabularies, Sandbox(self._settings.caps))
            watch = FolderWatch(self._settings.embeddings_dir, intake)
            duties.append(("folder", LOOK_AT_FOLDER_S, watch.look))
        return duties


def _checkpoint_of(model: Model) -> Checkpoint:
    if not isinstance(model, Checkpoint):
        raise TypeError("this backend renders with its own checkpoints")
    return model


def _check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidField("device", f"{device!r}: PyTorch sees no CUDA device here")
    if device == "mps" and not torch.backends.mps.is_available():
        raise InvalidField("device", "'mps': PyTorch sees no Apple GPU here")
