"""latentfarm: Stable Diffusion render jobs with textual-inversion embeddings, on a farm of warm workers.

>>> from latentfarm import Farm
>>> farm = Farm.from_env()
>>> job = farm.generate("masterpiece, corneo_dva", seed=43, count=4)
>>> job.wait()
>>> job.images[0].save("a.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentfarm_shared import __version__

if TYPE_CHECKING:
    from latentfarm_shared.errors import FarmError, Unavailable, UsageError

    from latentfarm.farm import Farm
    from latentfarm.jobs import FarmImage, Job

__all__ = ["Farm", "FarmError", "FarmImage", "Job", "Unavailable", "UsageError", "__version__"]

_HOMES = {
    "Farm": "latentfarm.farm",
    "Job": "latentfarm.jobs",
    "FarmImage": "latentfarm.jobs",
    "FarmError": "latentfarm_shared.errors",
    "UsageError": "latentfarm_shared.errors",
    "Unavailable": "latentfarm_shared.errors",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that the command line starts quickly."""
    if name not in _HOMES:
        raise AttributeError(name)
    from importlib import import_module  # noqa: PLC0415 - see above

    return getattr(import_module(_HOMES[name]), name)
