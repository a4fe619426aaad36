"""Which farm is meant when none is named: LATENTFARM_API_URL, or the one that 'latentfarm login' remembers.

Addresses and keys lie in a file of the user's own configuration folder that nobody else may read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs
from latentfarm_shared.errors import BadSettings, InvalidField, UnknownName, UsageError
from latentfarm_shared.settings import CLIENT_VARIABLES
from pydantic import BaseModel, ValidationError

URL, KEY, CONFIG = CLIENT_VARIABLES


class Profile(BaseModel):
    """A farm somebody logged in to."""

    url: str
    api_key: str | None = None


class Profiles(BaseModel):
    """All of them, and which is meant when none is named."""

    current: str | None = None
    profiles: dict[str, Profile] = {}

    def of(self, name: str) -> Profile:
        """Return one.

        Raises:
            UnknownName: there is none of this name.
        """
        if name not in self.profiles:
            raise UnknownName.among("profile", name, self.profiles)
        return self.profiles[name]


def profiles_file(environ: Mapping[str, str] | None = None) -> Path:
    """Return where profiles lie: LATENTFARM_CONFIG, or the user's configuration folder."""
    folder = (os.environ if environ is None else environ).get(CONFIG)
    return Path(folder or platformdirs.user_config_dir("latentfarm", appauthor=False)) / "profiles.json"


def read_profiles(environ: Mapping[str, str] | None = None) -> Profiles:
    """Return the profiles.

    Raises:
        BadSettings: the file cannot be read.
    """
    path = profiles_file(environ)
    try:
        return Profiles.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Profiles()
    except (ValidationError, OSError) as error:
        raise BadSettings(
            "profiles", f"{path} cannot be read ({type(error).__name__}); remove it and log in again"
        ) from error


def write_profiles(found: Profiles, environ: Mapping[str, str] | None = None) -> None:
    """Keep profiles, for this user's eyes alone."""
    path = profiles_file(environ)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(found.model_dump(), file, indent=1, ensure_ascii=False)
    part.replace(path)


def profile_set(environ: Mapping[str, str] | None = None) -> Profile | None:
    """Return the farm that the environment names, or that somebody logged in to; None if there is neither."""
    environ = os.environ if environ is None else environ
    url = environ.get(URL)
    if url:
        return Profile(url=url, api_key=environ.get(KEY) or None)
    found = read_profiles(environ)
    return None if found.current is None else found.of(found.current)


def address_of(url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """Return the address and key that are meant; what is given goes before what is set. An empty key is none.

    A key that is set is for the address that is set, and for no other.

    Raises:
        InvalidField: no address is given, or set.
    """
    if url is None:
        found = profile_set()
        if found is None:
            raise InvalidField("url", f"is missing; pass a farm's address, set {URL} or run 'latentfarm login'")
        return checked(found.url), found.api_key if api_key is None else api_key or None
    address = checked(url)
    return address, _key_for(address) if api_key is None else api_key or None


def _key_for(address: str) -> str | None:
    """Return the key that is set for an address; none where nothing is, or what is set cannot be read."""
    try:
        found = profile_set()
        return found.api_key if found is not None and checked(found.url) == address else None
    except UsageError:
        return None


def checked(url: str) -> str:
    """Return a farm's address without what does not belong to it.

    Raises:
        InvalidField: it is none.
    """
    try:
        parts = urlsplit(url)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError:
        port_is_right = False
    if not port_is_right or parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise InvalidField("url", f"should be a farm's address, such as https://farm.example.com, got {url[:200]!r}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
