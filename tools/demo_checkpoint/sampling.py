"""Render many pictures with the worker's own code, in batches, for evaluation and for choosing."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from latentfarm_shared.embeddings.files import EmbeddingFile, read_embedding
from latentfarm_shared.records import CheckpointRecord, EmbeddingRecord, Lock
from latentfarm_shared.specs import ImageSpec, JobSpec
from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.checkpoint import Checkpoint
from latentfarm_worker.operations import Conditioning, Decode, Denoise, Encode, Operation
from latentfarm_worker.renders import Render, RenderRequest, txt2img
from latentfarm_worker.samplers import euler
from latentfarm_worker.schedules import NoiseModel, sigmas_for
from PIL import Image
from torch.nn import functional

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
    hires: bool = False


def hires_fix(request: RenderRequest, noise_model: NoiseModel, strength: float = 0.5) -> Render:
    """Render, double the latent's edges (bilinear), and go on from fresh noise over the last half of a schedule.

    A1111's latent hires fix: of `steps / strength` sigmas the last `steps` are walked. Returns pixels of twice the size.
    """
    job = request.image.job
    positive: Conditioning = yield Encode(request.positive, job.clip_skip)
    negative: Conditioning = yield Encode(request.negative, job.clip_skip)
    shape = (4, job.height // 8, job.width // 8)
    first = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(request.image.seed))
    sigmas = sigmas_for("Uniform", noise_model, job.steps)
    latent = yield from _walk(first * sigmas[0], sigmas, positive, negative, job.cfg_scale)
    large = functional.interpolate(latent[None], scale_factor=2, mode="bilinear", antialias=False)[0]
    again = torch.randn(large.shape, generator=torch.Generator("cpu").manual_seed(request.image.seed))
    tail = sigmas_for("Uniform", noise_model, int(job.steps / strength))[-job.steps - 1 :]
    latent = yield from _walk(large + again * tail[0], tail, positive, negative, job.cfg_scale)
    pixels: torch.Tensor = yield Decode(latent)
    return pixels


def _walk(
    latent: torch.Tensor, sigmas: list[float], positive: Conditioning, negative: Conditioning, cfg_scale: float
) -> Generator[Operation, Any, torch.Tensor]:
    steps = euler(latent, sigmas, lambda: torch.zeros(()))
    latent, sigma = next(steps)
    while True:
        denoised = yield Denoise(latent, sigma, positive, negative, cfg_scale)
        try:
            latent, sigma = steps.send(denoised)
        except StopIteration as finished:
            final: torch.Tensor = finished.value
            return final


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
        request = RenderRequest.build(image, self.lock, self.checkpoint.tokenizer)
        return (hires_fix if wish.hires else txt2img)(request, self.checkpoint.noise)

    def _execute(self, group: Sequence[Operation]) -> Sequence[object]:
        if isinstance(group[0], Encode):
            return self.checkpoint.encode([item for item in group if isinstance(item, Encode)])
        if isinstance(group[0], Denoise):
            return self.checkpoint.denoise([item for item in group if isinstance(item, Denoise)])
        return self.checkpoint.decode([item for item in group if isinstance(item, Decode)])


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay pictures of one size out in a grid."""
    edge = images[0].width + 4
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * edge, rows * edge), (60, 60, 60))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * edge + 2, number // columns * edge + 2))
    return sheet
