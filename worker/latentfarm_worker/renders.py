"""Renders, written to be read: generators that yield what they need from the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from latentfarm_shared.errors import BrokenPicture
from latentfarm_shared.names import LATENT_UPSCALERS, TRAITS
from latentfarm_shared.parameters import HiresFix
from latentfarm_shared.prompts.chunks import Chunk
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import ImageSpec, JobSpec
from torch import Tensor

from latentfarm_worker.guidance import Guidance
from latentfarm_worker.operations import (
    Conditioning,
    Decode,
    Denoise,
    Encode,
    EncodePixels,
    Operation,
    Picture,
    Progress,
    Render,
    Rendered,
)
from latentfarm_worker.prompts import LaidPart, LaidPrompts, PromptLayout, encode_part, encode_parts
from latentfarm_worker.sampling.dpm_solver import levels_asked
from latentfarm_worker.sampling.noise import ImageNoise, NoiseRecipe, TorchGenerator
from latentfarm_worker.sampling.noise_model import NoiseModel, Scaling, with_zero_terminal_snr
from latentfarm_worker.sampling.samplers import SAMPLERS, TIMESTEP_SAMPLERS
from latentfarm_worker.sampling.schedules import sigmas_for, timesteps_for
from latentfarm_worker.sampling.steps import Steps, TimestepWalk, Walk
from latentfarm_worker.upscaling import enlarge_latent, enlarge_pixels

LCM_STRIDE = 20
CHANNELS = 4


class RenderModel(Protocol):
    """What a render needs to know of its checkpoint."""

    noise: NoiseModel
    device: str
    family: str
    is_precise: bool

    def wants_zero(self, negative: LaidPart) -> bool:
        """Tell whether a negative prompt stands for zeros."""
        ...

    def require_upscaler(self, name: str) -> None:
        """Make sure an upscaler is there."""
        ...


LatentRender = Generator[Operation, Any, Tensor]
Watch = Callable[[str, Tensor], None]


def unwatched(_stage: str, _tensor: Tensor) -> None:
    """Show nobody."""


@dataclass(frozen=True, eq=False)
class RenderRequest:
    """Everything a render needs that is no device work: laid-out prompts and the image's parameters.

    `watch` is shown the latents of a hires fix as they come: first, upscaled, noise.
    """

    image: ImageSpec
    first: LaidPrompts
    hires: LaidPrompts | None
    empty: tuple[Chunk, ...]
    progress: Progress = field(default_factory=Progress)
    watch: Watch = unwatched

    @property
    def promised(self) -> frozenset[str]:
        """Content ids of the embeddings that the prompts mean, by where they are to be written."""
        return frozenset(_placed(self.first)) | (frozenset(_placed(self.hires)) if self.hires else frozenset())

    @classmethod
    def build(
        cls,
        image: ImageSpec,
        lock: Lock,
        tokenizer: ClipTokenizer,
        watch: Watch = unwatched,
        progress: Progress | None = None,
    ) -> RenderRequest:
        """Lay out the prompts, matched against the job's lock alone."""
        layout = PromptLayout(image.job, lock, tokenizer)
        hires = layout.hires_pass() if image.job.hires else None
        return cls(image, layout.first_pass(), hires, layout.empty(), progress or Progress(), watch)


def _placed(laid: LaidPrompts) -> Iterator[str]:
    for part in (*laid.positive, laid.negative):
        for text in part.texts:
            for chunk in text:
                yield from (placement.embedding.content_id for placement in chunk.placements)


def txt2img(request: RenderRequest, model: RenderModel) -> Render:
    """Render one image as A1111 does, hires fix included.

    A picture with values that are not finite, or all black, is made once more in float32.

    Raises:
        UnknownName: the hires pass asks for an upscaler that is not there.
        BrokenPicture: the picture is no better in float32.
    """
    tiling = request.image.job.tiling
    if request.hires is not None:
        model.require_upscaler(_hires(request).upscaler)
    for precise in (False, True):
        guidance = yield from _guidance(request, request.first, model, request.image.job.sampler)
        latent = yield from first_pass(request, guidance, model, precise=precise)
        applied = _applied(guidance)
        if request.hires is not None:
            sampler = _hires(request).sampler or request.image.job.sampler
            again = yield from _guidance(request, request.hires, model, sampler)
            latent = yield from hires_pass(request, again, latent, model, precise=precise)
            applied |= _applied(again)
        request.progress.begin("decoding", 0)
        picture: Picture = yield Decode(latent, tiling, precise)
        if _is_sound(picture):
            return Rendered(picture.pixels, applied, request.promised)
        if not (precise or model.is_precise) and bool(latent.isfinite().all()):
            picture = yield Decode(latent, tiling, precise=True)
            if _is_sound(picture):
                return Rendered(picture.pixels, applied, request.promised)
        if model.is_precise:
            break
    raise BrokenPicture("holds values that are not finite" if not picture.finite else "is all black")


def _is_sound(picture: Picture) -> bool:
    return picture.finite and bool(picture.pixels.any())


def _applied(guidance: Guidance) -> frozenset[str]:
    """Return the content ids of every embedding that entered an encoder for one pass."""
    sides = (*guidance.positive, guidance.negative)
    return frozenset(name for side in sides for c in side.conditionings for name in c.applied)


def _guidance(
    request: RenderRequest, laid: LaidPrompts, model: RenderModel, sampler: str
) -> Generator[Operation, Any, Guidance]:
    """Have the prompts of one pass encoded."""
    job = request.image.job
    request.progress.begin("encoding", 0)
    negative = yield from encode_part(laid.negative, job, zero=model.wants_zero(laid.negative))
    positive = yield from encode_parts(laid.positive, job)
    empty: Conditioning | None = None
    if job.options.pad_conds == "empty":
        (empty,) = yield Encode((request.empty,), clip_skip=job.clip_skip, emphasis=job.emphasis)
    renoises = sampler == "DDIM CFG++"
    return Guidance(positive, negative, job.cfg_scale, laid.calls, job.options, empty, renoises)


# ---- passes


def first_pass(
    request: RenderRequest, guidance: Guidance, model: RenderModel, *, precise: bool = False
) -> LatentRender:
    """Sample from the image's own noise; returns `latent: [4, H/8, W/8]`."""
    job = request.image.job
    noise = _noise(request.image, (CHANNELS, job.height // 8, job.width // 8), model.device)
    levels = noise_levels(model.noise, job.sampler, job)
    start = noise.initial()
    if TRAITS[job.sampler].kind == "timesteps":
        walk = TimestepWalk(timesteps_for(job.steps, job.options), levels.alphas_cumprod)
        steps = TIMESTEP_SAMPLERS[job.sampler](start, walk, noise, job.options)
    else:
        sigmas = sigmas_for(job.sampler, job.schedule, levels, job.steps, job.options, model.family)
        start = start * (math.sqrt(1 + sigmas[0] ** 2) if job.options.sgm_noise_multiplier else sigmas[0])
        noise.span(min(s for s in sigmas if s > 0), max(sigmas), levels_asked(job.sampler, sigmas))
        steps = SAMPLERS[job.sampler](start, Walk(sigmas, levels.sigma_min, levels.sigma_max), noise, job.options)
    asker = _Asker(request, guidance, levels, job.sampler, "first pass", precise)
    try:
        return (yield from asker.walk(steps))
    finally:
        noise.stop()


def hires_pass(
    request: RenderRequest, guidance: Guidance, latent: Tensor, model: RenderModel, *, precise: bool = False
) -> LatentRender:
    """Enlarge a latent and go on from fresh noise of the same seed; returns a latent of the hires size.

    Of a schedule of int(steps / strength) the last `steps` are walked, whatever the strength.
    """
    request.watch("first", latent)
    latent = yield from _enlarged(request, latent, precise=precise)
    request.watch("upscaled", latent)
    noise = _noise(request.image, (CHANNELS, latent.shape[1], latent.shape[2]), model.device)
    fresh = noise.initial()
    request.watch("noise", fresh)
    latent = yield from _resumed(request, guidance, model, (latent, fresh, noise), precise=precise)
    request.watch("latent", latent)
    return latent


def _resumed(
    request: RenderRequest,
    guidance: Guidance,
    model: RenderModel,
    start: tuple[Tensor, Tensor, ImageNoise],
    *,
    precise: bool,
) -> LatentRender:
    """Noise an enlarged latent and walk the end of a schedule."""
    job, hires = request.image.job, _hires(request)
    latent, fresh, noise = start
    if not hires.denoising_strength:
        return latent
    sampler, wanted = hires.sampler or job.sampler, hires.steps or job.steps
    total = int(wanted / min(hires.denoising_strength, 0.999))
    levels = noise_levels(model.noise, sampler, job)
    if TRAITS[sampler].kind == "timesteps":
        timesteps = timesteps_for(total, job.options)
        wanted = min(wanted, len(timesteps))
        alpha = float(levels.alphas_cumprod[timesteps[wanted - 1]])
        noised = math.sqrt(alpha) * latent + math.sqrt(1 - alpha) * fresh
        walk = TimestepWalk(timesteps[: max(wanted - 1, 1)], levels.alphas_cumprod, resumed=True)
        steps = TIMESTEP_SAMPLERS[sampler](noised, walk, noise, job.options)
    else:
        sigmas = sigmas_for(sampler, hires.schedule or job.schedule, levels, total, job.options, model.family)
        tail = sigmas[min(total - wanted, len(sigmas) - 2) :]  # some schedules are shorter than asked for
        noise.span(min(s for s in sigmas if s > 0), max(sigmas), levels_asked(sampler, tail))
        steps = SAMPLERS[sampler](latent + fresh * tail[0], Walk(tail, tail[-2], tail[0]), noise, job.options)
    asker = _Asker(request, guidance, levels, sampler, "hires pass", precise)
    try:
        return (yield from asker.walk(steps))
    finally:
        noise.stop()


def _hires(request: RenderRequest) -> HiresFix:
    if request.image.job.hires is None:
        raise ValueError("the job has no hires pass")
    return request.image.job.hires


def _enlarged(request: RenderRequest, latent: Tensor, *, precise: bool) -> LatentRender:
    """Enlarge the first pass to cover the hires size and crop it there, in the latent or by way of pixels.

    A first pass that is not finite stays so, for `txt2img` to notice.
    """
    job, hires = request.image.job, _hires(request)
    size = hires.target(job.width, job.height)
    request.progress.begin("upscaling", 0)
    if hires.upscaler in LATENT_UPSCALERS:
        large = enlarge_latent(latent, hires.upscaler, size)
    else:
        picture: Picture = yield Decode(latent, job.tiling, precise)
        pixels = yield from enlarge_pixels(picture.pixels, hires.upscaler, (size[0] // 8 * 8, size[1] // 8 * 8))
        shape = (CHANNELS, pixels.shape[0] // 8, pixels.shape[1] // 8)
        large = yield EncodePixels(pixels, TorchGenerator(request.image.seed).randn(shape), job.tiling, precise)
        large = large if picture.finite else large * math.nan
    wide, high = hires.crop(job.width, job.height)
    return large[
        :, high // 2 : large.shape[1] - (high + 1) // 2, wide // 2 : large.shape[2] - (wide + 1) // 2
    ].contiguous()


def _noise(image: ImageSpec, shape: tuple[int, int, int], device: str) -> ImageNoise:
    job = image.job
    recipe = NoiseRecipe(
        seed=image.seed,
        source=job.rng,
        variation_seed=image.variation_seed,
        variation_strength=job.variation_strength,
        resize_from=job.seed_resize,
        ensd=job.ensd,
    )
    return ImageNoise(recipe, shape, device)


def noise_levels(trained: NoiseModel, sampler: str, job: JobSpec) -> NoiseModel:
    """Return the noise levels as a job's options and sampler want them."""
    options, alphas = job.options, trained.alphas_cumprod
    if options.downcast_alphas:
        alphas = alphas.half()
    if options.zero_terminal_snr:
        alphas = with_zero_terminal_snr(alphas.float())
    stride = LCM_STRIDE if sampler == "LCM" else 1
    if alphas is trained.alphas_cumprod and stride == 1 and not options.round_timesteps:
        return trained
    return NoiseModel(alphas, trained.prediction, stride, options.round_timesteps)


@dataclass(frozen=True, eq=False)
class _Asker:
    """Asks the model on behalf of a sampler."""

    request: RenderRequest
    guidance: Guidance
    levels: NoiseModel
    sampler: str
    stage: str
    precise: bool

    def walk(self, steps: Steps) -> LatentRender:
        """Drive a sampler to its end; returns its last latent."""
        job = self.request.image.job
        self.request.progress.begin(self.stage, self.guidance.calls)
        call, answer = 0, None
        while True:
            try:
                latent, level = next(steps) if answer is None else steps.send(answer)
            except StopIteration as finished:
                last: Tensor = finished.value
                return last
            answer = yield Denoise(
                latent=latent,
                scaling=self._scaling(level),
                sides=self.guidance.sides(call, level),
                rescale=job.options.cfg_rescale,
                keeps_last=self.guidance.renoises,
                tiling=job.tiling,
                precise=self.precise,
            )
            self.request.progress.advance(self._clean(latent, answer))
            call += 1

    def _clean(self, latent: Tensor, answer: Tensor) -> Tensor:
        """Return what to show of a call: the clean latent; of timestep samplers, which are told the noise, what they had."""
        return latent if TRAITS[self.sampler].kind == "timesteps" else answer

    def _scaling(self, level: float) -> Scaling:
        if TRAITS[self.sampler].kind == "timesteps":
            return self.levels.at_step(level)
        return self.levels.at_sigma(level)
