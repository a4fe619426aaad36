"""Load a checkpoint's parts onto a device: from a diffusers folder, or a single file in the original layout.

GPU paths (half precision, compilation, CUDA graphs, text encoders kept on the CPU) are written through library calls
and have not been measured on this project's machines, which have no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from latentfarm_shared.errors import UnreadableFile
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import CheckpointRecord

from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.checkpoint import Checkpoint, Parts
from latentfarm_worker.runtime import Runtime
from latentfarm_worker.sampling.noise_model import NoiseModel
from latentfarm_worker.text import EncoderTraits, TextEncoder
from latentfarm_worker.upscalers import UpscalerFolder

FULL_OPENCLIP_H = 24  # layers; diffusers' SD2 folders leave the last one out, which nobody uses


def load_checkpoint(
    record: CheckpointRecord, folder: Path, bank: EmbeddingBank, runtime: Runtime, upscalers: Path | None = None
) -> Checkpoint:
    """Load a fetched checkpoint; `upscalers` is a folder of upscaler models.

    Raises:
        UnreadableFile: its files are damaged.
    """
    try:
        tokenizer = ClipTokenizer(folder / "tokenizer/vocab.json", folder / "tokenizer/merges.txt")
        load = _load_folder if record.layout == "diffusers" else _load_single_file
        encoders, unet, vae = load(record, folder, runtime)
    except (ValueError, OSError, KeyError) as error:
        raise UnreadableFile(str(folder), f"cannot be loaded: {error}") from error
    noise = NoiseModel(_alphas(folder), record.prediction_type)
    parts = Parts(
        encoders=[
            TextEncoder(_placed_encoder(module, runtime), name, bank, traits)
            for module, (name, traits) in zip(encoders, encoder_traits(record), strict=True)
        ],
        unet=_compiled(_placed(unet, runtime, runtime.dtype), runtime),
        vae=_placed(vae, runtime, _vae_dtype(vae, runtime)),
        noise=noise,
        tokenizer=tokenizer,
        family=record.architecture,
    )
    return Checkpoint(record.hash, parts, runtime, UpscalerFolder(upscalers, runtime.device))


def encoder_traits(record: CheckpointRecord) -> list[tuple[str, EncoderTraits]]:
    """Return a checkpoint's encoders by name, in the order of its conditioning, with what sets each apart."""
    if record.architecture == "sdxl":
        first = EncoderTraits(layer=2, final_norm=False)
        return [("clip_l", first), ("clip_g", EncoderTraits(pads_with_end=False, layer=2, final_norm=False))]
    if record.architecture == "sd2":
        layer = 2 if record.layers >= FULL_OPENCLIP_H else 1
        return [("clip_h", EncoderTraits(pads_with_end=False, layer=layer))]
    return [(next(iter(record.widths)), EncoderTraits())]


def _alphas(folder: Path) -> torch.Tensor:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # noqa: PLC0415 - imports are most of a cold start

    alphas: torch.Tensor = DDPMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod
    return alphas.float()


def _load_folder(record: CheckpointRecord, folder: Path, runtime: Runtime) -> tuple[list[Any], Any, Any]:
    """Load text encoders, UNet and VAE from a diffusers folder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # noqa: PLC0415
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: PLC0415
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection  # noqa: PLC0415

    encoders: list[Any] = [CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=runtime.dtype)]
    if record.architecture == "sdxl":
        encoders.append(CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=runtime.dtype))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=runtime.dtype)
    return encoders, unet, AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=runtime.dtype)


def _load_single_file(record: CheckpointRecord, folder: Path, runtime: Runtime) -> tuple[list[Any], Any, Any]:
    """Load the same from `model.safetensors` in the original layout, configured by the folder it lies in."""
    import diffusers  # noqa: PLC0415 - a pipeline imports far more than the parts

    sdxl = record.architecture == "sdxl"
    pipeline_class = diffusers.StableDiffusionXLPipeline if sdxl else diffusers.StableDiffusionPipeline
    extra = {} if sdxl else {"safety_checker": None, "feature_extractor": None}
    pipeline = pipeline_class.from_single_file(
        str(folder / "model.safetensors"),
        config=str(folder),
        torch_dtype=runtime.dtype,
        local_files_only=True,
        **extra,
    )
    encoders = [pipeline.text_encoder, *([pipeline.text_encoder_2] if sdxl else [])]
    return encoders, pipeline.unet, pipeline.vae


def _placed(module: Any, runtime: Runtime, dtype: torch.dtype) -> Any:
    layout = torch.channels_last if runtime.channels_last else torch.preserve_format
    moved = module.to(runtime.device, memory_format=layout)
    return (moved if moved.dtype == dtype else moved.to(dtype)).eval().requires_grad_(requires_grad=False)


def _placed_encoder(module: Any, runtime: Runtime) -> Any:
    """Put a text encoder on the device, or leave it on the CPU, in float32, to save the device's memory."""
    device, dtype = ("cpu", torch.float32) if runtime.offload_text else (runtime.device, runtime.dtype)
    moved = module.to(device)
    return (moved if moved.dtype == dtype else moved.to(dtype)).eval().requires_grad_(requires_grad=False)


def _vae_dtype(vae: Any, runtime: Runtime) -> torch.dtype:
    """Return the VAE's number format: some overflow in float16 and say so (SDXL's)."""
    overflows = runtime.vae_dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    return torch.float32 if overflows else runtime.vae_dtype


def _compiled(unet: Any, runtime: Runtime) -> Any:
    """Compile the UNet if asked for; it then sees batches of one size, so that each shape is compiled once."""
    if runtime.compile_mode is None:
        return unet
    return torch.compile(unet, mode=runtime.compile_mode, dynamic=False)
