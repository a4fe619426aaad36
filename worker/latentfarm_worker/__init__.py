"""The worker: supervisor, Celery process, engine and renderer. `Renderer` is the same renderer without a farm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentfarm_worker.renderer import Renderer

__all__ = ["Renderer"]


def __getattr__(name: str) -> Any:
    """Import `Renderer` when first asked for, so that the supervisor stays free of torch."""
    if name == "Renderer":
        from latentfarm_worker.renderer import Renderer  # noqa: PLC0415

        return Renderer
    raise AttributeError(name)
