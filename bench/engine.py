"""The engine against the bare pipeline, one image at a time and in static batches of eight; where its time goes."""

from __future__ import annotations

from typing import Any

from latentfarm_worker.engine import EngineClock
from latentfarm_worker.renderer import Renderer

from bench.pairs import interleaved, ratio
from bench.rivals import bare_s, engine_s, pipeline

IMAGES = 16


def measure() -> dict[str, Any]:
    """Return images per second as ratios, and the shares of the engine thread's time."""
    loaded = pipeline()
    with Renderer("demo", slots=8) as renderer:
        found = interleaved(
            {
                "engine, 8 slots": lambda: engine_s(renderer, IMAGES),
                "bare, batch 1": lambda: bare_s(loaded, 8, 1),
                "bare, batch 8": lambda: bare_s(loaded, IMAGES, 8),
            }
        )
        renderer.engine.clock = clock = EngineClock()
        engine_s(renderer, 4 * IMAGES)
    outside = clock.busy_s - clock.device_s
    return {
        "seconds per image": {name: [round(value, 4) for value in values] for name, values in found.items()},
        "engine over bare batch 1, at least 2.2": ratio(found["bare, batch 1"], found["engine, 8 slots"]).row(),
        "engine over bare batch 8, at least 0.95": ratio(found["bare, batch 8"], found["engine, 8 slots"]).row(),
        "engine thread outside device calls, at most 0.05": round(outside / clock.busy_s, 4),
        "of that, sampler arithmetic and the rest of renders": round(clock.render_s / clock.busy_s, 4),
    }
