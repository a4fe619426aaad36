"""Why a file is no embedding: a code for programs and a sentence for people; and the caps that bound what is read."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Code = Literal[
    "EMPTY", "CORRUPT", "LFS_POINTER", "WEB_PAGE", "ERROR_MESSAGE", "PICTURE", "TEXT", "NOT_AN_EMBEDDING",
    "UNSAFE", "TOO_LARGE", "BAD_SHAPE", "NOT_FINITE", "SEVERAL_TERMS", "NEEDS_NAME", "UNREADABLE", "TIMEOUT",
]  # fmt: skip


class Refusal(Exception):
    """A file is not taken; `code` is one of `Code`, `reason` says what it is."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


class Caps(BaseModel):
    """How much of a file is read before it is refused: `file_mb` and `memory_mb` in MiB, `seconds` of wall clock."""

    model_config = ConfigDict(frozen=True)

    file_mb: int = Field(16, ge=1)
    vectors: int = Field(512, ge=1)
    width: int = Field(16_384, ge=1)
    tensors: int = Field(4096, ge=1)
    members: int = Field(1024, ge=1)
    memory_mb: int = Field(448, ge=128)
    seconds: float = Field(4.0, gt=0)

    @property
    def file_bytes(self) -> int:
        """The largest content read from one file."""
        return self.file_mb * 2**20


DEFAULT_CAPS = Caps()
