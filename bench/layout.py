"""Memory layout and number format on this CPU: channels last and bfloat16 against float32 as it comes."""

from __future__ import annotations

from typing import Any

import torch
from latentfarm_worker.renderer import Renderer
from latentfarm_worker.runtime import Runtime

from bench.pairs import interleaved, ratio
from bench.rivals import engine_s

IMAGES = 8
RUNTIMES = {
    "float32": Runtime(),
    "channels last": Runtime(channels_last=True),
    "bfloat16": Runtime(dtype=torch.bfloat16, vae_dtype=torch.bfloat16),
}


def measure() -> dict[str, Any]:
    """Return images per second of each choice over float32."""
    renderers = {name: Renderer("demo", runtime=runtime) for name, runtime in RUNTIMES.items()}
    found = interleaved({name: lambda r=r: engine_s(r, IMAGES) for name, r in renderers.items()})  # type: ignore[misc]
    for renderer in renderers.values():
        renderer.close()
    return {
        f"images per second, {name} over float32": ratio(found["float32"], found[name]).row()
        for name in RUNTIMES
        if name != "float32"
    }
