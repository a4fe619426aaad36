"""Pack a prompt into an embedding: vectors found by gradient, so that a short prompt guides the model as a long one does.

Prompt distillation in the text encoder's input space (the vectors of textual inversion, arXiv:2208.01618; the target of
distillation instead of pictures): on latents of the long prompt's own trajectories, at every noise level, the model's
answer under `…, WORD` is pulled to its answer under `…, long prompt`. Weights are frozen; only the vectors move.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from latentfarm_shared.errors import RenderError
from latentfarm_shared.prompts.chunks import Chunk, chunk_prompt
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.records import EmbeddingRecord, Lock
from latentfarm_shared.specs import JobSpec, Pack
from torch import Tensor

from latentfarm_worker.checkpoint import Checkpoint
from latentfarm_worker.operations import (
    Conditioning,
    Decode,
    Denoise,
    Encode,
    Operation,
    Picture,
    Progress,
    Rendered,
    Side,
    Tune,
)
from latentfarm_worker.sampling.noise_model import Scaling

WORD = "packedword"
CONTEXTS = ("{}", "masterpiece, {}", "{}, high quality", "masterpiece, high quality, {}")
GUIDANCE = 7.0
LEVELS = 14  # noise levels of a trajectory
TRAIN_SEEDS, HELD_OUT_SEEDS = 40, 8
SEEDS_AT_ONCE = 4
BATCH = 8  # small and many steps: better than large ones in the same time
RATE = 0.35  # of the vocabulary's spread, for each step
NORM_WEIGHT = 0.02
LEAST_GAP = 1e-7
SHEET_COLUMNS, SHEET_CONTEXT = 4, 3
_ALL_SEEDS = TRAIN_SEEDS + HELD_OUT_SEEDS


@dataclass(frozen=True, eq=False)
class Moment:
    """One latent of a trajectory and what the model should answer: `latent, target: [4, h, w]`.

    `context` says which text the long prompt stands in; `gap` is how far off answers are
    without it, on average at this noise level.
    """

    latent: Tensor
    step: float
    context: int
    target: Tensor
    gap: float


class LiveBank:
    """Stands for the bank while vectors are trained: they keep their gradients."""

    def __init__(self, vectors: dict[str, Tensor]) -> None:
        self.vectors = vectors

    def rows(self, _record: EmbeddingRecord, encoder: str) -> Tensor:
        """Return `[vectors, width]` for one encoder."""
        return self.vectors[encoder]


@dataclass
class Tuner:
    """The state of one packing: moments to learn from, moments held out, vectors and their optimiser."""

    model: Checkpoint
    spec: JobSpec
    pack: Pack
    lock: Lock
    train: list[Moment] = field(default_factory=list)
    held_out: list[Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = self.model
        tokenizer = model.tokenizer
        self.generator = torch.Generator().manual_seed(self.spec.seed)
        self.edge = self.spec.height // 8, self.spec.width // 8
        self.bank = LiveBank(_start(model, self.spec.prompt, self.pack.vectors, self.generator))
        widths = {name: tensor.shape[1] for name, tensor in self.bank.vectors.items()}
        word = EmbeddingRecord(
            name=WORD, content_id="live", file_sha256="", vectors=self.pack.vectors, widths=widths, layout="packed"
        )
        matcher, known = NameMatcher(tokenizer, [word]), NameMatcher(tokenizer, self.lock.embeddings)
        self.short = [_single(chunk_prompt(text.format(WORD), tokenizer, matcher)) for text in CONTEXTS]
        self.long = [chunk_prompt(text.replace("{}", self.spec.prompt), tokenizer, known) for text in CONTEXTS]
        self.bare = [chunk_prompt(_without(text), tokenizer, known) for text in CONTEXTS]
        leaves = list(self.bank.vectors.values())
        self.norms = {name: float(table.norm(dim=1).mean()) for name, table in _tables(model).items()}
        spread = sum(float(table.std()) for table in _tables(model).values()) / len(leaves)
        self.rate = RATE * spread
        self.optimizer = torch.optim.Adam(leaves, lr=self.rate, betas=(0.9, 0.95))
        self.done, self.rows = 0, BATCH

    # ---- what the model should answer

    @torch.inference_mode()
    def observe(self, walk: Walk, into: list[Moment]) -> None:
        """Note what the model answers under the long prompt where a walk stands, and go one level on, guided by it."""
        every_long, every_bare = self.encoded(self.long), self.encoded(self.bare)
        contexts, scaling = [seed % len(CONTEXTS) for seed in walk.seeds], walk.scaling
        sides = [(every_long[c], every_bare[c], every_bare[0]) for c in contexts]
        clean = self._clean(walk, sides)
        wanted, without, unguided = clean[::3], clean[1::3], clean[2::3]
        apart = torch.stack([a - b for a, b in zip(wanted, without, strict=True)])
        gap = float(apart.square().mean() / scaling.gain**2)
        for latent, answer, context in zip(walk.latents, wanted, contexts, strict=True):
            target = (answer - scaling.keep * latent) / scaling.gain
            into.append(Moment((latent * scaling.shrink).clone(), scaling.step, context, target.clone(), gap))
        walk.step([self._guided(a, b) for a, b in zip(wanted, unguided, strict=True)])

    @torch.inference_mode()
    def draw(self, walk: Walk, conditioning: Conditioning) -> None:
        """Take a walk one level on, guided by a text."""
        (empty,) = self.encoded([self.bare[0]])
        clean = self._clean(walk, [(conditioning, empty)] * len(walk.seeds))
        walk.step([self._guided(a, b) for a, b in zip(clean[::2], clean[1::2], strict=True)])

    def _clean(self, walk: Walk, sides: Sequence[tuple[Conditioning, ...]]) -> list[Tensor]:
        """Return the clean latents the model sees under each side of each latent, in float32."""
        pairs = [(latent, side) for latent, some in zip(walk.latents, sides, strict=True) for side in some]
        return self.model.denoise([Denoise(x, walk.scaling, (Side(side, 1.0),), precise=True) for x, side in pairs])

    def _guided(self, under: Tensor, without: Tensor) -> Tensor:
        """Return where guidance leads: toward the prompt, or away from it if it is a negative one."""
        base, toward = (under, without) if self.pack.negative else (without, under)
        return base + GUIDANCE * (toward - base)

    def encoded(self, texts: Sequence[tuple[Chunk, ...]]) -> list[Conditioning]:
        """Encode texts as pictures do, cached."""
        return [answer[0] for answer in self.model.encode([Encode((text,), (1,)) for text in texts])]

    # ---- learning

    def learn(self) -> float:
        """Take one step on a batch of moments; return the share of the gap that is left open on it."""
        picks = torch.randperm(len(self.train), generator=self.generator)[:BATCH].tolist()
        moments = [self.train[i] for i in picks]
        for group in self.optimizer.param_groups:
            warm = min(1.0, (self.done + 1) / 20)
            group["lr"] = self.rate * warm * (0.51 + 0.49 * math.cos(math.pi * self.done / self.pack.steps))
        while True:
            try:
                return self._descend(moments)
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise
                self.rows //= 2

    def _descend(self, moments: Sequence[Moment]) -> float:
        """Take the step, its gradient summed over as many moments at once as fit into memory."""
        self.optimizer.zero_grad()
        total = 0.0
        with torch.enable_grad():
            for start in range(0, len(moments), self.rows):
                some = moments[start : start + self.rows]
                left = self._left_open(some) * (len(some) / len(moments))
                left.backward()
                total += float(left.detach())
            (NORM_WEIGHT * self._excess()).backward()
        self.optimizer.step()
        self.done += 1
        return total

    def _left_open(self, moments: Sequence[Moment]) -> Tensor:
        """Return the mean share of the gap between bare and long prompt that the vectors leave open."""
        contexts = sorted({m.context for m in moments})
        encoded = dict(zip(contexts, self._student(contexts), strict=True))
        answers = self.model.predict(
            torch.stack([m.latent for m in moments]),
            torch.tensor([m.step for m in moments]),
            [encoded[m.context] for m in moments],
        )
        targets = torch.stack([m.target for m in moments])
        gaps = torch.tensor([m.gap for m in moments], device=answers.device)
        return ((answers - targets).square().mean((1, 2, 3)) / gaps.clamp(min=1e-6)).mean()

    def _student(self, contexts: Sequence[int]) -> list[Conditioning]:
        return self.model.encode_live([self.short[c] for c in contexts], self.bank)

    @torch.no_grad()
    def text(self, chunks: tuple[Chunk, ...] | None) -> Conditioning:
        """Encode a text, or the short one with the vectors as they are."""
        if chunks is not None:
            return self.encoded([chunks])[0]
        return self._student([SHEET_CONTEXT])[0]

    def _excess(self) -> Tensor:
        """How far the vectors' norms are above the vocabulary's, so that the word can stand beside others."""
        parts = [
            (vectors.norm(dim=1) / self.norms[name] - 1).clamp(min=0).square().mean()
            for name, vectors in self.bank.vectors.items()
        ]
        return torch.stack(parts).mean()

    @torch.no_grad()
    def judge(self) -> float:
        """Return the share of the gap that the vectors close on held-out seeds: 1 is the long prompt, 0 is nothing."""
        shares = []
        for start in range(0, len(self.held_out), BATCH):
            some = self.held_out[start : start + BATCH]
            shares += [float(self._left_open(some))] * len(some)
        return 1 - sum(shares) / len(shares)


class Walk:
    """Euler's method on several latents at once, from noise of their seeds to a clean end."""

    def __init__(self, tuner: Tuner, seeds: Sequence[int]) -> None:
        """Stand at the highest noise level."""
        self._noise = tuner.model.noise
        self._sigmas = [*_levels(self._noise.sigma_max, self._noise.sigma_min), 0.0]
        starts = [torch.randn((4, *tuner.edge), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.seeds, self.latents = seeds, [start.to(tuner.model.device) * self._sigmas[0] for start in starts]
        self._at = 0

    @property
    def is_done(self) -> bool:
        """Whether the latents are clean."""
        return self._at == len(self._sigmas) - 1

    @property
    def scaling(self) -> Scaling:
        """How to ask the model where the walk stands."""
        return self._noise.at_sigma(self._sigmas[self._at])

    def step(self, guided: Sequence[Tensor]) -> None:
        """Go one level down, toward `guided`."""
        ratio = self._sigmas[self._at + 1] / self._sigmas[self._at]
        self.latents = [g + (x - g) * ratio for x, g in zip(self.latents, guided, strict=True)]
        self._at += 1


def _levels(high: float, low: float) -> list[float]:
    """Return noise levels, evenly spaced as Karras et al. do (arXiv:2206.00364, rho 7)."""
    ramp = torch.linspace(0, 1, LEVELS)
    first, last = high ** (1 / 7), max(low, 0.05) ** (1 / 7)
    return [float((first + r * (last - first)) ** 7) for r in ramp]


def _without(context: str) -> str:
    return context.format("").strip(", ")


def _single(chunks: tuple[Chunk, ...]) -> Chunk:
    (chunk,) = chunks
    return chunk


def _tables(model: Checkpoint) -> dict[str, Tensor]:
    return {e.name: e.token_table().detach().float() for e in model.encoders}


def _start(model: Checkpoint, prompt: str, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Start from the long prompt's own words, spread evenly over as many vectors as wanted, slightly disturbed."""
    words = [token for token in model.tokenizer.encode(prompt) if token != model.tokenizer.comma_id] or [0]
    vectors = {}
    for name, table in _tables(model).items():
        places = torch.linspace(0, len(words) - 1, count).round().long()
        start = table[[words[place] for place in places]].clone()
        start += 0.1 * float(table.std()) * torch.randn(start.shape, generator=generator).to(start)
        vectors[name] = start.requires_grad_()
    return vectors


# ---- as a render


@dataclass(frozen=True, eq=False)
class Packed(Rendered):
    """A packed prompt: a sheet of pictures without, with it and with the long prompt, its vectors, and how good they are.

    `quality` is the share of the way from no word to the long prompt, on held-out seeds; 1 is the long prompt.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    quality: float = 0.0


def pack_prompt(
    spec: JobSpec, pack: Pack, lock: Lock, model: Checkpoint, progress: Progress
) -> Generator[Operation, Any, Rendered]:
    """Pack a job's prompt into vectors, in short pieces of work between which other images have their turn.

    Raises:
        RenderError: the prompt says nothing to the model, so that there is nothing to pack.
    """
    tuner = yield Tune(lambda: Tuner(model, spec, pack, lock))
    progress.begin("collecting", TRAIN_SEEDS + HELD_OUT_SEEDS)
    first = spec.seed * 1000
    for moments, seeds in ((tuner.train, range(TRAIN_SEEDS)), (tuner.held_out, range(TRAIN_SEEDS, _ALL_SEEDS))):
        for start in range(seeds.start, seeds.stop, SEEDS_AT_ONCE):
            walk = Walk(tuner, [first + seed for seed in range(start, start + SEEDS_AT_ONCE)])
            while not walk.is_done:
                yield Tune(partial(tuner.observe, walk, moments))
            progress.step += len(walk.seeds)
    if max(moment.gap for moment in tuner.train) < LEAST_GAP:
        raise RenderError("the prompt changes nothing about the model's answers, so there is nothing to pack")
    progress.begin("learning", pack.steps)
    for _ in range(pack.steps):
        progress.score = yield Tune(tuner.learn)
        progress.step += 1
    quality: float = yield Tune(tuner.judge)
    progress.begin("drawing", 0)
    sheet = yield from _sheet(tuner)
    applied = frozenset(name for c in tuner.encoded(tuner.long) for name in c.applied)
    vectors = {name: v.detach().clone() for name, v in tuner.bank.vectors.items()}
    return Packed(sheet, applied, applied, vectors, quality)


def _sheet(tuner: Tuner) -> Generator[Operation, Any, Tensor]:
    """Draw held-out seeds without the word, with it and with the long prompt; a row each, `[H, W, 3]`."""
    seeds = [tuner.spec.seed * 1000 + _ALL_SEEDS + number for number in range(SHEET_COLUMNS)]
    rows = []
    for text in (tuner.bare[SHEET_CONTEXT], None, tuner.long[SHEET_CONTEXT]):
        conditioning = yield Tune(partial(tuner.text, text))
        walk = Walk(tuner, seeds)
        while not walk.is_done:
            yield Tune(partial(tuner.draw, walk, conditioning))
        pictures = []
        for latent in walk.latents:
            picture: Picture = yield Decode(latent)
            pictures.append(picture.pixels)
        rows.append(torch.cat(pictures, 1))
    return torch.cat(rows, 0).contiguous()
