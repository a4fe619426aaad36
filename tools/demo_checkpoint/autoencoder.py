"""Train the demo checkpoint's autoencoder: 8x smaller, 4 channels, no attention.

It is trained as a whole, for the first half of its time on 64 x 64 crops (it is convolutional, and crops are four
times as many), then on whole pictures, whose norms differ from those of crops; last the decoder alone on noisy
latents, so that what a sampler leaves behind still decodes to crisp edges.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from demo_checkpoint.scenes import DEGRADATIONS, degrade, random_scene, render
from demo_checkpoint.training import Run, fast_group_norm, to_tensor

POOL = 5000
CROP, CROPS = 64, 24
EDGE, BATCH = 128, 6
WHOLE_FROM = 0.5
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5
LATENT_NOISE = 0.12


def make_autoencoder() -> AutoencoderKL:
    """Build the untrained autoencoder."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
    )


def _pool(seed: int) -> Tensor:
    """Paint the training pictures as `[N, 3, 128, 128]` bytes; a tenth are spoilt, a sixth are crops at 256."""
    rng = random.Random(seed)
    images = []
    for index in range(POOL):
        scene = random_scene(rng)
        if index % 6 == 0:
            large = render(scene, rng, 256)
            left, top = rng.randrange(129), rng.randrange(129)
            images.append(large.crop((left, top, left + 128, top + 128)))
            continue
        image = render(scene, rng)
        images.append(degrade(image, rng, rng.choice(DEGRADATIONS)) if rng.random() < 0.1 else image)
    return ((to_tensor(images) + 1) * 127.5).round().to(torch.uint8)


def _batch(pool: Tensor, whole: bool) -> Tensor:
    """Draw `pixels: [B, 3, H, W]`, whole pictures or four times as many crops of a quarter of the size."""
    edge, count = (EDGE, BATCH) if whole else (CROP, CROPS)
    picked = pool[torch.randint(len(pool), (count,))]
    left, top = (int(torch.randint(0, EDGE - edge + 1, ())) for _ in range(2))
    return picked[:, :, top : top + edge, left : left + edge].float() / 127.5 - 1


def _loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean absolute error of pixels and of their differences to the neighbours, which keeps edges sharp."""
    error = decoded.float() - pixels
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


@torch.no_grad()
def psnr(vae: AutoencoderKL, count: int = 96) -> float:
    """Mean peak signal-to-noise ratio in dB of unspoilt pictures after a round trip."""
    rng = random.Random(99)
    pixels = to_tensor(render(random_scene(rng), rng) for _ in range(count))
    decoded = torch.cat([vae.decode(vae.encode(b).latent_dist.mean).sample for b in pixels.split(16)])
    mse = ((decoded.clamp(-1, 1) - pixels) / 2).square().mean((1, 2, 3))
    return float((-10 * mse.log10()).mean())


def train(state: Path, minutes: float, *, decoder_only: bool, seed: int = 1) -> None:
    """Train for `minutes` (of `state/vae.pt`'s budget) and leave the module in `state/vae`."""
    torch.manual_seed(seed + decoder_only)
    vae = AutoencoderKL.from_pretrained(state / "vae") if decoder_only else make_autoencoder()
    if decoder_only:
        vae.encoder.requires_grad_(requires_grad=False)
        vae.quant_conv.requires_grad_(requires_grad=False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    peak = 1.5e-3 if decoder_only else 3e-3
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.98), weight_decay=1e-4)
    run = Run(state / ("decoder.pt" if decoder_only else "vae.pt"), minutes, {"vae": vae, "optimizer": optimizer})
    pool = _pool(seed)
    with fast_group_norm():
        while run.fraction < 1:
            rate = peak * min(1, (run.step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * run.fraction)) + 1e-5
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixels = _batch(pool, whole=decoder_only or run.fraction > WHOLE_FROM)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                posterior = vae.encode(pixels).latent_dist
                noise = LATENT_NOISE * decoder_only * torch.rand(len(pixels), 1, 1, 1)
                latent = posterior.sample() if not decoder_only else posterior.mean
                decoded = vae.decode(latent + noise * latent.std() * torch.randn_like(latent)).sample
            loss = _loss(decoded, pixels)
            if not decoded.requires_grad:
                raise RuntimeError("nothing to train")
            if not decoder_only:
                kl = (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
                loss = loss + KL_WEIGHT * kl
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if run.step % 100 == 0:
                print(f"vae step {run.step} spent {run.spent_s:.0f} s loss {loss.item():.4f}", flush=True)
            run.advance()
    vae.eval()
    if not decoder_only:
        _set_scale(vae, pool)
    print(f"vae: {run.step} steps, {run.cpu_s / 60:.1f} core-minutes, {psnr(vae):.2f} dB", flush=True)
    vae.save_pretrained(state / "vae")


@torch.no_grad()
def _set_scale(vae: AutoencoderKL, pool: Tensor) -> None:
    """Set the scaling factor that gives latents unit deviation, as SD's autoencoder has."""
    pixels = pool[:512].float() / 127.5 - 1
    latent = torch.cat([vae.encode(batch).latent_dist.mean for batch in pixels.split(32)])
    vae.register_to_config(scaling_factor=float(1 / functional.mse_loss(latent, latent.mean()).sqrt()))
