"""A loaded checkpoint and what the engine asks of it, each in batches: encode, denoise, decode, encode pixels, enlarge."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from latentfarm_shared.errors import UnknownName
from latentfarm_shared.names import LATENT_UPSCALERS, PLAIN_UPSCALERS
from latentfarm_shared.prompts.chunks import Chunk
from latentfarm_shared.prompts.tokens import ClipTokenizer
from torch import Tensor, nn

from latentfarm_worker.bank import VectorSource
from latentfarm_worker.cache import ConditioningCache
from latentfarm_worker.operations import (
    Conditioning,
    Decode,
    Denoise,
    Encode,
    EncodePixels,
    Enlarge,
    Picture,
    Side,
)
from latentfarm_worker.prompts import LaidPart
from latentfarm_worker.runtime import Runtime
from latentfarm_worker.sampling.noise_model import NoiseModel
from latentfarm_worker.text import TextEncoder


class Upscaler(Protocol):
    """An upscaler model: `[B, 3, h, w]` in, larger out."""

    def __call__(self, tiles: Tensor) -> Tensor:
        """Enlarge."""
        ...


@dataclass(frozen=True, eq=False)
class Parts:
    """What a checkpoint is made of, on its device."""

    encoders: Sequence[TextEncoder]
    unet: Any
    vae: Any
    noise: NoiseModel
    tokenizer: ClipTokenizer
    family: str


class Checkpoint:
    """A Stable Diffusion checkpoint on one device. Used by the engine's thread alone, but for its plain attributes."""

    def __init__(
        self, name: str, parts: Parts, runtime: Runtime, upscalers: Mapping[str, Upscaler] | None = None
    ) -> None:
        """Take parts that are on the device already; `upscalers` are models by name."""
        self.name, self.tokenizer, self.family, self.noise = name, parts.tokenizer, parts.family, parts.noise
        self.device, self.is_precise = runtime.device, runtime.dtype == torch.float32
        self.cache = ConditioningCache()
        self._parts, self._runtime, self._upscalers = parts, runtime, {} if upscalers is None else upscalers
        self._precise: dict[str, Any] = {}
        self._tiled: dict[int, bool] = {}

    @property
    def encoders(self) -> Sequence[TextEncoder]:
        """Its text encoders."""
        return self._parts.encoders

    @property
    def bytes(self) -> int:
        """How much memory it takes: weights, copies in float32, and encoded texts."""
        modules = [*(encoder.module for encoder in self._parts.encoders), self._parts.unet, self._parts.vae]
        held = [*modules, *list(self._precise.values())]
        weights: int = sum(p.numel() * p.element_size() for module in held for p in module.parameters())
        return self.cache.bytes + weights

    def wants_zero(self, negative: LaidPart) -> bool:
        """Tell whether a negative prompt stands for zeros: an empty one does in SDXL."""
        return self.family == "sdxl" and negative.is_empty

    def require_upscaler(self, name: str) -> None:
        """Make sure an upscaler is there.

        Raises:
            UnknownName: it is not; with the nearest.
        """
        if name not in (*LATENT_UPSCALERS, *PLAIN_UPSCALERS) and name.lower() not in map(str.lower, self._upscalers):
            raise UnknownName.among("upscaler", name, (*LATENT_UPSCALERS, *PLAIN_UPSCALERS, *self._upscalers))

    # ---- text

    @torch.inference_mode()
    def encode(self, batch: Sequence[Encode]) -> list[tuple[Conditioning, ...]]:
        """Encode the texts of every timetable that is not cached, in one call, and prove their embeddings went in.

        Raises:
            EmbeddingNotApplied: an embedding did not enter an encoder.
        """
        found = {item.key: self.cache.get(item.key) for item in batch}
        missing = {item.key: item for item in batch if found[item.key] is None}
        if missing:
            for key, value in zip(missing, self._encode_all(list(missing.values())), strict=True):
                self.cache.put(key, value)
                found[key] = value
        return [result for item in batch if (result := found[item.key]) is not None]

    def _encode_all(self, batch: Sequence[Encode]) -> list[tuple[Conditioning, ...]]:
        """Encode every distinct chunk once for each clip skip, then put the texts together."""
        encoded = {skip: self._encode_chunks(batch, skip) for skip in {item.clip_skip for item in batch}}
        return [_assemble(item, encoded[item.clip_skip]) for item in batch]

    def _encode_chunks(self, batch: Sequence[Encode], skip: int) -> dict[tuple[object, ...], list[_EncodedChunk]]:
        """Return what each encoder makes of each chunk, by the chunk's key."""
        chunks = {chunk.key: chunk for item in batch if item.clip_skip == skip for text in item.texts for chunk in text}
        encoded: dict[tuple[object, ...], list[_EncodedChunk]] = {key: [] for key in chunks}
        for encoder in self._parts.encoders:
            for keys in self._runtime.fixed(list(chunks)):
                answer = encoder.encode([chunks[key] for key in keys], skip)
                for i, key in enumerate(dict.fromkeys(keys)):
                    pooled = None if answer.pooled is None else answer.pooled[i].float().to(self.device)
                    states = answer.states[i].float().to(self.device)
                    encoded[key].append(_EncodedChunk(states, pooled, answer.applied[i]))
        return encoded

    def encode_live(self, chunks: Sequence[Chunk], bank: VectorSource) -> list[Conditioning]:
        """Encode texts of one chunk each, uncached, in float32 and with gradients toward the vectors of `bank`."""
        answers = [encoder.encode(chunks, 1, bank) for encoder in self._precise_encoders()]
        tokens = torch.cat([answer.states.float().to(self.device) for answer in answers], dim=-1)
        pooled = answers[-1].pooled
        return [
            Conditioning(t, None if pooled is None else pooled[i].float().to(self.device)) for i, t in enumerate(tokens)
        ]

    # ---- UNet

    def predict(self, inputs: Tensor, steps: Tensor, conditionings: Sequence[Conditioning]) -> Tensor:
        """Return the UNet's bare answers, `[B, 4, h, w]` in float32, with gradients toward the conditionings.

        `inputs: [B, 4, h, w]` are scaled as the UNet wants them, `steps: [B]` are training steps.
        """
        unet = self._part("unet", precise=True)
        self._set_tiling(unet, tiling=False)
        tokens = torch.stack([c.tokens for c in conditionings])
        extra = self._size_conditioning(list(conditionings), inputs, torch.float32)
        asked = inputs.to(self.device)
        answer: Tensor = unet(asked, steps.to(self.device), tokens, added_cond_kwargs=extra, return_dict=False)[0]
        return answer

    @torch.inference_mode()
    def denoise(self, batch: Sequence[Denoise]) -> list[Tensor]:
        """Ask the UNet about all sides of all images, texts of one length in one call, and mix the answers."""
        latents = torch.stack([item.latent for item in batch])
        scalings = [item.scaling for item in batch]
        numbers = torch.tensor(
            [[s.shrink, s.keep, s.gain, s.step] for s in scalings], dtype=torch.float32, device=latents.device
        )
        shrink, keep, gain = (numbers[:, i].view(-1, 1, 1, 1) for i in range(3))
        sides = [(i, side) for i, item in enumerate(batch) for side in item.sides]
        owners = torch.tensor([owner for owner, _ in sides], device=latents.device)
        inputs = latents if all(s.shrink == 1 for s in scalings) else latents * shrink
        answers = self._ask(inputs, numbers[:, 3], sides, batch[0])
        clean = answers * gain[owners]
        clean += latents[owners] if all(s.keep == 1 for s in scalings) else latents[owners] * keep[owners]
        results = list(_mixed(clean, sides, batch))
        for i, item in enumerate(batch):
            if item.keeps_last:
                results[i] = torch.stack([results[i], clean[_bases(sides)[i]]])
        return results

    def _ask(self, inputs: Tensor, steps: Tensor, sides: Sequence[tuple[int, Side]], like: Denoise) -> Tensor:
        """Return the UNet's answer to every side, `[sides, 4, h, w]`, float32."""
        unet = self._part("unet", precise=like.precise)
        self._set_tiling(unet, tiling=like.tiling)
        dtype = torch.float32 if like.precise else self._runtime.dtype
        lengths: dict[int, list[int]] = {}
        for row, (_, side) in enumerate(sides):
            lengths.setdefault(len(side.conditioning.tokens), []).append(row)
        answers = torch.empty((len(sides), *inputs.shape[1:]), device=inputs.device)
        for rows in lengths.values():
            for some in self._runtime.fixed(rows):
                owners = [sides[row][0] for row in some]
                tokens = torch.stack([sides[row][1].conditioning.tokens for row in some])
                extra = self._size_conditioning([sides[row][1].conditioning for row in some], inputs, dtype)
                asked = self._runtime.laid_out(inputs[owners].to(dtype))
                answer = unet(asked, steps[owners], tokens.to(dtype), added_cond_kwargs=extra, return_dict=False)[0]
                answers[some] = answer.float()
        return answers

    @staticmethod
    def _size_conditioning(
        conditionings: list[Conditioning], inputs: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor] | None:
        """Return SDXL's pooled texts and sizes: original, crop and target, all of this pass."""
        if conditionings[0].pooled is None:
            return None
        high, wide = inputs.shape[-2] * 8, inputs.shape[-1] * 8
        sizes = torch.tensor([[high, wide, 0, 0, high, wide]], dtype=dtype, device=inputs.device)
        pooled = torch.stack([c.pooled for c in conditionings if c.pooled is not None])
        return {"text_embeds": pooled.to(dtype), "time_ids": sizes.repeat(len(conditionings), 1)}

    # ---- VAE

    @torch.inference_mode()
    def decode(self, batch: Sequence[Decode]) -> list[Picture]:
        """Decode latents, rounding as A1111 does (truncation)."""
        vae = self._part("vae", precise=batch[0].precise)
        self._set_tiling(vae, tiling=batch[0].tiling)
        pictures: list[Picture] = []
        for some in self._runtime.fixed(batch, size=1):
            latents = torch.stack([item.latent for item in some]) / vae.config.scaling_factor
            pixels = vae.decode(self._runtime.laid_out(latents.to(vae.dtype)), return_dict=False)[0].float()
            finite = pixels.isfinite().flatten(1).all(1).tolist()
            scaled = (((pixels + 1) / 2).clamp(0, 1) * 255).permute(0, 2, 3, 1).nan_to_num().to(torch.uint8).cpu()
            pictures += [Picture(p.contiguous(), ok) for p, ok in zip(scaled, finite, strict=True)]
        return pictures

    @torch.inference_mode()
    def encode_pixels(self, batch: Sequence[EncodePixels]) -> list[Tensor]:
        """Encode pictures to latents, the sample from the posterior that their noise picks."""
        vae = self._part("vae", precise=batch[0].precise)
        self._set_tiling(vae, tiling=batch[0].tiling)
        latents: list[Tensor] = []
        for some in self._runtime.fixed(batch, size=1):
            pixels = torch.stack([item.pixels for item in some]).to(self.device).permute(0, 3, 1, 2).float()
            asked = self._runtime.laid_out((pixels / 255 * 2 - 1).to(vae.dtype))
            posterior = vae.encode(asked, return_dict=False)[0]
            noise = torch.stack([item.noise for item in some]).to(self.device)
            latents += list((posterior.mean.float() + posterior.std.float() * noise) * vae.config.scaling_factor)
        return latents

    @torch.inference_mode()
    def enlarge(self, batch: Sequence[Enlarge]) -> list[Tensor]:
        """Run an upscaler model over tiles."""
        model = self._upscalers[batch[0].upscaler]
        enlarged: list[Tensor] = []
        for some in self._runtime.fixed(batch, size=1):
            enlarged += list(model(torch.stack([item.tile for item in some]).to(self.device)).float().cpu())
        return enlarged

    # ---- modules

    def _part(self, name: str, *, precise: bool) -> Any:
        """Return a module, or its copy in float32, which is made when first needed."""
        module = getattr(self._parts, name)
        if not precise or self.is_precise:
            return module
        if name not in self._precise:
            original = getattr(module, "_orig_mod", module)  # not compiled: it is used too seldom to pay
            self._precise[name] = copy.deepcopy(original).float()
            self._tiled[id(self._precise[name])] = self._tiled.get(id(module), False)
        return self._precise[name]

    def _precise_encoders(self) -> Sequence[TextEncoder]:
        """Return the text encoders in float32, copied when first needed: gradients underflow in float16."""
        if self.is_precise:
            return self._parts.encoders
        for encoder in self._parts.encoders:
            if encoder.name not in self._precise:
                self._precise[encoder.name] = copy.deepcopy(encoder.module).float()
        return [encoder.around(self._precise[encoder.name]) for encoder in self._parts.encoders]

    def _set_tiling(self, module: nn.Module, *, tiling: bool) -> None:
        """Let convolutions wrap around, so that pictures tile (A1111's Tiling)."""
        if self._tiled.get(id(module), False) == tiling:
            return
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.padding_mode = "circular" if tiling else "zeros"
        self._tiled[id(module)] = tiling


@dataclass(frozen=True, eq=False)
class _EncodedChunk:
    states: Tensor
    pooled: Tensor | None
    applied: frozenset[str]


def _assemble(item: Encode, encoded: dict[tuple[object, ...], list[_EncodedChunk]]) -> tuple[Conditioning, ...]:
    """Put texts together from their chunks: weigh each encoder's states, join the encoders, then the chunks.

    The pooled vector is that of the last encoder's first chunk, unweighted.
    """
    columns: list[Tensor] = []
    for number in range(len(item.texts[0])):
        column = [text[number] for text in item.texts]
        weights = torch.tensor([chunk.weights for chunk in column])
        encoders = zip(*(encoded[chunk.key] for chunk in column), strict=True)
        weighed = [
            emphasise(torch.stack([e.states for e in found]), weights, item.emphasis, item.counts) for found in encoders
        ]
        columns.append(torch.cat(weighed, dim=-1))
    joined = torch.cat(columns, dim=1)
    results = []
    for text, tokens in zip(item.texts, joined, strict=True):
        applied = frozenset(name for chunk in text for e in encoded[chunk.key] for name in e.applied)
        pooled = encoded[text[0].key][-1].pooled
        result = Conditioning(tokens, pooled, applied)
        results.append(_zeros_like(result) if item.zero else result)
    return tuple(results)


def _zeros_like(conditioning: Conditioning) -> Conditioning:
    pooled = None if conditioning.pooled is None else torch.zeros_like(conditioning.pooled)
    return Conditioning(torch.zeros_like(conditioning.tokens), pooled, conditioning.applied)


def emphasise(states: Tensor, weights: Tensor, mode: str, counts: Sequence[int] = ()) -> Tensor:
    """Weigh `states: [texts, 77, width]` by `weights: [texts, 77]` in one of A1111's modes.

    Original restores the mean over all texts, each counted so often as `counts` says; No norm does not; Ignore and
    None weigh nothing.
    """
    if mode in ("Ignore", "None") or bool((weights == 1).all()):
        return states
    weighted = states * weights[..., None].to(states.device)
    if mode != "Original":
        return weighted
    if len(set(counts)) < 2:
        return weighted * (states.mean() / weighted.mean())
    shares = torch.tensor(counts, dtype=states.dtype, device=states.device)
    before, after = ((found.mean((1, 2)) * shares).sum() for found in (states, weighted))
    return weighted * (before / after)


def _bases(sides: Sequence[tuple[int, Side]]) -> list[int]:
    """Return for each image the row of its last side, which the others are seen from."""
    return list({owner: row for row, (owner, _) in enumerate(sides)}.values())


def _mixed(clean: Tensor, sides: Sequence[tuple[int, Side]], batch: Sequence[Denoise]) -> Tensor:
    """Mix `clean: [sides, 4, h, w]` to one latent an image: the last side's plus the others' differences to it."""
    bases = _bases(sides)
    mixed = clean[bases]
    others = [row for row in range(len(sides)) if row not in set(bases)]
    base = mixed
    for rows in _by_rank(others, sides):  # one side of each image at a time, so that sums have one order on any device
        owners = torch.tensor([sides[row][0] for row in rows], device=clean.device)
        shares = torch.tensor([sides[row][1].share for row in rows], device=clean.device).view(-1, 1, 1, 1)
        mixed = mixed.index_add(0, owners, (clean[rows] - base[owners]) * shares)
    return _rescaled(mixed, clean, sides, batch) if any(item.rescale for item in batch) else mixed


def _by_rank(rows: Sequence[int], sides: Sequence[tuple[int, Side]]) -> list[list[int]]:
    """Return rows by their place among their image's."""
    ranks: list[list[int]] = []
    seen: dict[int, int] = {}
    for row in rows:
        rank = seen.get(sides[row][0], 0)
        seen[sides[row][0]] = rank + 1
        if rank == len(ranks):
            ranks.append([])
        ranks[rank].append(row)
    return ranks


def _rescaled(mixed: Tensor, clean: Tensor, sides: Sequence[tuple[int, Side]], batch: Sequence[Denoise]) -> Tensor:
    """Pull the spread of each mix back toward that of its first positive side (arXiv:2305.08891, section 3.4)."""
    first = {owner: row for row, (owner, _) in reversed(list(enumerate(sides)))}
    positive = clean[[first[i] for i in range(len(batch))]]
    spread = positive.std((1, 2, 3), keepdim=True) / mixed.std((1, 2, 3), keepdim=True)
    share = torch.tensor([item.rescale for item in batch], device=mixed.device).view(-1, 1, 1, 1)
    return mixed * (share * spread + (1 - share))
