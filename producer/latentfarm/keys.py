"""API keys: who may do what in whose name.

A key is shown once, when it is made; Redis holds its SHA-256 alone. Keys are long random words, so a slow hash would gain
nothing.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Literal, get_args

from latentfarm_shared.errors import InvalidField, NotAllowed, UnknownName
from latentfarm_shared.ledger import Ledger
from latentfarm_shared.ledger.ledger import translated
from latentfarm_shared.library import check_owner
from pydantic import BaseModel, ConfigDict, Field, ValidationError

PREFIX = "lf_"
Scope = Literal["submit", "read", "embeddings", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEYS, CLOSED = "lf:api:keys", "lf:api:closed"
REMEMBERED_S, MOST_REMEMBERED = 1.0, 10_000


class ApiKey(BaseModel):
    """What a key allows. `images` is how many it may submit in all; times are in seconds since 1970.

    `admin` looks after the farm (keys, limits, workers, everybody's jobs); the other scopes are about the owner's own.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str
    name: str = Field("", max_length=100)
    scopes: tuple[Scope, ...] = ("submit", "read", "embeddings")
    images: int | None = Field(None, ge=1)
    requests_per_minute: int | None = Field(None, ge=1)
    created: float
    expires: float | None = None

    def allows(self, scope: Scope) -> bool:
        """Tell whether the key has a scope; `admin` has all, `submit` may read what it submitted."""
        return scope in self.scopes or "admin" in self.scopes or (scope == "read" and "submit" in self.scopes)


class ApiKeys:
    """The farm's keys. Safe to share between threads."""

    def __init__(self, ledger: Ledger) -> None:
        """Keep them in this ledger's Redis."""
        self._ledger = ledger
        self._seen: dict[str, tuple[float, ApiKey | None]] = {}

    def create(
        self,
        owner: str,
        *,
        scopes: tuple[str, ...] = ("submit", "read", "embeddings"),
        name: str = "",
        images: int | None = None,
        requests_per_minute: int | None = None,
        expires_in: float | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key; return it and its word, which nobody can tell again.

        Raises:
            InvalidField: the owner, a scope or a bound makes no sense.
        """
        strange = next((scope for scope in scopes if scope not in SCOPES), None)
        if strange is not None or not scopes:
            raise InvalidField("scopes", f"should be of {', '.join(SCOPES)}, got {strange!r}")
        if expires_in is not None and not 0 < expires_in < 100 * 365 * 86400:
            raise InvalidField("expires_in", f"should be above 0 seconds and below 100 years, got {expires_in!r}")
        word = PREFIX + secrets.token_urlsafe(32)
        now = time.time()
        values = {
            "id": secrets.token_hex(6), "owner": check_owner(owner), "name": name, "scopes": scopes, "images": images,
            "requests_per_minute": requests_per_minute, "created": now,
            "expires": None if expires_in is None else now + expires_in,
        }  # fmt: skip
        try:
            key = ApiKey.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidField(str(first["loc"][0]), first["msg"].lower()) from error
        with translated(), self._ledger.redis.pipeline() as pipe:
            pipe.hset(KEYS, _digest(word), key.model_dump_json())
            pipe.set(CLOSED, 1)
            pipe.execute()
        self._ledger.acknowledge()
        self._seen.clear()
        return key, word

    def ls(self) -> list[ApiKey]:
        """Return all keys, the newest first, expired ones too."""
        with translated():
            found = self._ledger.redis.hvals(KEYS)
        return sorted((ApiKey.model_validate_json(text) for text in found), key=lambda key: -key.created)

    def are_needed(self) -> bool:
        """Tell whether a key was ever made: from then on callers need one, also when the last is revoked."""
        with translated():
            return bool(self._ledger.redis.exists(CLOSED))

    def revoke(self, key_id: str) -> ApiKey:
        """Take a key away.

        Raises:
            UnknownName: there is none of this id.
        """
        with translated():
            found = {d: ApiKey.model_validate_json(text) for d, text in self._ledger.redis.hgetall(KEYS).items()}
        digest = next((digest for digest, key in found.items() if key.id == key_id), None)
        if digest is None:
            raise UnknownName.among("key", key_id, [key.id for key in found.values()])
        with translated():
            self._ledger.redis.hdel(KEYS, digest)
        self._seen.clear()
        return found[digest]

    def is_remembered(self, word: str) -> bool:
        """Tell whether `find` answers from memory."""
        return time.time() - self._seen.get(_digest(word), (0.0, None))[0] <= REMEMBERED_S

    def find(self, word: str) -> ApiKey:
        """Return the key of a word; looked up anew after a second, so that a revoked one ends soon.

        Raises:
            NotAllowed: there is none, or its time is over.
        """
        digest, now = _digest(word), time.time()
        at, key = self._seen.get(digest, (0.0, None))
        if now - at > REMEMBERED_S:
            with translated():
                text = self._ledger.redis.hget(KEYS, digest)
            key = ApiKey.model_validate_json(text) if text else None
            if len(self._seen) > MOST_REMEMBERED:
                self._seen.clear()
            self._seen[digest] = now, key
        if key is None:
            raise NotAllowed("this API key is not known here; make one with 'latentfarm keys create'", is_known=False)
        if key.expires is not None and key.expires <= now:
            raise NotAllowed("this API key has expired; ask for a new one", is_known=False)
        return key

    def charge(self, key: ApiKey, images: int) -> None:
        """Count images against what a key may submit in all.

        Raises:
            NotAllowed: they are more than are left.
        """
        if key.images is None:
            return
        counter = f"lf:api:key:{key.id}:images"
        with translated():
            used = int(self._ledger.redis.incrby(counter, images))
            if used > key.images:
                self._ledger.redis.decrby(counter, images)
                left = max(0, key.images - used + images)
                raise NotAllowed(f"this key may submit {key.images} images in all and has {left} left")

    def give_back(self, key: ApiKey, images: int) -> None:
        """Uncount images that were not submitted after all."""
        if key.images is not None:
            with translated():
                self._ledger.redis.decrby(f"lf:api:key:{key.id}:images", images)


def _digest(word: str) -> str:
    return hashlib.sha256(word.encode("utf-8", "replace")).hexdigest()
