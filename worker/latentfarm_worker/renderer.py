"""The offline twin of a worker: the same engine and renders, without Redis and S3."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from latentfarm_shared.checkpoints import describe_folder
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.sandbox import Sandbox
from latentfarm_shared.errors import MissingExtra
from latentfarm_shared.prompts.contract import settle
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord, Lock
from latentfarm_shared.specs import JobSpec, drawn_seeds, expand
from torch import Tensor

from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.checkpoint import Checkpoint
from latentfarm_worker.engine import Engine, Policy
from latentfarm_worker.loading import load_checkpoint
from latentfarm_worker.operations import Progress, Rendered
from latentfarm_worker.proof import checked
from latentfarm_worker.renders import RenderRequest, Watch, txt2img, unwatched
from latentfarm_worker.runtime import Runtime
from latentfarm_worker.torch_device import TorchDevice


class EmbeddingShelf:
    """Embedding files of this process, and the bank they are held in."""

    def __init__(self) -> None:
        self._files: dict[str, EmbeddingFile] = {}
        self.bank = EmbeddingBank(self)

    def put(self, file: EmbeddingFile, name: str | None = None) -> EmbeddingRecord:
        """Keep a file's tensors, ready to be applied."""
        self._files[file.content_id] = file
        record = file.record(name)
        self.bank.hold(record)
        return record

    def embedding_tensors(self, record: EmbeddingRecord) -> bytes:
        """Return the normalised safetensors of an embedding."""
        return self._files[record.content_id].normalised()


class Renderer:
    """Renders jobs in this process; embeddings are known by their files' stems.

    Use as a context, or call `close` when done:

        with Renderer("demo") as renderer:
            pictures = renderer.render("masterpiece, corneo_dva", seed=43, count=4)
    """

    def __init__(
        self, model: str | Path | Checkpoint = "demo", record: CheckpointRecord | None = None,
        shelf: EmbeddingShelf | None = None, *, runtime: Runtime | None = None, slots: int = 8, policy: Policy = "park",
    ) -> None:  # fmt: skip
        """Load a diffusers folder, `demo` for the one that comes along with its embeddings.

        A loaded checkpoint may be given with its record, and with the shelf its bank takes embeddings from.

        Raises:
            UnreadableFile: the folder is no checkpoint.
            MissingExtra: the demo checkpoint is not installed.
        """
        self._shelf, self._sandbox = shelf or EmbeddingShelf(), Sandbox()
        self._embeddings: dict[str, EmbeddingRecord] = {}
        if isinstance(model, Checkpoint):
            if record is None:
                raise TypeError("a loaded checkpoint comes with its record")
            self.checkpoint, self.record = model, record
        else:
            folder = demo_folder() if model == "demo" else Path(model)
            self.record = describe_folder(folder, folder.name if model != "demo" else "demo")
            self.checkpoint = load_checkpoint(self.record, folder, self._shelf.bank, runtime or Runtime())
            if model == "demo":
                for path in sorted((folder.parent / "embeddings").glob("*.pt")):
                    self.add_embedding(path)
        self.engine = Engine(slots=slots, policy=policy, device=TorchDevice(self.checkpoint.device))
        self.engine.start()

    def __enter__(self) -> Self:
        """Render inside."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Stop the engine."""
        self.close()

    def close(self) -> None:
        """Stop the engine; what is in flight is canceled."""
        self.engine.stop()
        self._sandbox.close()

    def add_embedding(
        self, source: Path | EmbeddingFile, name: str | None = None, *, allow_word: bool = False
    ) -> EmbeddingRecord:
        """Make an embedding usable by name; one that is a word of the vocabulary only if that is allowed.

        Raises:
            UnreadableFile: it is none.
        """
        file = source if isinstance(source, EmbeddingFile) else self._sandbox.read_one(source)
        record = self._shelf.put(file, name).model_copy(update={"allow_word": allow_word})
        self.know(record)
        return record

    @property
    def embeddings(self) -> tuple[EmbeddingRecord, ...]:
        """Every embedding known by name."""
        return tuple(self._embeddings.values())

    def know(self, record: EmbeddingRecord) -> None:
        """Make an embedding of the shelf usable by name."""
        self._embeddings[record.name.lower()] = record

    def freeze(self, spec: JobSpec) -> tuple[JobSpec, Lock]:
        """Settle a job's prompts and embeddings as a submission does.

        Raises:
            UsageError: an embedding that is missing, misspelt or does not fit.
        """
        settled = settle(spec, self.record, self._embeddings, self.checkpoint.tokenizer)
        final = JobSpec.check(settled.spec.model_dump() | drawn_seeds(spec, secrets.randbelow))
        return final, Lock(checkpoint=self.record, embeddings=settled.embeddings)

    def submit(
        self, spec: JobSpec, lock: Lock, index: int = 0, *, urgent: bool = False,
        watch: Watch = unwatched, progress: Progress | None = None, deadline: float | None = None,
    ) -> Future[Rendered]:  # fmt: skip
        """Put one image of a job in flight; `progress` is kept up to date while it is rendered."""
        request = RenderRequest.build(
            expand(spec, index), lock, self.checkpoint.tokenizer, watch, progress or Progress()
        )
        render = txt2img(request, self.checkpoint)
        return self.engine.submit(render, self.checkpoint, urgent=urgent, deadline=deadline)

    @staticmethod
    def spec(prompt: str, **parameters: Any) -> JobSpec:
        """Return a job with a seed that is settled, 0 if none is given; parameters are JobSpec's."""
        return JobSpec.check({"prompt": prompt, "seed": 0} | parameters)

    def render(self, prompt: str, **parameters: Any) -> list[Tensor]:
        """Render the images of a job, in order, each `[H, W, 3]` uint8; parameters are JobSpec's.

        Raises:
            UsageError: the request is wrong.
            RenderError: an image failed.
        """
        spec, lock = self.freeze(self.spec(prompt, **parameters))
        futures = [self.submit(spec, lock, index) for index in range(spec.total)]
        images = [expand(spec, index) for index in range(spec.total)]
        return [checked(future.result(), image, lock).pixels for future, image in zip(futures, images, strict=True)]


def demo_folder() -> Path:
    """Return where the demo checkpoint is installed.

    Raises:
        MissingExtra: it is not.
    """
    try:
        from latentfarm_demo import CHECKPOINT  # noqa: PLC0415 - only in the extra
    except ImportError as error:
        raise MissingExtra("local", "the demo checkpoint") from error
    return CHECKPOINT


def locked(records: Sequence[EmbeddingRecord], checkpoint: CheckpointRecord) -> Lock:
    """Return a lock on every embedding that fits a checkpoint."""
    return Lock(checkpoint=checkpoint, embeddings=tuple(r for r in records if r.fits(checkpoint.widths)))
