"""Train the demo checkpoint's text encoder and UNet on encoded pictures of two sizes.

Stable Diffusion 1's own process: epsilon prediction, `scaled_linear` betas 0.00085-0.012 over 1000 steps,
conditioning on all 77 positions of the text encoder, captions dropped now and then for guidance.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from demo_checkpoint.captions import quality_tags, training_caption, with_quality
from demo_checkpoint.scenes import (
    COLOURS,
    DEGRADATIONS,
    EYES,
    PATTERNS,
    PLACES,
    SHAPES,
    SIZES,
    SUBJECTS,
    Portrait,
    RidingScene,
    Scene,
    ShapeScene,
    degrade,
    is_held_out,
    random_scene,
    render,
)
from demo_checkpoint.training import Average, Run, to_tensor

WIDTH = 128
BATCH, LARGE_BATCH = 32, 8
LARGE_EVERY, LARGE_FROM = 6, 0.25
CAPTIONS = 3
SPOILT = 0.25
NO_CAPTION = 0.1
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the untrained text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """Build the untrained UNet: three levels, cross-attention on the lower two."""
    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Tokenize to `ids: [B, 77]`, padded with the end token."""
    return torch.tensor(tokenizer(texts, padding="max_length", max_length=77, truncation=True).input_ids)


def _caption(scene: Scene, spoilt: str, rng: random.Random) -> str:
    """Caption a picture; quality tags say what is true, or nothing."""
    if spoilt:
        tags = quality_tags(spoilt, rng) if rng.random() < 0.7 else ""
    else:
        tags = quality_tags("", rng) if rng.random() < 0.6 else ""
    text = with_quality(training_caption(scene, rng), tags, rng)
    if rng.random() < 0.04:
        text += ", " + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8)))
    return text


def _seen_scene(rng: random.Random) -> Scene:
    while is_held_out(scene := random_scene(rng)):
        pass
    return scene


@torch.no_grad()
def make_pool(state: Path, count: int, size: int, seed: int) -> None:
    """Paint, encode and caption `count` pictures of `size` pixels into `state/pool-<size>-<seed>.pt`.

    Parts of different seeds add up, so several processes can paint at once.
    """
    rng = random.Random(seed)
    vae = AutoencoderKL.from_pretrained(state / "vae").eval()
    tokenizer = CLIPTokenizer.from_pretrained(state / "tokenizer")
    latents, ids = [], []
    batch = 64 * 128 * 128 // (size * size)
    for start in range(0, count, batch):
        images, texts = [], []
        for _ in range(min(batch, count - start)):
            scene = _seen_scene(rng)
            spoilt = rng.choice(DEGRADATIONS) if rng.random() < SPOILT else ""
            image = render(scene, rng, size)
            images.append(degrade(image, rng, spoilt) if spoilt else image)
            texts += [_caption(scene, spoilt, rng) for _ in range(CAPTIONS)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents.append(vae.encode(to_tensor(images)).latent_dist.mean.half())
        ids.append(token_ids(tokenizer, texts).view(-1, CAPTIONS, 77).short())
        if start % (batch * 40) == 0:
            print(f"pool {size}: {start}", flush=True)
    torch.save({"latents": torch.cat(latents), "ids": torch.cat(ids)}, state / f"pool-{size}-{seed}.pt")


# ---- the text encoder learns to say what is in a caption before it has to guide a picture


def _labels(scene: Scene, spoilt: str) -> dict[str, int]:
    """Number every attribute of a scene; the warm-up predicts these from the encoder's output."""
    labels = {
        "kind": (ShapeScene, Portrait, RidingScene).index(type(scene)),
        "spoilt": ("", *DEGRADATIONS).index(spoilt),
    }
    if not isinstance(scene, RidingScene) or scene.place == "plain":
        labels["background"] = COLOURS.index(scene.background.colour)
    if isinstance(scene, ShapeScene):
        labels |= {
            "shape": SHAPES.index(scene.shape),
            "colour": COLOURS.index(scene.colour),
            "size": SIZES.index(scene.size),
            "pattern": ("", *PATTERNS).index(scene.background.pattern),
        }
        if scene.background.pattern:
            labels["second"] = COLOURS.index(scene.background.second)
    elif isinstance(scene, Portrait):
        worn = ("", *COLOURS)
        labels |= {
            "hair": COLOURS.index(scene.hair),
            "length": int(scene.long_hair),
            "eyes": EYES.index(scene.eyes),
            "mouth": int(scene.smile),
            "blush": int(scene.blush),
            "headphones": worn.index(scene.headphones),
            "scarf": worn.index(scene.scarf),
            "suit": COLOURS.index(scene.suit),
        }
    else:
        labels |= {"subject": SUBJECTS.index(scene.subject), "place": PLACES.index(scene.place)}
        if "horse" in scene.subject:
            labels["horse"] = COLOURS.index(scene.horse)
    return labels


HEADS = {
    "kind": 3, "spoilt": 4, "background": 9, "shape": 6, "colour": 9, "size": 2, "pattern": 4, "second": 9, "hair": 9,
    "length": 2, "eyes": 3, "mouth": 2, "blush": 2, "headphones": 10, "scarf": 10, "suit": 9, "subject": 3, "place": 3,
    "horse": 9,
}  # fmt: skip


def warm_up(state: Path, minutes: float, seed: int = 7) -> None:
    """Train the text encoder to tell a caption's attributes from its end state and from any padding state."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = CLIPTokenizer.from_pretrained(state / "tokenizer")
    encoder = make_text_encoder(tokenizer)
    heads = nn.ModuleDict({f"head_{name}": nn.Linear(WIDTH, count) for name, count in HEADS.items()})
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    parts = {"encoder": encoder, "heads": heads, "optimizer": optimizer}
    run = Run(state / "text.pt", minutes, parts)
    while run.fraction < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (run.step + 1) / 50) * (1 - 0.95 * run.fraction)
        pairs = [(_seen_scene(rng), rng.choice(DEGRADATIONS) if rng.random() < SPOILT else "") for _ in range(48)]
        ids = token_ids(tokenizer, [_caption(scene, spoilt, rng) for scene, spoilt in pairs])
        labels = [_labels(scene, spoilt) for scene, spoilt in pairs]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = encoder(ids).last_hidden_state.float()
        loss, right = _warm_up_loss(heads, states, (ids != tokenizer.eos_token_id).sum(1), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if run.step % 100 == 0:
            print(f"text step {run.step} loss {loss.item():.3f} {right}", flush=True)
        run.advance()
    encoder.save_pretrained(state / "text_warm")


def _warm_up_loss(
    heads: nn.ModuleDict, states: Tensor, ends: Tensor, labels: list[dict[str, int]]
) -> tuple[Tensor, dict[str, float]]:
    rows = torch.arange(len(states))
    somewhere = (ends + (torch.rand(len(ends)) * (77 - ends)).long()).clamp(max=76)
    loss, right = states.new_zeros(()), {}
    for position in (ends, somewhere):
        for name in HEADS:
            target = torch.tensor([item.get(name, -100) for item in labels])
            if (target >= 0).any():
                scores = heads[f"head_{name}"](states[rows, position])
                loss = loss + functional.cross_entropy(scores, target, ignore_index=-100) / 8
                known = target >= 0
                right[name] = round(float((scores.argmax(1) == target)[known].float().mean()), 2)
    return loss, right


# ---- diffusion


def loss_weights(alphas: Tensor) -> Tensor:
    """Weight of the epsilon error at each step: that of min-SNR (arXiv:2303.09556) for velocity, gamma 5.

    `alphas: [1000]` are the cumulative products. High noise, where colours and shapes are decided, counts most.
    """
    ratio = alphas / (1 - alphas)
    return ((ratio + 1).clamp(max=5) / ratio).clamp(max=60)


class Batches:
    """Random batches of latents with the token ids of one of their captions, or of none."""

    def __init__(self, state: Path, size: int, empty: Tensor, scale: float) -> None:
        """Load every part of the pool of pictures of `size` pixels."""
        parts = [torch.load(path, weights_only=True) for path in sorted(state.glob(f"pool-{size}-*.pt"))]
        self.latents = torch.cat([part["latents"] for part in parts])
        self.ids = torch.cat([part["ids"] for part in parts])
        self.empty, self.scale = empty, scale

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return `latents: [count, 4, H/8, W/8]` and `ids: [count, 77]`."""
        rows = torch.randint(len(self.latents), (count,))
        ids = self.ids[rows, torch.randint(CAPTIONS, (count,))].long()
        ids[torch.rand(count) < NO_CAPTION] = self.empty
        return self.latents[rows].float() * self.scale, ids


def train(state: Path, minutes: float, seed: int = 3) -> None:
    """Train UNet and text encoder for `minutes`, resumably, and leave their average in `state/checkpoint`."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(state / "tokenizer")
    scale = AutoencoderKL.load_config(state / "vae")["scaling_factor"]
    unet, encoder = make_unet(), CLIPTextModel.from_pretrained(state / "text_warm").train()
    unet.set_attn_processor(AttnProcessor())
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(unet.parameters()), "peak": 1.2e-3},
            {"params": list(encoder.parameters()), "peak": 3e-4},
        ],
        lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True,
    )  # fmt: skip
    average = Average(parameters, 0.9985)
    parts = {"unet": unet, "encoder": encoder, "optimizer": optimizer, "average": average}
    run = Run(state / "diffusion.pt", minutes, parts)
    torch.manual_seed(seed + run.step)
    empty = token_ids(tokenizer, [""])[0]
    small, large = Batches(state, 128, empty, scale), Batches(state, 256, empty, scale)
    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    weights = loss_weights(alphas)
    smooth = 0.0
    while run.fraction < 1:
        warm = min(1.0, (run.step + 1) / 150)
        rate = warm * min(1.0, 0.5 + 0.5 * math.cos(math.pi * max(0.0, run.fraction - 0.2) / 0.8)) + 0.005
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        is_large = run.fraction > LARGE_FROM and run.step % LARGE_EVERY == 0
        latents, ids = large.draw(LARGE_BATCH) if is_large else small.draw(BATCH)
        count = len(latents)
        steps = ((torch.rand(1) + torch.arange(count) / count) % 1 * 1000).long()
        noise, alpha = torch.randn_like(latents), alphas[steps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = unet(noisy, steps, encoder(ids).last_hidden_state).sample
        loss = ((predicted.float() - noise).square().mean((1, 2, 3)) * weights[steps]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        smooth = loss.item() if run.step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if run.step % 100 == 0:
            print(f"step {run.step} spent {run.spent_s:.0f} s cpu {run.cpu_s:.0f} s loss {smooth:.4f}", flush=True)
        if not run.advance() or run.step % 1000 == 0:
            with average.applied():
                unet.save_pretrained(state / "unet")
                encoder.save_pretrained(state / "text_encoder")
    print(f"diffusion: {run.step} steps, {run.cpu_s / 60:.0f} core-minutes, loss {smooth:.4f}", flush=True)
