"""How many of a file's vectors enter the text encoder: here, and with diffusers' own loader on the same file.

The files are those in the folder `BENCH_EMBEDDINGS`, the tokenizer is CLIP's, in `BENCH_TOKENIZER`; the encoders have
the widths of SD1, SD2 and SDXL, one layer and random weights, which change nothing about what enters them.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.sandbox import NotAnEmbedding, Sandbox
from latentfarm_shared.prompts.chunks import chunk_prompt
from latentfarm_shared.prompts.matching import NameMatcher
from latentfarm_shared.prompts.tokens import ClipTokenizer
from latentfarm_worker.renderer import EmbeddingShelf
from latentfarm_worker.text import EncoderTraits, TextEncoder
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY = 49408


def encoder_of(width: int) -> CLIPTextModel:
    """Return a text encoder of a width, one layer deep."""
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16
    )
    encoder = CLIPTextModel(config)
    encoder.eval()
    return encoder


@torch.inference_mode()
def ours(file: EmbeddingFile, tokenizer: ClipTokenizer, encoders: dict[int, CLIPTextModel]) -> int:
    """Return how many vectors of a file were found in what entered every encoder it is for."""
    shelf = EmbeddingShelf()
    record = shelf.put(file)
    chunks = chunk_prompt(f"a photo of {record.name}", tokenizer, NameMatcher(tokenizer, [record]))
    for name, width in record.widths.items():
        applied = TextEncoder(encoders[width], name, shelf.bank, EncoderTraits()).encode(chunks, 1).applied
        if not any(record.content_id in found for found in applied):
            return 0
    return sum(placement.rows for chunk in chunks for placement in chunk.placements)


def theirs(path: Path, width: int, tokenizer_folder: Path, token: str | None) -> str:
    """Return how many vectors `load_textual_inversion` applies to a prompt that uses the file's stem, or its refusal."""
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    parts = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        text_encoder=encoder_of(width), tokenizer=tokenizer, requires_safety_checker=False, **parts
    )
    try:
        pipeline.load_textual_inversion(str(path), token=token)
    except Exception as error:  # noqa: BLE001 - whatever it raises is the answer
        return type(error).__name__
    prompt = pipeline.maybe_convert_prompt(f"a photo of {path.stem}", tokenizer)
    return str(sum(token_id >= VOCABULARY for token_id in tokenizer(prompt).input_ids))


def measure() -> dict[str, Any]:
    """Return a row for every file that is taken and whose family has a text encoder here."""
    folder, tokenizer_folder = Path(os.environ["BENCH_EMBEDDINGS"]), Path(os.environ["BENCH_TOKENIZER"])
    tokenizer = ClipTokenizer(tokenizer_folder / "vocab.json", tokenizer_folder / "merges.txt")
    encoders = {width: encoder_of(width) for width in (768, 1024, 1280)}
    warnings.simplefilter("ignore")
    rows = {}
    with Sandbox() as sandbox:
        for path in sorted(folder.iterdir()):
            try:
                file = sandbox.read_one(path)
            except NotAnEmbedding:
                continue
            if set(file.widths.values()) <= encoders.keys():
                width = next(iter(file.widths.values()))
                rows[path.name] = {
                    "family": file.family,
                    "vectors": file.vectors,
                    "applied here": ours(file, tokenizer, encoders),
                    "diffusers": theirs(path, width, tokenizer_folder, None),
                    "diffusers, token given": theirs(path, width, tokenizer_folder, path.stem),
                }
    return {"vectors applied to 'a photo of STEM'": rows}
