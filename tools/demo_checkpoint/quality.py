"""A small judge of quality: tells spoilt pictures from good ones, after a round trip through the autoencoder.

It is trained on painted pictures alone and measured on others; the checkpoint's pictures are only ever judged by it.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from demo_checkpoint.scenes import DEGRADATIONS, degrade, random_scene, render
from demo_checkpoint.training import to_tensor

COUNT, HELD_OUT, EPOCHS, BATCH = 2400, 400, 8, 32


class QualityJudge(nn.Module):
    """Four strided convolutions and a mean; the logit of "spoilt"."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((3, 16), (16, 32), (32, 48), (48, 64)):
            layers += [nn.Conv2d(inside, outside, 3, 2, 1), nn.BatchNorm2d(outside), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(128, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits `[B]` for `pixels: [B, 3, H, W]` in [-1, 1]."""
        features = self.features(pixels).flatten(2)
        logits: Tensor = self.head(torch.cat([features.mean(2), features.amax(2)], 1))[:, 0]
        return logits

    @torch.no_grad()
    def spoilt(self, images: list[Image.Image]) -> list[bool]:
        """Tell of each picture whether it is spoilt."""
        self.eval()
        return [bool(x > 0) for batch in to_tensor(images).split(64) for x in self(batch)]


@torch.no_grad()
def _examples(vae: AutoencoderKL, seed: int) -> tuple[Tensor, Tensor]:
    rng = random.Random(seed)
    images = []
    for number in range(COUNT):
        image = render(random_scene(rng), rng)
        images.append(degrade(image, rng, rng.choice(DEGRADATIONS)) if number % 2 else image)
    pixels = to_tensor(images)
    seen = [vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1) for batch in pixels.split(16)]
    return torch.cat(seen), (torch.arange(COUNT) % 2).float()


def train_judge(checkpoint: Path, seed: int = 31) -> tuple[QualityJudge, float]:
    """Train a judge; return it with its accuracy on pictures it has not seen."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32).eval()
    pixels, spoilt = _examples(vae, seed)
    judge = QualityJudge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    count = COUNT - HELD_OUT
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - epoch / EPOCHS)
        for rows in torch.randperm(count).split(BATCH):
            loss = functional.binary_cross_entropy_with_logits(judge(pixels[rows]), spoilt[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    judge.eval()
    with torch.no_grad():
        right = (judge(pixels[count:]) > 0) == (spoilt[count:] > 0.5)
    return judge, float(right.float().mean())
