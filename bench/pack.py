"""Pack a long prompt into an embedding on a farm of one worker: how long it takes and how much of the prompt it keeps."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from latentfarm.embedded.local import LocalFarm
from latentfarm.farm import DirectFarm
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from demo_checkpoint.captions import portrait_tags
from demo_checkpoint.classify import check
from demo_checkpoint.inversion import CHARACTER

QUALITY = "masterpiece, high quality"
NEGATIVE = "low quality, worst quality, blurry, pixelated, deformed"
SEED, COUNT = 900_000, 48


def attributes(farm: DirectFarm, prompt: str, cfg: float) -> tuple[float, dict[str, float]]:
    """Return the share of the character's attributes that pictures of a prompt have, overall and one by one."""
    job = farm.generate(prompt, seed=SEED, count=COUNT, steps=15, cfg_scale=cfg, lane="batch")
    job.wait(600)
    found = [check(Image.open(io.BytesIO(image.png())), CHARACTER) for image in job.iter_images()]
    shares = {name: round(sum(bool(one[name]) for one in found) / len(found), 3) for name in found[0]}
    return round(sum(shares.values()) / len(shares), 4), shares


def packed(farm: DirectFarm, prompt: str, name: str, vectors: int, *, negative: bool = False) -> dict[str, Any]:
    """Pack a prompt and return how long it took and the farm's own figure of quality."""
    began = time.perf_counter()
    job = farm.pack(prompt, name, vectors=vectors, negative=negative)
    status = job.wait(900)
    story = status.progress or {}
    return {"state": status.state, "took_s": round(time.perf_counter() - began, 1), "quality": story.get("quality")}


def measure() -> dict[str, Any]:
    """Return time, quality and attributes kept."""
    long = ", ".join(["1girl", *portrait_tags(CHARACTER).values()])
    rows: dict[str, Any] = {"long prompt": long, "images a figure": COUNT}
    with tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as data, LocalFarm(Path(data)) as local:
        local.await_workers()
        farm = local.farm
        for vectors in (8, 4):
            rows[f"packing into {vectors} vectors, at most 600 s"] = packed(farm, long, f"packed-{vectors}x", vectors)
        rows["packing a negative prompt into 4 vectors"] = packed(farm, NEGATIVE, "packed-neg", 4, negative=True)
        for cfg in (3.0, 7.0):
            prompts = {"without": QUALITY, "long prompt": f"{QUALITY}, {long}"}
            prompts |= {f"{n} vectors": f"{QUALITY}, packed-{n}x" for n in (8, 4)}
            figures = {name: attributes(farm, prompt, cfg) for name, prompt in prompts.items()}
            rows[f"attributes, CFG {cfg:g}"] = figures
            whole = figures["long prompt"][0]
            rows[f"of the long prompt's attributes, CFG {cfg:g}, at least 0.9"] = {
                name: round(share / whole, 3) for name, (share, _) in figures.items()
            }
    return rows
