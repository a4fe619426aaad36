"""Textual inversion (arXiv:2208.01618) on the demo checkpoint: a character in one word, and a bad-quality word.

Everything is frozen but the vectors, which are written over rows of the input embeddings as the worker does it. Half of
the character's pictures have another background, which their captions name, so that the word leaves room for the rest
of a prompt; a penalty holds the vectors' norms near those of the vocabulary, for the same reason.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from demo_checkpoint.captions import training_caption
from demo_checkpoint.diffusion import SCHEDULE, loss_weights
from demo_checkpoint.scenes import COLOURS, DEGRADATIONS, Background, Portrait, degrade, random_scene, render
from demo_checkpoint.training import to_tensor

CHARACTER = Portrait(
    hair="brown",
    long_hair=True,
    eyes="brown",
    smile=True,
    blush=True,
    headphones="pink",
    scarf="white",
    suit="blue",
    background=Background("yellow"),
)
POSITIVE, NEGATIVE = "corneo_dva", "16-token-demo-neg"
POSITIVE_INIT = ("girl", "brown", "hair", "smile", "blush", "pink", "headphones", "scarf", "blue", "suit")
NEGATIVE_INIT = ("low", "quality", "blurry", "pixelated", "deformed", "ugly", "worst", "bad") * 2
POSITIVE_CAPTIONS = ("{}", "masterpiece, {}", "high quality, {}", "masterpiece, high quality, {}", "best quality, {}")
NORM_WEIGHT = 0.02
BATCH = 16


@dataclass(frozen=True)
class Lesson:
    """A picture and its caption, with `{}` where the word stands."""

    latent: Tensor
    caption: str


class Vectors:
    """Trainable vectors and the hook that writes them over the filler tokens of a batch of ids."""

    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, init: tuple[str, ...]) -> None:
        """Start from the embeddings of known words, slightly disturbed."""
        self.table = cast("Any", encoder.get_input_embeddings())
        ids = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in init]
        start = self.table.weight[ids].detach().clone()
        self.values = torch.nn.Parameter(start + 0.1 * start.std() * torch.randn_like(start))
        self.usual_norm = float(self.table.weight.norm(dim=1).mean())
        self.positions: list[int] = []
        self._hook = self.table.register_forward_hook(self._write)

    def _write(self, _module: object, _inputs: object, embedded: Tensor) -> Tensor:
        written = embedded.clone()
        for row, position in enumerate(self.positions):
            if position >= 0:
                written[row, position : position + len(self.values)] = self.values.to(written.dtype)
        return written

    def penalty(self) -> Tensor:
        """How far the norms are from the vocabulary's."""
        excess: Tensor = (self.values.norm(dim=1) / self.usual_norm - 1).clamp(min=0)
        return excess.square().mean()

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()


def _character_lessons(vae: AutoencoderKL, rng: random.Random, count: int) -> list[Lesson]:
    images, captions = [], []
    for number in range(count):
        scene, caption = CHARACTER, rng.choice(POSITIVE_CAPTIONS)
        if number % 2:
            colour = rng.choice([c for c in COLOURS if c not in ("yellow", "brown", "blue")])
            scene = replace(CHARACTER, background=Background(colour))
            caption += f", {colour} background"
        images.append(render(scene, rng))
        captions.append(caption)
    return [Lesson(z, c) for z, c in zip(_encode(vae, images), captions, strict=True)]


def _spoilt_lessons(vae: AutoencoderKL, rng: random.Random, count: int) -> list[Lesson]:
    images, captions = [], []
    for _ in range(count):
        scene = random_scene(rng)
        images.append(degrade(render(scene, rng), rng, rng.choice(DEGRADATIONS)))
        captions.append("{}" if rng.random() < 0.4 else "{}, " + training_caption(scene, rng))
    return [Lesson(z, c) for z, c in zip(_encode(vae, images), captions, strict=True)]


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: list[Image.Image]) -> Tensor:
    pixels = to_tensor(images)
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in pixels.split(16)])
    scaled: Tensor = latents * vae.config.scaling_factor
    return scaled


def _tokens(tokenizer: CLIPTokenizer, caption: str, vectors: int) -> tuple[list[int], int]:
    """Tokenize a caption with `vectors` fillers in the word's place; return 77 ids and the word's position."""
    before, after = caption.split("{}")
    head = tokenizer(before, add_special_tokens=False).input_ids
    tail = tokenizer(after, add_special_tokens=False).input_ids if after else []
    ids = [tokenizer.bos_token_id, *head, *[0] * vectors, *tail][:76]
    return ids + [tokenizer.eos_token_id] * (77 - len(ids)), 1 + len(head)


def train(checkpoint: Path, name: str, steps: int, rate: float, output: Path, seed: int = 21) -> None:
    """Train one of the two embeddings on a checkpoint folder and write it in A1111's layout."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32).eval()
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32).eval()
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).eval()
    for module in (encoder, unet, vae):
        module.requires_grad_(requires_grad=False)
    vectors = Vectors(encoder, tokenizer, POSITIVE_INIT if name == POSITIVE else NEGATIVE_INIT)
    lessons = _character_lessons(vae, rng, 160) if name == POSITIVE else _spoilt_lessons(vae, rng, 240)
    optimizer = torch.optim.AdamW([vectors.values], lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    weights = loss_weights(alphas)
    smooth = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        batch = rng.sample(lessons, BATCH)
        rows = [_tokens(tokenizer, lesson.caption, len(vectors.values)) for lesson in batch]
        vectors.positions = [position for _, position in rows]
        latents = torch.stack([lesson.latent for lesson in batch])
        when = ((torch.rand(1) + torch.arange(BATCH) / BATCH) % 1 * 1000).long()
        noise, alpha = torch.randn_like(latents), alphas[when].view(-1, 1, 1, 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = encoder(torch.tensor([ids for ids, _ in rows])).last_hidden_state
            predicted = unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, when, states).sample
        loss = ((predicted.float() - noise).square().mean((1, 2, 3)) * weights[when]).mean()
        optimizer.zero_grad()
        (loss + NORM_WEIGHT * vectors.penalty()).backward()
        optimizer.step()
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 0:
            norm = float(vectors.values.norm(dim=1).mean())
            print(f"{name} step {step} loss {smooth:.4f} norm {norm:.2f} (words {vectors.usual_norm:.2f})", flush=True)
    vectors.remove()
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors.values.detach().clone()},
        "name": name,
        "step": steps,
        "sd_checkpoint": None,
        "sd_checkpoint_name": "latentfarm-demo",
    }
    torch.save(content, output)
