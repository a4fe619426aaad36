"""Which farm a command is for: the one that is named, or set, or logged in to, or running on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from latentfarm.client.sync import Farm
    from latentfarm.farm import DirectFarm

Data = Annotated[
    Path | None, typer.Option("--data", help="Data folder of a farm started by 'latentfarm up'.", show_default=False)
]
DIRECT = ("LATENTFARM_REDIS_URL", "LATENTFARM_DATA")
_named: list[str] = []


def name_farm(name: str | None) -> None:
    """Remember the profile that this command is for."""
    _named[:] = [name] if name else []


def reach(data: Path | None, timeout_s: float = 60.0) -> Farm | DirectFarm:
    """Find the farm, over HTTP if that is how it is known; `timeout_s` is that of one try of a call.

    Raises:
        NoFarm, Unavailable: none is there.
        UnknownName: there is no profile of the name.
    """
    profile = _profile(data)
    if profile is None:
        return _direct(data)
    from latentfarm.client.sync import Farm  # noqa: PLC0415 - keeps --help fast

    url, key = profile
    return Farm(url, key or "", timeout_s=timeout_s)


def connect(data: Path | None) -> DirectFarm:
    """Find the farm for a command that speaks to its Redis and S3 itself.

    Raises:
        NoFarm, Unavailable: none is there.
        UsageError: it is known over HTTP alone.
    """
    profile = _profile(data)
    if profile is not None:
        from latentfarm_shared.errors import UsageError  # noqa: PLC0415

        message = (
            f"this command speaks to the farm's own Redis and S3, and {profile[0]} is reached over HTTP; "
            "run it where the farm is, with --data, or with LATENTFARM_REDIS_URL set"
        )
        raise UsageError(message)
    return _direct(data)


def _direct(data: Path | None) -> DirectFarm:
    from latentfarm.farm import DirectFarm  # noqa: PLC0415

    return DirectFarm.from_env(data)


def _profile(data: Path | None) -> tuple[str, str | None] | None:
    """Return address and key of the farm that is reached over HTTP; None if it is reached directly.

    Raises:
        InvalidField: two farms are named.
    """
    from latentfarm_shared.errors import InvalidField  # noqa: PLC0415

    from latentfarm.client.profiles import URL, profile_set, read_profiles  # noqa: PLC0415

    if data is not None:
        if _named:
            raise InvalidField("farm", "goes without --data; each names another farm")
        return None
    if _named:
        found = read_profiles().of(_named[0])
    elif not os.environ.get(URL) and any(os.environ.get(name) for name in DIRECT):
        return None
    else:
        set_ = profile_set()
        if set_ is None:
            return None
        found = set_
    return found.url, found.api_key
