"""A loaded checkpoint and the three things the engine asks of it: encode, denoise, decode, each in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_shared.records import CheckpointRecord
from torch import Tensor
from transformers import CLIPTextModel

from latentfarm_worker.bank import EmbeddingBank
from latentfarm_worker.injection import Injection, injected
from latentfarm_worker.operations import Conditioning, Decode, Denoise, Encode
from latentfarm_worker.schedules import NoiseModel


class Model(Protocol):
    """What the engine needs of a checkpoint; the tests hand in a smaller one."""

    def encode(self, batch: Sequence[Encode]) -> list[Conditioning]:
        """Encode prompts."""
        ...

    def denoise(self, batch: Sequence[Denoise]) -> list[Tensor]:
        """Predict clean latents."""
        ...

    def decode(self, batch: Sequence[Decode]) -> list[Tensor]:
        """Turn latents into pixels."""
        ...


class Checkpoint:
    """Stable Diffusion 1's parts on one device. Used by the engine's thread alone."""

    def __init__(self, record: CheckpointRecord, folder: Path, bank: EmbeddingBank, device: str) -> None:
        """Load a fetched checkpoint. fp16 on CUDA (not measured on this project's machines), fp32 elsewhere."""
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self.record, self._bank, self._device, self._dtype = record, bank, device, dtype
        self.tokenizer = ClipTokenizer(folder / "tokenizer/vocab.json", folder / "tokenizer/merges.txt")
        load = _load_folder if record.layout == "diffusers" else _load_single_file
        self._text_encoder, self._unet, self._vae = (part.to(device).eval() for part in load(folder, dtype))
        alphas = DDPMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod
        self.noise = NoiseModel.from_alphas(alphas)
        self._encoder_name = next(iter(record.widths))

    @torch.inference_mode()
    def encode(self, batch: Sequence[Encode]) -> list[Conditioning]:
        """Encode the chunks of every prompt in one call, with their embeddings, and prove these went in.

        Raises:
            EmbeddingNotApplied: an embedding did not enter the encoder.
        """
        chunks = [chunk for item in batch for chunk in item.chunks]
        ids = torch.tensor([chunk.tokens for chunk in chunks], device=self._device)
        weights = torch.tensor([chunk.weights for chunk in chunks], device=self._device, dtype=self._dtype)
        injection = Injection([chunk.placements for chunk in chunks], self._bank, self._encoder_name)
        with injected(self._text_encoder.get_input_embeddings(), injection):
            states = self._encode_ids(ids, batch[0].clip_skip)
        injection.prove()
        weighted = _emphasise(states, weights)
        split = weighted.split([len(item.chunks) for item in batch])
        return [Conditioning(part.flatten(0, 1)) for part in split]

    def _encode_ids(self, ids: Tensor, clip_skip: int) -> Tensor:
        output = self._text_encoder(input_ids=ids, output_hidden_states=clip_skip > 1)
        if clip_skip == 1:
            last: Tensor = output.last_hidden_state
            return last
        skipped: Tensor = self._text_encoder.final_layer_norm(output.hidden_states[-clip_skip])
        return skipped

    @torch.inference_mode()
    def denoise(self, batch: Sequence[Denoise]) -> list[Tensor]:
        """Run the UNet once for the positive and negative side of every image, and guide."""
        latents = torch.stack([item.latent for item in batch]).to(self._device)
        sigmas = torch.tensor([item.sigma for item in batch], device=self._device)
        steps = torch.tensor([self.noise.step_at(item.sigma) for item in batch], device=self._device)
        positive = torch.stack([item.positive.tokens for item in batch])
        scaled = latents / (sigmas.view(-1, 1, 1, 1) ** 2 + 1).sqrt()
        if batch[0].cfg_scale == 1:
            guided = self._predict(scaled, steps, positive)
        else:
            negative = torch.stack([item.negative.tokens for item in batch])
            with_prompt, without = self._predict_both(scaled, steps, positive, negative)
            scale = torch.tensor([item.cfg_scale for item in batch], device=self._device).view(-1, 1, 1, 1)
            guided = without + scale * (with_prompt - without)
        denoised = self._to_clean(latents, guided, sigmas.view(-1, 1, 1, 1))
        return list(denoised.cpu())

    def _predict_both(self, scaled: Tensor, steps: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        if positive.shape != negative.shape:
            return self._predict(scaled, steps, positive), self._predict(scaled, steps, negative)
        both = self._predict(torch.cat([scaled] * 2), torch.cat([steps] * 2), torch.cat([positive, negative]))
        with_prompt, without = both.chunk(2)
        return with_prompt, without

    def _predict(self, scaled: Tensor, steps: Tensor, conditioning: Tensor) -> Tensor:
        predicted: Tensor = self._unet(scaled.to(self._dtype), steps, conditioning).sample
        return predicted.float()

    def _to_clean(self, latents: Tensor, predicted: Tensor, sigmas: Tensor) -> Tensor:
        if self.record.prediction_type == "v_prediction":
            scale = sigmas**2 + 1
            return latents / scale - predicted * sigmas / scale.sqrt()
        return latents - predicted * sigmas

    @torch.inference_mode()
    def decode(self, batch: Sequence[Decode]) -> list[Tensor]:
        """Decode latents to `[H, W, 3]` uint8, rounding as A1111 does (truncation)."""
        latents = torch.stack([item.latent for item in batch]).to(self._device, self._dtype)
        pixels = self._vae.decode(latents / self._vae.config.scaling_factor).sample.float()
        scaled = ((pixels + 1) / 2).clamp(0, 1) * 255
        return list(scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu())


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Load text encoder, UNet and VAE from a diffusers folder."""
    return (
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
        UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype),
        AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype),
    )


def _load_single_file(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Load the same from `model.safetensors` in the original layout, configured by the folder it lies in."""
    from diffusers import StableDiffusionPipeline  # noqa: PLC0415 - imports far more than the three parts

    pipeline = StableDiffusionPipeline.from_single_file(
        str(folder / "model.safetensors"),
        config=str(folder),
        torch_dtype=dtype,
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
    )
    return pipeline.text_encoder, pipeline.unet, pipeline.vae


def _emphasise(states: Tensor, weights: Tensor) -> Tensor:
    """Weigh `states: [chunks, 77, width]` by `weights: [chunks, 77]` and restore each chunk's mean (A1111's Original)."""
    weighted = states * weights[..., None]
    scale = states.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True)
    return torch.where((weights == 1).all(1)[:, None, None], states, weighted * scale)
