"""Put the trained parts together as a diffusers folder in fp16, as `latentfarm-demo` ships it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from demo_checkpoint.diffusion import SCHEDULE

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": diffusers.__version__,
    **SCHEDULE,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": diffusers.__version__,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
PERSONAL = ("_name_or_path",)


def export(state: Path, folder: Path) -> int:
    """Write the checkpoint to `folder`; return its size in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(state / "unet"),
        "vae": AutoencoderKL.from_pretrained(state / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(state / "text_encoder"),
    }
    for name, module in parts.items():
        module.to(torch.float16).save_pretrained(folder / name)
        _clean_config(folder / name / "config.json")
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", INDEX)
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(state / "tokenizer" / name, folder / "tokenizer" / name)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _clean_config(path: Path) -> None:
    config = json.loads(path.read_text())
    _write_json(path, {key: value for key, value in config.items() if key not in PERSONAL})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
