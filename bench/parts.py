"""What each part of the farm costs in CPU time per image, one part after the other against real servers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentfarm.embedded.local import LocalFarm
from latentfarm_shared.images import content_id
from latentfarm_shared.infotext import format_infotext
from latentfarm_shared.ledger import Claim
from latentfarm_shared.ledger.queues import queue_name
from latentfarm_shared.records import Lock
from latentfarm_shared.specs import expand
from latentfarm_shared.wakeups import make_celery, ring
from latentfarm_worker.operations import Progress
from latentfarm_worker.png import encode_png
from latentfarm_worker.renderer import Renderer
from latentfarm_worker.renders import RenderRequest

from bench.png import picture
from bench.rivals import job

IMAGES = 100


def cpu_ms(action: Callable[[int], object]) -> float:
    """Return the CPU milliseconds of this thread that an action takes, median of many."""
    found = []
    for number in range(IMAGES):
        began = time.thread_time()
        action(number)
        found.append((time.thread_time() - began) * 1000)
    return round(statistics.median(found), 3)


def measure() -> dict[str, Any]:
    """Return CPU milliseconds by part."""
    pixels = picture()
    with (
        tempfile.TemporaryDirectory(prefix="latentfarm-bench-") as folder,
        LocalFarm(Path(folder), workers=0) as local,
        Renderer("demo") as renderer,
    ):
        farm = local.farm
        submitted = farm.submit(job(prompt="masterpiece, corneo_dva", count=IMAGES, lane="batch"))
        spec, frozen = submitted.spec, Lock(checkpoint=farm.models.ls()[0], embeddings=tuple(farm.embeddings.ls()))
        png = encode_png(pixels.numpy(), "a cat")
        celery = make_celery(farm.settings)
        claims: list[Claim] = []
        queue = queue_name("batch", frozen.checkpoint.hash)

        def claim(_number: int) -> None:
            claimed = farm.ledger.claim("bench", [queue])
            if claimed is not None:
                claims.append(claimed)

        progress = Progress()
        parts = {
            "claim (Redis)": claim,
            "lay out prompts": lambda n: RenderRequest.build(expand(spec, n), frozen, renderer.checkpoint.tokenizer),
            "infotext": lambda n: format_infotext(expand(spec, n), frozen),
            "content id": lambda n: content_id(expand(spec, n), frozen),
            "PNG, 512x512": lambda _n: encode_png(pixels.numpy(), "a cat"),
            "PUT, 450 KB": lambda n: farm.store.put_once(f"bench/{n}", png, "image/png", str(n)),
            "publish (Redis)": lambda n: farm.ledger.succeed(claims[n], "bench"),
            "wake-up (Celery)": lambda n: ring(celery, queue, [str(n)]),
            "preview note": lambda _n: progress.advance(pixels),
        }
        found = {name: cpu_ms(action) for name, action in parts.items()}
        submitted.cancel()
    return {"CPU ms per image": found, "sum": round(sum(found.values()), 2)}
