"""An embedding as it was read from a file: normalised tensors, named by their content, and the hashes others know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import PurePath

import numpy as np
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from latentfarm_shared.embeddings.layouts import Found
from latentfarm_shared.embeddings.pickles import Array
from latentfarm_shared.records import EmbeddingRecord, family_of


@dataclass(frozen=True)
class EmbeddingFile:
    """What a file holds: `tensors` by encoder, each `[vectors, width]` float32.

    `stem` is the name A1111 users know it by: the file's, or the one it was bundled under.
    """

    stem: str
    layout: str
    internal_name: str | None
    file_sha256: str
    tensors: dict[str, Array]
    file_name: str = ""
    needs_name: bool = False

    @classmethod
    def of(cls, found: Found, file_name: str, file_sha256: str) -> EmbeddingFile:
        """Combine what was found in a file with the file's own name and hash."""
        stem = found.internal_name if found.own_name and found.internal_name else PurePath(file_name).stem
        tensors = {key: np.ascontiguousarray(tensor, np.float32) for key, tensor in sorted(found.tensors.items())}
        return cls(stem, found.layout, found.internal_name, file_sha256, tensors, file_name, found.needs_name)

    @property
    def widths(self) -> dict[str, int]:
        """Width by encoder."""
        return {encoder: tensor.shape[1] for encoder, tensor in self.tensors.items()}

    @property
    def vectors(self) -> int:
        """How many tokens it stands for."""
        return int(next(iter(self.tensors.values())).shape[0])

    @property
    def family(self) -> str:
        """The family its widths belong to: sd1, sd2, sdxl, t5 or unknown."""
        return family_of(self.widths, "unknown")

    @property
    def content_id(self) -> str:
        """sha256 of the normalised tensors: the same in every container."""
        digest = hashlib.sha256()
        for encoder, tensor in sorted(self.tensors.items()):
            digest.update(f"{encoder} {tensor.shape[0]} {tensor.shape[1]}\n".encode())
            digest.update(np.ascontiguousarray(tensor, "<f4").tobytes())
        return digest.hexdigest()

    @property
    def legacy_checksum(self) -> str | None:
        """The four digits A1111 wrote as `Used embeddings: name [xxxx]`; None for several encoders."""
        if len(self.tensors) != 1:
            return None
        state = 0
        for value in np.trunc(next(iter(self.tensors.values())) * np.float32(100)).ravel().tolist():
            state = (state * 281 ^ int(value) * 997) & 0xFFFFFFFF
        return f"{state & 0xFFFF:04x}"

    def normalised(self) -> bytes:
        """Return the farm's own safetensors: float32, keys by encoder."""
        return save_safetensors(dict(sorted(self.tensors.items())))

    def named(self, stem: str) -> EmbeddingFile:
        """Return the same under another name, which it then has."""
        return replace(self, stem=stem, needs_name=False)

    def record(self, name: str | None = None) -> EmbeddingRecord:
        """Describe the file under `name`, by default its stem as in A1111."""
        return EmbeddingRecord(
            name=name or self.stem,
            content_id=self.content_id,
            file_sha256=self.file_sha256,
            vectors=self.vectors,
            widths=self.widths,
            internal_name=self.internal_name,
            layout=self.layout,
        )


def from_normalised(data: bytes, record: EmbeddingRecord) -> EmbeddingFile:
    """Read the farm's own safetensors back."""
    tensors = {key: np.asarray(tensor, np.float32) for key, tensor in load_safetensors(data).items()}
    return EmbeddingFile(record.name, record.layout, record.internal_name, record.file_sha256, tensors)
