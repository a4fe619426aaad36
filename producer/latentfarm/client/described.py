"""What a farm told of an image, as its users read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentfarm_shared.ledger import ImageState

from latentfarm.pictures import file_name
from latentfarm.views import ImageAnswer


@dataclass(frozen=True)
class Described:
    """Image `index` of a job, as it stood when the farm told of it."""

    job: str
    index: int
    state: ImageState
    told: ImageAnswer

    @property
    def seed(self) -> int:
        """The image's own seed."""
        return self.told.seed

    @property
    def point(self) -> dict[str, Any]:
        """Where it lies on the job's axes; empty if it has none."""
        return self.told.point

    @property
    def parameters(self) -> str:
        """The infotext, as written into the picture."""
        return self.told.parameters

    @property
    def embeddings(self) -> list[dict[str, Any]]:
        """The embeddings applied to it, and in which prompts."""
        return self.told.embeddings

    @property
    def error(self) -> dict[str, str] | None:
        """`code`, `message` and `worker`, if it failed."""
        return self.told.error

    @property
    def file_name(self) -> str:
        """What it is called in a folder of its job's pictures."""
        return file_name(self.index, self.seed)

    def summary(self) -> dict[str, Any]:
        """Return what the command line prints as JSON."""
        row = self.told.model_dump(exclude={"id"})
        return {key: value for key, value in row.items() if key not in ("point", "error") or value}
