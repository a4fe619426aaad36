"""latentfarm: Stable Diffusion render jobs with textual-inversion embeddings, on a farm of warm workers.

>>> from latentfarm import Farm
>>> farm = Farm("https://farm.example.com", "lf_key")
>>> job = farm.generate("masterpiece, corneo_dva", seed=43, count=4)
>>> job.wait()
>>> job.images[0].save("a.png")

`AsyncFarm` is the same to be awaited; `Farm.from_env()` reaches a farm directly over its Redis and S3; `latentfarm.testing`
has a farm for tests that draws in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentfarm_shared import __version__

if TYPE_CHECKING:
    from latentfarm_shared.errors import FarmError, Unavailable, UsageError
    from latentfarm_shared.parameters import EmbeddingUse, HiresFix, SamplingOptions
    from latentfarm_shared.specs import JobSpec

    from latentfarm.client.aio import AsyncFarm, AsyncImage, AsyncJob
    from latentfarm.client.sync import Farm, Image, Job
    from latentfarm.farm import DirectFarm

__all__ = [
    "AsyncFarm",
    "AsyncImage",
    "AsyncJob",
    "DirectFarm",
    "EmbeddingUse",
    "Farm",
    "FarmError",
    "HiresFix",
    "Image",
    "Job",
    "JobSpec",
    "SamplingOptions",
    "Unavailable",
    "UsageError",
    "__version__",
]

_HOMES = {
    "AsyncFarm": "latentfarm.client.aio",
    "AsyncImage": "latentfarm.client.aio",
    "AsyncJob": "latentfarm.client.aio",
    "DirectFarm": "latentfarm.farm",
    "EmbeddingUse": "latentfarm_shared.parameters",
    "Farm": "latentfarm.client.sync",
    "FarmError": "latentfarm_shared.errors",
    "HiresFix": "latentfarm_shared.parameters",
    "Image": "latentfarm.client.sync",
    "Job": "latentfarm.client.sync",
    "JobSpec": "latentfarm_shared.specs",
    "SamplingOptions": "latentfarm_shared.parameters",
    "Unavailable": "latentfarm_shared.errors",
    "UsageError": "latentfarm_shared.errors",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that the command line starts quickly."""
    if name not in _HOMES:
        raise AttributeError(name)
    from importlib import import_module  # noqa: PLC0415 - see above

    return getattr(import_module(_HOMES[name]), name)
