"""Everything that can go wrong, as one tree.

    FarmError
    ├── UsageError                 exit 2: the request is wrong; sending it again changes nothing
    │   ├── InvalidField           a value the farm does not take
    │   ├── UnknownName            an embedding, checkpoint, sampler, job … that is not there
    │   ├── EmbeddingRefused       an embedding that is there but cannot be applied
    │   ├── EmbeddingInUse         an embedding that unfinished jobs use, so it is not removed
    │   ├── UnreadableFile         a file that is not what it should be
    │   │   └── NotAnEmbedding     a file that is no embedding the farm takes, with a code for why
    │   ├── AlreadyTaken           an id that somebody else's job has, or a key that came with another request
    │   ├── NotAllowed             a key that is unknown or expired, or that may not do this
    │   ├── BadSettings            an environment variable that makes no sense
    │   └── MissingExtra           a part of latentfarm that is not installed
    ├── Unavailable                exit 3: a service does not answer or lets nobody in; a retry may help
    │   ├── NoFarm                 there is no farm at this address or in this folder
    │   └── Busy                   the farm has too much waiting to take more now
    └── RenderError                exit 1: one image failed on a worker
        ├── EmbeddingNotInLock     a combined prompt asks for an embedding that its job does not hold
        ├── EmbeddingNotApplied    the proof of application differs from the job's lock
        ├── BrokenPicture          the picture is all black or not made of numbers, in float32 too
        ├── OutOfMemory            one image alone needs more memory than the device has
        ├── DeadlineExceeded       the image was not ready when it had to be
        └── RenderCanceled         the owner canceled the job while the image was in flight

An exception's `args` are its constructor's arguments, so it survives pickling and Celery; its text is `str()`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

LONGEST_NAME = 300


def cut(text: str, most: int = LONGEST_NAME) -> str:
    """Return a text as errors quote it, not longer than `most`, in characters that can be written."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


class FarmError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "FARM_ERROR"


class UsageError(FarmError):
    """The request is wrong and has to be changed."""

    exit_code = 2
    code = "USAGE"


class InvalidField(UsageError):
    """`field` holds a value the farm does not take; `reason` says which it does."""

    code = "INVALID_FIELD"

    def __init__(self, field: str, reason: str, line: int | None = None) -> None:
        field, reason = cut(field), cut(reason, 1500)
        super().__init__(field, reason, line)
        self.field, self.reason, self.line = field, reason, line

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.field}: {self.reason}"


class UnknownName(UsageError):
    """There is no `kind` called `name`; the nearest names are `suggestions`."""

    code = "UNKNOWN_NAME"

    def __init__(self, kind: str, name: str, suggestions: tuple[str, ...] = ()) -> None:
        name = cut(name)
        super().__init__(kind, name, suggestions)
        self.kind, self.name, self.suggestions = kind, name, suggestions

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> UnknownName:
        """Build the error with the names nearest to `name` among `known`."""
        return cls(kind, name, nearest(name, known))

    def __str__(self) -> str:
        text = f"there is no {self.kind} called {self.name!r}"
        if self.suggestions:
            text += f"; did you mean {' or '.join(repr(s) for s in self.suggestions)}?"
        return text


class EmbeddingRefused(UsageError):
    """The embedding `name` exists but cannot be applied, because of `reason`."""

    code = "EMBEDDING_REFUSED"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"embedding {self.name!r} cannot be applied: {self.reason}"


class EmbeddingInUse(UsageError):
    """The embedding `name` is used by `jobs` unfinished jobs."""

    code = "EMBEDDING_IN_USE"

    def __init__(self, name: str, jobs: int) -> None:
        super().__init__(name, jobs)
        self.name, self.jobs = name, jobs

    def __str__(self) -> str:
        jobs = "an unfinished job uses" if self.jobs == 1 else f"{self.jobs} unfinished jobs use"
        return f"{jobs} embedding {self.name!r}; wait for the end, or force it: they keep what they have"


class AlreadyTaken(UsageError):
    """The `kind` called `name` cannot be given again, because of `reason`."""

    code = "ALREADY_TAKEN"

    def __init__(self, kind: str, name: str, reason: str) -> None:
        name = cut(name)
        super().__init__(kind, name, reason)
        self.kind, self.name, self.reason = kind, name, reason

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} {self.reason}"


class NotAllowed(UsageError):
    """Whoever asks may not, because of `reason`; `is_known` says whether it is known who asks."""

    code = "NOT_ALLOWED"

    def __init__(self, reason: str, is_known: bool = True) -> None:
        super().__init__(reason, is_known)
        self.reason, self.is_known = reason, is_known

    def __str__(self) -> str:
        return self.reason


class UnreadableFile(UsageError):
    """`path` cannot be used; `reason` says what it is or lacks."""

    code = "UNREADABLE_FILE"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BadSettings(UsageError):
    """The environment variable `name` is malformed."""

    code = "BAD_SETTINGS"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class MissingExtra(UsageError):
    """The command needs the extra `extra`, which is not installed."""

    code = "MISSING_EXTRA"

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(extra, purpose)
        self.extra, self.purpose = extra, purpose

    def __str__(self) -> str:
        return f"{self.purpose} needs more packages: pip install 'latentfarm[{self.extra}]'"


class Unavailable(FarmError):
    """`service` does not answer or refuses us; `reason` says how, `advice` what to do."""

    exit_code = 3
    code = "UNAVAILABLE"

    def __init__(self, service: str, reason: str, advice: str = "") -> None:
        super().__init__(service, reason, advice)
        self.service, self.reason, self.advice = service, reason, advice

    def __str__(self) -> str:
        return f"{self.service}: {self.reason}" + (f"; {self.advice}" if self.advice else "")


class NoFarm(Unavailable):
    """No farm is running where we looked."""

    code = "NO_FARM"

    def __init__(self, where: str) -> None:
        Exception.__init__(self, where)
        self.service, self.reason, self.advice = "farm", f"none is running {where}", ""
        self.where = where

    def __str__(self) -> str:
        return f"no farm is running {self.where}; start one with 'latentfarm up', log in to one with 'latentfarm login', or set LATENTFARM_REDIS_URL"


class Busy(Unavailable):
    """The farm takes no more work right now, because of `reason`; try again after `retry_after_s` seconds."""

    code = "BUSY"

    def __init__(self, reason: str, retry_after_s: int) -> None:
        Exception.__init__(self, reason, retry_after_s)
        self.service, self.reason, self.advice = "farm", reason, f"try again in {retry_after_s} s"
        self.retry_after_s = retry_after_s


class RenderError(FarmError):
    """Rendering one image failed with `code` because of `reason`."""

    code = "RENDER_FAILED"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class EmbeddingNotInLock(RenderError):
    """At this point of a large sweep the prompt asks for the embedding `reason`, which the job's lock does not hold."""

    code = "EMBEDDING_NOT_IN_LOCK"

    def __str__(self) -> str:
        return f"the combined prompt asks for embedding {self.reason!r}, which no single value of the sweep names"


class EmbeddingNotApplied(RenderError):
    """What entered the text encoder is not what the job's lock promises."""

    code = "EMBEDDING_NOT_APPLIED"


class BrokenPicture(RenderError):
    """The finished picture `reason` (is all black, holds values that are not finite), in float32 as well."""

    code = "BROKEN_PICTURE"

    def __str__(self) -> str:
        return f"the picture {self.reason}, in float32 as well; try another seed, sampler or CFG scale"


class OutOfMemory(RenderError):
    """One image alone did not fit into the device's memory while `reason`."""

    code = "OUT_OF_MEMORY"

    def __str__(self) -> str:
        return f"the device ran out of memory {self.reason}, with no other image beside; make it smaller"


class DeadlineExceeded(RenderError):
    """The image's deadline passed before it was rendered."""

    code = "DEADLINE_EXCEEDED"


class RenderCanceled(RenderError):
    """The job was canceled while this image was in flight."""

    code = "CANCELED"


def nearest(name: str, known: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """Return up to `count` of the `known` names that look like `name`, the most alike first."""
    if len(name) > LONGEST_NAME:
        return ()
    by_lower = {item.lower(): item for item in known}
    return tuple(by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6))
