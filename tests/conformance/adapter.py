"""The product, as the conformance cases ask for it: every answer comes from the product's own modules."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toy_models  # type: ignore[import-not-found]
from latentfarm_shared.a1111 import spec_from_request
from latentfarm_shared.embeddings.sandbox import read_embedding
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.names import TRAITS
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import BlobFile, CheckpointRecord, Lock
from latentfarm_shared.specs import JobSpec, expand
from latentfarm_worker.checkpoint import Checkpoint, Parts
from latentfarm_worker.guidance import Guidance, Timed
from latentfarm_worker.operations import Conditioning, Encode, Rendered
from latentfarm_worker.prompts import LaidPart, PromptLayout
from latentfarm_worker.renderer import EmbeddingShelf, Renderer, locked
from latentfarm_worker.renders import RenderRequest, Watch, first_pass, noise_levels
from latentfarm_worker.runtime import Runtime
from latentfarm_worker.sampling.noise import ImageNoise, NoiseRecipe
from latentfarm_worker.sampling.noise_model import NoiseModel
from latentfarm_worker.sampling.schedules import sigmas_for, timesteps_for
from latentfarm_worker.text import EncoderTraits, TextEncoder

WIDTHS = {"sd1": {"clip_l": 768}, "sd2": {"clip_h": 1024}, "sdxl": {"clip_l": 768, "clip_g": 1280}}


def setup(ctx: Any) -> None:
    """Build the toy checkpoints from the product's parts and read every embedding.

    On one thread, as the expected numbers were made: an adaptive sampler magnifies the last bit of a sum.
    """
    torch.set_num_threads(1)
    synthetic = Path(tempfile.mkdtemp())
    toy_models.write_synthetic_embeddings(synthetic)
    shelf = EmbeddingShelf()
    records = [
        shelf.put(
            read_embedding((synthetic if item["synthetic"] else Path(ctx.embeddings_dir)) / item["file"]), item["name"]
        )
        for item in ctx.embedding_files
    ]
    tokenizer = ClipTokenizer(Path(ctx.tokenizer_dir) / "vocab.json", Path(ctx.tokenizer_dir) / "merges.txt")
    unet, vae = toy_models.unet_sd1(), toy_models.vae_sd1()
    noise = NoiseModel(toy_models.alphas_cumprod())
    sdxl = EncoderTraits(layer=2, final_norm=False)
    encoders = {
        "sd1": [TextEncoder(toy_models.text_sd1(), "clip_l", shelf.bank, EncoderTraits())],
        "sd2": [TextEncoder(toy_models.text_sd2(), "clip_h", shelf.bank, EncoderTraits(pads_with_end=False, layer=2))],
        "sdxl": [
            TextEncoder(toy_models.text_sdxl_l(), "clip_l", shelf.bank, sdxl),
            TextEncoder(
                toy_models.text_sdxl_g(),
                "clip_g",
                shelf.bank,
                EncoderTraits(pads_with_end=False, layer=2, final_norm=False),
            ),
        ],
    }
    ctx.state["shelf"], ctx.state["records"] = shelf, records
    ctx.state["checkpoints"] = {
        family: Checkpoint(family, Parts(encoders[family], unet, vae, noise, tokenizer, family), Runtime())
        for family in encoders
    }


def record_of(family: str, name: str = "toy-sd15", weights: str = "") -> CheckpointRecord:
    """Describe a toy checkpoint."""
    file = BlobFile(path="unet/diffusion_pytorch_model.safetensors", sha256=weights.ljust(64, "0"), size=1)
    return CheckpointRecord(name=name, family=family, widths=WIDTHS[family], prediction_type="epsilon", files=(file,))


def encode(ctx: Any, case: dict[str, Any]) -> dict[str, Any]:
    asked = case["input"]
    family, which = asked["model"], asked["which"]
    checkpoint = ctx.state["checkpoints"][family]
    job = spec_from_request(asked["request"])
    layout = PromptLayout(job, locked(ctx.state["records"], record_of(family)), checkpoint.tokenizer)
    laid = layout.hires_pass() if which == "hr_prompt" else layout.first_pass()
    parts = (laid.negative,) if which == "negative_prompt" else laid.positive
    zero = which == "negative_prompt" and checkpoint.wants_zero(laid.negative)
    return {"parts": [_encoded(checkpoint, job, part, zero=zero) for part in parts]}


def _encoded(checkpoint: Checkpoint, job: JobSpec, part: LaidPart, *, zero: bool) -> dict[str, Any]:
    (conditionings,) = checkpoint.encode([Encode(part.texts, part.counts, job.clip_skip, job.emphasis, zero)])
    timed = Timed(part.weight, part.ends, tuple(conditionings[number] for number in part.which))
    entries = [
        {"end_at_step": end, "cond": c.tokens.numpy()} | ({} if c.pooled is None else {"pooled": c.pooled.numpy()})
        for end, c in zip(part.ends, timed.conditionings, strict=True)
    ]
    return {
        "weight": part.weight,
        "schedule": entries,
        "active_entry_per_call": [timed.index_at(call) for call in range(part.ends[-1])],
    }


def noise(ctx: Any, case: dict[str, Any]) -> Any:
    request = case["input"]["request"]
    settings = request["override_settings"]
    shape = (4, request["height"] // 8, request["width"] // 8)
    resize = (request["seed_resize_from_w"], request["seed_resize_from_h"])
    images = []
    for i, seed in enumerate(request["seeds"]):
        recipe = NoiseRecipe(
            seed,
            settings["randn_source"],
            (request["subseeds"] or request["seeds"])[i],
            request["subseed_strength"],
            resize if min(resize) > 0 else None,
            settings["eta_noise_seed_delta"],
        )
        source = ImageNoise(recipe, shape)
        images.append(torch.stack([source.initial(), *(source.fresh() for _ in range(request["calls"] - 1))]))
    return torch.stack(images, dim=1).numpy()


def brownian(ctx: Any, case: dict[str, Any]) -> Any:
    request = case["input"]["request"]
    shape = (4, request["height"] // 8, request["width"] // 8)
    images = []
    for seed in request["seeds"]:
        source = ImageNoise(NoiseRecipe(seed, request["override_settings"]["randn_source"]), shape)
        source.span(request["sigma_min"], request["sigma_max"])
        images.append(torch.stack([source.between(*pair) for pair in request["sigma_pairs"]]))
    return torch.stack(images, dim=1).numpy()


def sigmas(ctx: Any, case: dict[str, Any]) -> list[float]:
    request = case["input"]["request"]
    steps = request["steps"]
    job = spec_from_request(request | {"steps": 1})
    if TRAITS[job.sampler].kind == "timesteps":
        return [float(step) for step in timesteps_for(steps, job.options)]
    trained = ctx.state["checkpoints"]["sd1"].noise
    return sigmas_for(job.sampler, job.schedule, noise_levels(trained, job.sampler, job), steps, job.options)


def sample(ctx: Any, case: dict[str, Any]) -> dict[str, Any]:
    job = spec_from_request(case["input"]["request"])
    checkpoint, given = ctx.state["checkpoints"]["sd1"], case["input"]["conditioning"]
    with Renderer(checkpoint, record_of("sd1"), ctx.state["shelf"]) as renderer:
        futures, requests = [], []
        for index in range(job.count):
            request = RenderRequest.build(expand(job, index), Lock(checkpoint=record_of("sd1")), checkpoint.tokenizer)
            positive = tuple(_timed(part["weight"], part["schedule"]) for part in given["cond"][index])
            negative = _timed(1.0, given["uncond"][index])
            (empty,) = checkpoint.encode([Encode((request.empty,))])[0]
            guidance = Guidance(
                positive, negative, job.cfg_scale, request.first.calls, job.options, empty, job.sampler == "DDIM CFG++"
            )
            requests.append(request)
            futures.append(renderer.engine.submit(_latent_of(request, guidance, checkpoint), checkpoint))
        latents = [future.result().pixels for future in futures]
    calls = {request.progress.step for request in requests}
    return {"latent": torch.stack(latents).numpy(), "denoiser_calls": calls.pop() if len(calls) == 1 else 0}


def _latent_of(request: RenderRequest, guidance: Guidance, checkpoint: Checkpoint) -> Any:
    return Rendered((yield from first_pass(request, guidance, checkpoint)))


def _timed(weight: float, schedule: list[dict[str, Any]]) -> Timed:
    conditionings = tuple(
        Conditioning(torch.from_numpy(toy_models.conditioning(e["tag"], e.get("tokens", 77)))) for e in schedule
    )
    return Timed(weight, tuple(e["end_at_step"] for e in schedule), conditionings)


def hires(ctx: Any, case: dict[str, Any]) -> dict[str, Any]:
    stages: dict[str, dict[int, Any]] = {}
    _run(ctx, case["input"]["request"], record_of("sd1"), stages)
    return {name: np.stack([found[i].numpy() for i in sorted(found)]) for name, found in stages.items()}


def job(ctx: Any, case: dict[str, Any]) -> dict[str, Any]:
    record = record_of("sd1", case["input"]["model_name"], case["input"]["model_hash"])
    spec, lock, rendered = _run(ctx, case["input"]["request"], record, {})
    return {
        "images": [image.pixels.numpy() for image in rendered],
        "infotexts": [format_infotext(expand(spec, i), lock) for i in range(spec.count)],
    }


def _run(
    ctx: Any, request: dict[str, Any], record: CheckpointRecord, stages: dict[str, dict[int, Any]]
) -> tuple[JobSpec, Lock, list[Rendered]]:
    """Render a user's request with every embedding at hand, and keep what a watcher is shown."""
    with Renderer(ctx.state["checkpoints"]["sd1"], record, ctx.state["shelf"]) as renderer:
        for embedding in locked(ctx.state["records"], record).embeddings:
            renderer.know(embedding.model_copy(update={"allow_word": True}))  # in A1111 any name may be a word
        spec, lock = renderer.freeze(spec_from_request(request))
        futures = [renderer.submit(spec, lock, i, watch=_keeper(stages, i)) for i in range(spec.count)]
        return spec, lock, [future.result() for future in futures]


def _keeper(stages: dict[str, dict[int, Any]], index: int) -> Watch:
    def keep(name: str, tensor: torch.Tensor) -> None:
        stages.setdefault(name, {})[index] = tensor

    return keep
