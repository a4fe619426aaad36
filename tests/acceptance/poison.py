"""A simulated worker whose device does what the prompt says: dies, hangs once, or holds Python's lock for 20 seconds."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

from latentfarm_shared.ledger import Claim, Ledger
from latentfarm_shared.settings import Settings
from latentfarm_shared.specs import ImageSpec
from latentfarm_shared.storage import ObjectStore
from latentfarm_worker.operations import Model, Progress, Render, Rendered
from latentfarm_worker.process import main
from latentfarm_worker.simulated import SimulatedBackend

GIL_S = 20


class PoisonedBackend(SimulatedBackend):
    """Goes wrong while denoising."""

    def render(self, claim: Claim, image: ImageSpec, model: Model, progress: Progress) -> Render:
        """Begin as ever, then do what the prompt says."""
        render = super().render(claim, image, model, progress)
        result = None
        for number in range(1000):
            try:
                operation = next(render) if number == 0 else render.send(result)
            except StopIteration as done:
                last: Rendered = done.value
                return last
            result = yield operation
            if number == 1:
                _misbehave(image.job.prompt, image.job.negative_prompt)
        raise RuntimeError("the render never ended")


def _misbehave(prompt: str, path: str) -> None:
    if prompt == "poison" or (prompt == "poison here" and not Path(path).exists()):
        os._exit(70)  # as a device that is lost
    if prompt == "hold the GIL":
        ctypes.PyDLL(None).sleep(GIL_S)
    if prompt == "hang once" and not Path(path).exists():
        Path(path).touch()
        time.sleep(3600)


def make(
    name: str, settings: Settings, ledger: Ledger, store: ObjectStore, on_progress: Callable[[], None]
) -> PoisonedBackend:
    """Return the backend."""
    return PoisonedBackend(name, settings, ledger, store, on_progress)


if __name__ == "__main__":
    main(make)
