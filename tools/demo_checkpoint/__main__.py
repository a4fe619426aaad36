"""Make the demo checkpoint from nothing: `python -m demo_checkpoint`. Interrupt and start again as you like.

Steps, with the wall time on two cores of the run that is shipped: autoencoder (18 min), pictures (5), text encoder
(6), diffusion (66), decoder (5), embeddings (6), evaluation (35). State lies in --state, outside the tree; every
training saves it each five minutes and resumes from it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import platformdirs

from demo_checkpoint import autoencoder, captions, diffusion, inversion
from demo_checkpoint.evaluate import PARTS, evaluate
from demo_checkpoint.export import export

SHIPPED = Path(__file__).parents[2] / "demo" / "latentfarm_demo"


def main() -> None:
    """Run every step that is not done yet."""
    parser = argparse.ArgumentParser(prog="demo_checkpoint", description=__doc__)
    default = Path(platformdirs.user_cache_dir("latentfarm-demo-checkpoint", appauthor=False))
    parser.add_argument("--state", type=Path, default=default, help="folder of the training state")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies every time budget; 0.01 tries the steps")
    parser.add_argument(
        "--evaluate", nargs="+", choices=PARTS, metavar="PART", help=f"only measure: {', '.join(PARTS)}"
    )
    arguments = parser.parse_args()
    state, scale = arguments.state, arguments.scale
    state.mkdir(parents=True, exist_ok=True)
    if not arguments.evaluate:
        train_parts(state, scale)
        size = export(state, SHIPPED / "checkpoint")
        print(f"checkpoint: {size / 1e6:.1f} MB")
        for name, steps, rate in ((inversion.POSITIVE, 500, 3e-3), (inversion.NEGATIVE, 250, 3e-3)):
            output = SHIPPED / "embeddings" / f"{name}.pt"
            inversion.train(SHIPPED / "checkpoint", name, max(2, int(steps * scale)), rate, output)
    count = max(16, int(300 * scale))
    output = state / "evaluation"
    evaluate(SHIPPED / "checkpoint", SHIPPED / "embeddings", output, count, arguments.evaluate or PARTS)


def train_parts(state: Path, scale: float) -> None:
    """Train tokenizer, autoencoder, text encoder, UNet and decoder; each step is skipped once its result is there."""
    if not (state / "tokenizer" / "vocab.json").exists():
        captions.train_tokenizer(state / "tokenizer")
    if not (state / "vae" / "config.json").exists():
        autoencoder.train(state, 17.5 * scale, decoder_only=False)
    for size, count in ((128, 30_000), (256, 5_000)):
        if not list(state.glob(f"pool-{size}-*.pt")):
            diffusion.make_pool(state, max(64, int(count * scale)), size, seed=11 + size)
    if not (state / "text_warm" / "config.json").exists():
        diffusion.warm_up(state, 5.5 * scale)
    diffusion.train(state, 66 * scale)
    if not (state / "decoder.pt").exists():
        shutil.copytree(state / "vae", state / "vae_joint", dirs_exist_ok=True)
    autoencoder.train(state, 6 * scale, decoder_only=True)


if __name__ == "__main__":
    main()
