"""Records of checkpoints and embeddings, and the lock that freezes a job to them."""

from __future__ import annotations

import hashlib
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

Layout = Literal["diffusers", "single_file"]
_FAMILIES = {
    frozenset({("clip_l", 768)}): "sd1",
    frozenset({("clip_h", 1024)}): "sd2",
    frozenset({("clip_l", 768), ("clip_g", 1280)}): "sdxl",
    frozenset({("t5", 4096)}): "t5",
}


def family_of(widths: dict[str, int], name: str) -> str:
    """Return the family that a checkpoint of these encoder widths belongs to; one of its own if none is known."""
    return _FAMILIES.get(frozenset(widths.items()), name)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def encode(self) -> str:
        """Return the one wire form."""
        return self.model_dump_json()

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """Read the wire form back."""
        return cls.model_validate_json(text)


class BlobFile(_Record):
    """One file of a checkpoint: its place in the diffusers folder and its content."""

    path: str
    sha256: str
    size: int


class CheckpointRecord(_Record):
    """What a submission needs to know of a checkpoint; workers fetch the files by hash.

    `layers` are those of the text encoder, which bound clip skip.

    `source` is `s3` when all files lie in the farm's store; of a hub's checkpoint (`hub:owner/name@commit`) the large
    ones stay at the hub, pinned by commit and hash.
    """

    name: str
    layout: Layout = "diffusers"
    family: str
    widths: dict[str, int]
    layers: int = 12
    prediction_type: Literal["epsilon", "v_prediction"]
    source: str = "s3"
    files: tuple[BlobFile, ...]

    @property
    def architecture(self) -> Literal["sd1", "sd2", "sdxl"]:
        """Which Stable Diffusion it is built like, told by its encoders."""
        if "clip_g" in self.widths:
            return "sdxl"
        return "sd2" if "clip_h" in self.widths else "sd1"

    @property
    def hash(self) -> str:
        """Identity: sha256 over the paths and contents of all files, 64 hex digits."""
        lines = "".join(f"{f.sha256} {f.path}\n" for f in sorted(self.files, key=lambda f: f.path))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def weights_hash(self) -> str:
        """sha256 of the file A1111 would hash: the single file, or the UNet's weights."""
        weights = [f for f in self.files if f.path.endswith(".safetensors")]
        return next((f for f in weights if f.path.startswith("unet/")), weights[0]).sha256

    def file(self, path: str) -> BlobFile | None:
        """Return the file at `path` of the folder, if the checkpoint has it."""
        return next((f for f in self.files if f.path == path), None)


class EmbeddingRecord(_Record):
    """A named embedding: the tensors by content id, the file it came from by its hash.

    `owner` is whose name it is, empty for the farm's. `kind` Negative belongs in negative prompts unless asked for
    elsewhere. A name that is one word of a checkpoint's vocabulary is only taken for the embedding if `allow_word`.
    One that is `disabled` or `removed` is known so that asking for it is refused, with `state_reason`.
    """

    name: str
    content_id: str
    file_sha256: str
    vectors: int
    widths: dict[str, int]
    internal_name: str | None = None
    layout: str
    owner: str = ""
    kind: Literal["Model", "Negative"] = "Model"
    allow_word: bool = False
    state: Literal["active", "disabled", "removed"] = "active"
    state_reason: str = ""

    @property
    def ti_hash(self) -> str:
        """First 12 hex digits of the file's sha256, as in A1111's `TI hashes`."""
        return self.file_sha256[:12]

    @property
    def family(self) -> str:
        """The family its widths belong to: sd1, sd2, sdxl, t5 or unknown."""
        return family_of(self.widths, "unknown")

    @property
    def version(self) -> str:
        """What follows the name in `name@version`: the first eight digits of the content id."""
        return self.content_id[:8]

    def fits(self, widths: dict[str, int]) -> bool:
        """Tell whether a checkpoint with these encoder widths can take it."""
        return self.widths == widths


class Dropped(_Record):
    """An embedding that a job asked for, in prompt `field`, and does without because its owner allowed it."""

    name: str
    field: str
    reason: str


class Lock(_Record):
    """What a job was frozen to at submission, `frozen_at` seconds since 1970. Its prompts are matched against these names only."""

    checkpoint: CheckpointRecord
    embeddings: tuple[EmbeddingRecord, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    owner: str = ""
    frozen_at: float = 0.0
