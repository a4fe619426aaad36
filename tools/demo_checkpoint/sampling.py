"""Render many pictures with the worker's own code, in batches, for evaluation and for choosing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from latentfarm_shared.embeddings.files import EmbeddingFile, read_embedding
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord, Lock
from latentfarm_shared.specs import ImageSpec, JobSpec
from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.checkpoint import Checkpoint
from latentfarm_worker.operations import Decode, Denoise, Encode, Operation
from latentfarm_worker.renders import Render, RenderRequest, txt2img
from PIL import Image

BATCH = 16


@dataclass(frozen=True)
class Wish:
    """One picture to render."""

    prompt: str
    seed: int
    negative_prompt: str = ""
    cfg_scale: float = 7.0
    sampler: str = "Euler"
    steps: int = 20
    size: int = 128


@dataclass
class Studio:
    """A checkpoint folder and embedding files, ready to render."""

    folder: Path
    files: dict[str, EmbeddingFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bank = EmbeddingBank(self)
        record = CheckpointRecord(
            name="demo", family="demo", widths={"clip_l": 128}, prediction_type="epsilon", files=()
        )
        self.checkpoint = Checkpoint(record, self.folder, self.bank, "cpu")
        self.lock = Lock(checkpoint=record)

    def embedding_tensors(self, record: EmbeddingRecord) -> bytes:
        """Return the tensors of an added file; the bank asks for them."""
        return self.files[record.content_id].normalised()

    def add(self, path: Path) -> None:
        """Make an embedding usable by its file's stem."""
        file = read_embedding(path)
        self.files[file.content_id] = file
        record = file.record()
        self.bank.hold(record)
        self.lock = Lock(checkpoint=self.lock.checkpoint, embeddings=(*self.lock.embeddings, record))

    def render(self, wishes: Sequence[Wish], *, bfloat16: bool = True) -> list[Image.Image]:
        """Render the wishes in order, in batches; bfloat16 is twice as fast on a CPU that has it."""
        images: list[Image.Image] = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            for start in range(0, len(wishes), BATCH):
                images += self._render_batch(wishes[start : start + BATCH])
        return images

    def _render_batch(self, wishes: Sequence[Wish]) -> list[Image.Image]:
        renders = [self._start(wish) for wish in wishes]
        pending: list[Operation] = [next(render) for render in renders]
        pixels: dict[int, torch.Tensor] = {}
        while len(pixels) < len(renders):
            waiting = [i for i in range(len(renders)) if i not in pixels]
            kind = type(pending[waiting[0]])
            group = [i for i in waiting if type(pending[i]) is kind]
            for i, result in zip(group, self._execute([pending[i] for i in group]), strict=True):
                try:
                    pending[i] = renders[i].send(result)
                except StopIteration as finished:
                    pixels[i] = finished.value
        return [Image.fromarray(pixels[i].numpy()) for i in range(len(renders))]

    def _start(self, wish: Wish) -> Render:
        spec = JobSpec(
            prompt=wish.prompt,
            negative_prompt=wish.negative_prompt,
            cfg_scale=wish.cfg_scale,
            sampler=wish.sampler,
            steps=wish.steps,
            seed=wish.seed,
            width=wish.size,
            height=wish.size,
        )
        image = ImageSpec(index=0, seed=wish.seed, job=spec)
        return txt2img(RenderRequest.build(image, self.lock, self.checkpoint.tokenizer), self.checkpoint.noise)

    def _execute(self, group: Sequence[Operation]) -> Sequence[object]:
        if isinstance(group[0], Encode):
            return self.checkpoint.encode([item for item in group if isinstance(item, Encode)])
        if isinstance(group[0], Denoise):
            return self.checkpoint.denoise([item for item in group if isinstance(item, Denoise)])
        return self.checkpoint.decode([item for item in group if isinstance(item, Decode)])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay pictures of one size out in a grid."""
    edge = images[0].width + 4
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * edge, rows * edge), (60, 60, 60))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * edge + 2, number // columns * edge + 2))
    return sheet
