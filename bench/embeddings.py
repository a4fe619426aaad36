"""Five hundred embeddings resident: what encoding a prompt and adding one cost; the same with diffusers' own loader."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from latentfarm_worker.operations import Encode
from latentfarm_worker.prompts import PromptLayout
from latentfarm_worker.renderer import Renderer, locked
from safetensors.torch import save

from bench.pairs import interleaved, ratio
from bench.rivals import job, pipeline

COUNT, VECTORS, WIDTH = 500, 8, 128
REPEATS = 60


def encode_ms(renderer: Renderer) -> float:
    """Return the milliseconds one prompt takes, from text to tensors, median of many."""
    spec, lock = renderer.freeze(job(prompt="masterpiece, corneo_dva, a girl with blue hair"))
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        laid = PromptLayout(spec, lock, renderer.checkpoint.tokenizer).first_pass()
        renderer.checkpoint.cache.clear()
        renderer.checkpoint.encode([Encode(part.texts) for part in (*laid.positive, laid.negative)])
        found.append((time.perf_counter() - began) * 1000)
    return statistics.median(found)


def add_ms(renderer: Renderer, folder: Path, number: int) -> float:
    """Return the milliseconds until one more embedding may be used, from its file, read in the sandbox."""
    path = folder / f"bench-embedding-{number}.safetensors"
    path.write_bytes(save({"emb_params": torch.randn(VECTORS, WIDTH)}))
    began = time.perf_counter()
    renderer.add_embedding(path)
    return (time.perf_counter() - began) * 1000


def diffusers_rows() -> dict[str, Any]:
    """Return the same figures for load_textual_inversion and encode_prompt."""
    loaded = pipeline()

    def encode() -> float:
        found = []
        for _ in range(REPEATS // 3):
            began = time.perf_counter()
            loaded.encode_prompt("masterpiece, a girl with blue hair", "cpu", 1, True, "blurry, low quality")  # noqa: FBT003
            found.append((time.perf_counter() - began) * 1000)
        return statistics.median(found)

    before = encode()
    began = time.perf_counter()
    for number in range(COUNT):
        loaded.load_textual_inversion(torch.randn(VECTORS, WIDTH), token=f"bench{number}x")
        if time.perf_counter() - began > 120:
            break
    spent = time.perf_counter() - began
    return {
        "embeddings loaded": number + 1,
        "adding one, ms": round(spent * 1000 / (number + 1), 2),
        "encoding a prompt with none, ms": round(before, 2),
        "encoding a prompt with them, ms": round(encode(), 2),
    }


def measure() -> dict[str, Any]:
    """Return encoding times as ratios, and the time to add one."""
    with Renderer("demo") as few, Renderer("demo") as many, tempfile.TemporaryDirectory() as folder:
        added = [add_ms(many, Path(folder), number) for number in range(COUNT)]
        resident = len(locked(many.embeddings, many.record).embeddings)
        found = interleaved({"with": lambda: encode_ms(many), "without": lambda: encode_ms(few)})
    return {
        "embeddings resident": resident,
        "encoding a prompt with them over without, at most 1.05": ratio(found["with"], found["without"]).row(),
        "encoding a prompt, ms": {name: [round(value, 3) for value in values] for name, values in found.items()},
        "adding one, ms, at most 10": {
            "median": round(statistics.median(added), 3),
            "highest": round(max(added), 3),
        },
        "diffusers": diffusers_rows(),
    }
