"""Settings from the environment: read once, frozen, refused when malformed.

`LATENTFARM_*` variables name the farm, the usual `AWS_*` variables the S3 credentials. A farm started by
`latentfarm up` leaves its addresses and credentials in `farm.json` in its data folder, readable by the owner
alone; whatever the environment leaves open is taken from there.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from latentfarm_shared.embeddings.refusals import Caps
from latentfarm_shared.errors import BadSettings, NoFarm, nearest

FARM_FILE, SECRET_FILE = "farm.json", "secret-key"


class FarmFile(BaseModel):
    """What a farm started here tells other terminals of this user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    redis_url: str
    redis_password: str
    s3_endpoint: str
    s3_access_key: str
    s3_secret_key: str
    s3_bucket: str
    pid: int

    @classmethod
    def read(cls, data: Path) -> FarmFile | None:
        """Read `farm.json` in a data folder; None if no farm was ever started there."""
        path = data / FARM_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, OSError) as error:
            raise BadSettings("LATENTFARM_DATA", f"{path} cannot be read: {type(error).__name__}") from error

    @property
    def token(self) -> str:
        """The same in one word, for `worker --join`."""
        text = self.model_dump_json(exclude={"pid"})
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def from_token(cls, token: str) -> FarmFile:
        """Read a token.

        Raises:
            BadSettings: it is none.
        """
        try:
            raw = base64.urlsafe_b64decode(token.strip() + "=" * (-len(token.strip()) % 4))
            return cls.model_validate(json.loads(raw) | {"pid": 0})
        except (ValueError, TypeError) as error:
            raise BadSettings("LATENTFARM_JOIN", "is no token of 'latentfarm up --listen'; copy it whole") from error

    @property
    def is_local(self) -> bool:
        """Whether it is reached without leaving this machine."""
        hosts = {urlsplit(self.redis_url).hostname, urlsplit(self.s3_endpoint).hostname}
        return hosts <= {"127.0.0.1", "localhost", "::1"}

    def write(self, data: Path) -> None:
        """Replace `farm.json` in a data folder as a whole, readable by the owner alone."""
        partial = data / (FARM_FILE + ".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(self.model_dump(), file, indent=1)
        os.replace(partial, data / FARM_FILE)


class _Environment(BaseModel):
    """The variables as they are named; docs/settings.md explains each."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    LATENTFARM_DATA: Path | None = None
    LATENTFARM_REDIS_URL: str | None = Field(None, pattern=r"^rediss?://.+")
    LATENTFARM_REDIS_PASSWORD: str | None = None
    LATENTFARM_S3_ENDPOINT: str | None = Field(None, pattern=r"^https?://.+")
    LATENTFARM_S3_BUCKET: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    LATENTFARM_CACHE: Path | None = None
    LATENTFARM_DEVICE: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?|mps)$")
    LATENTFARM_SLOTS: int = Field(8, ge=1, le=256)
    LATENTFARM_POLICY: Literal["park", "share"] = "park"
    LATENTFARM_DETERMINISM: Literal["default", "strict"] = "default"
    LATENTFARM_DTYPE: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    LATENTFARM_CHANNELS_LAST: bool | None = None
    LATENTFARM_COMPILE: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    LATENTFARM_OFFLOAD_TEXT: bool = False
    LATENTFARM_MEMORY_MB: int = Field(0, ge=0)
    LATENTFARM_CHECKPOINTS_MB: int = Field(0, ge=0)
    LATENTFARM_UNPUBLISHED_MB: int = Field(256, ge=1)
    LATENTFARM_UPSCALERS: Path | None = None
    LATENTFARM_OWNER: str = Field("", max_length=100, pattern=r"^[^/\s]*$")
    LATENTFARM_EMBEDDINGS_DIR: Path | None = None
    LATENTFARM_EMBEDDINGS_MB: int = Field(512, ge=1)
    LATENTFARM_EMBEDDING_FILE_MB: int = Field(16, ge=1, le=1024)
    LATENTFARM_EMBEDDING_VECTORS: int = Field(512, ge=1, le=10_000)
    LATENTFARM_INTAKE_MEMORY_MB: int = Field(448, ge=256)
    LATENTFARM_INTAKE_S: float = Field(4.0, gt=0, le=600)
    LATENTFARM_CIVITAI_URL: str = Field("https://civitai.com", pattern=r"^https?://.+")
    LATENTFARM_CIVITAI_TOKEN: str | None = None
    LATENTFARM_ALLOW_PRIVATE_URLS: bool = False
    LATENTFARM_ENGINE: Literal["torch", "simulated"] = "torch"
    LATENTFARM_IMAGE_SECONDS: float = Field(1.0, ge=0, le=3600)
    LATENTFARM_JITTER: float = Field(0.0, ge=0, le=1)
    LATENTFARM_SIMULATE_S3: bool = True
    LATENTFARM_LANES: str = Field("interactive,batch", pattern=r"^(interactive|batch|interactive,batch)$")
    LATENTFARM_TAGS: str = Field("", pattern=r"^[\w.:-]*(,[\w.:-]+)*$")
    LATENTFARM_STALL_S: float | None = Field(None, gt=0)
    LATENTFARM_JOIN: str | None = None
    LATENTFARM_GRACE_S: float = Field(20.0, ge=0, le=3600)
    LATENTFARM_LOG_LEVEL: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    LATENTFARM_LOG_FORMAT: Literal["console", "json"] = "console"
    LATENTFARM_API_HOST: str = "127.0.0.1"
    LATENTFARM_API_PORT: int = Field(8188, ge=0, le=65535)
    LATENTFARM_SECRET_KEY: str | None = Field(None, min_length=16)
    LATENTFARM_API_ORIGINS: str = Field("", pattern=r"^(https?://[^/,\s]+(,https?://[^/,\s]+)*)?$")
    AWS_ACCESS_KEY_ID: str | None = None
    AWS_SECRET_ACCESS_KEY: str | None = None
    AWS_REGION: str = "us-east-1"

    @field_validator("LATENTFARM_REDIS_URL", "LATENTFARM_S3_ENDPOINT")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        """Refuse an address whose host or port makes no sense."""
        if value is not None and (any(c.isspace() for c in value) or urlsplit(value).port == 0):
            raise ValueError("is no address")
        return value


VARIABLES = tuple(_Environment.model_fields)
CLIENT_VARIABLES = ("LATENTFARM_API_URL", "LATENTFARM_API_KEY", "LATENTFARM_CONFIG")
"""Those that clients over HTTP read, and no process of the farm."""
FOR_PRODUCERS = ("LATENTFARM_CIVITAI_TOKEN", "LATENTFARM_SECRET_KEY")
"""Secrets of those who take embeddings in and send webhooks; workers and servers are started without them."""


class Settings(BaseModel):
    """Everything a process of the farm needs to know before it starts. Times are in seconds."""

    model_config = ConfigDict(frozen=True)

    data: Path
    cache: Path
    redis_url: str
    redis_password: str | None
    s3_endpoint: str | None
    s3_bucket: str
    s3_access_key: str | None
    s3_secret_key: str | None
    s3_region: str
    device: str
    slots: int
    policy: Literal["park", "share"]
    determinism: Literal["default", "strict"]
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    channels_last: bool | None
    compile_mode: Literal["off", "default", "reduce-overhead", "max-autotune"]
    offload_text: bool
    memory_mb: int
    checkpoints_mb: int
    unpublished_mb: int
    upscalers: Path
    owner: str
    embeddings_dir: Path | None
    embeddings_mb: int
    caps: Caps
    civitai_url: str
    civitai_token: str | None = Field(repr=False)
    allow_private_urls: bool
    engine: Literal["torch", "simulated"]
    image_seconds: float
    jitter: float
    simulate_s3: bool
    lanes: tuple[Literal["interactive", "batch"], ...]
    tags: tuple[str, ...]
    stall_s: float | None
    grace_s: float
    log_level: str
    log_format: str
    api_host: str
    api_port: int
    api_origins: tuple[str, ...]
    secret_key: str | None = Field(None, repr=False)

    @property
    def broker_url(self) -> str:
        """The Redis URL with its password, as clients take it; never log it."""
        if not self.redis_password:
            return self.redis_url
        parts = urlsplit(self.redis_url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{quote(self.redis_password, safe='')}@{host}"))

    @classmethod
    def load(cls, data: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the environment and, where it is silent, the farm in the data folder.

        Raises:
            BadSettings: a variable is malformed or misspelt.
            NoFarm: neither names a farm.
        """
        env = _read(environ)
        folder = data_folder(data, env.LATENTFARM_DATA)
        farm = FarmFile.from_token(env.LATENTFARM_JOIN) if env.LATENTFARM_JOIN else FarmFile.read(folder)
        if env.LATENTFARM_REDIS_URL is None and farm is None:
            raise NoFarm(f"in {folder}")
        return cls.model_validate(
            {
                "data": folder,
                "cache": env.LATENTFARM_CACHE or folder / "cache",
                "s3_region": env.AWS_REGION,
                "device": env.LATENTFARM_DEVICE,
                "slots": env.LATENTFARM_SLOTS,
                "policy": env.LATENTFARM_POLICY,
                "determinism": env.LATENTFARM_DETERMINISM,
                "dtype": env.LATENTFARM_DTYPE,
                "channels_last": env.LATENTFARM_CHANNELS_LAST,
                "compile_mode": env.LATENTFARM_COMPILE,
                "offload_text": env.LATENTFARM_OFFLOAD_TEXT,
                "memory_mb": env.LATENTFARM_MEMORY_MB,
                "checkpoints_mb": env.LATENTFARM_CHECKPOINTS_MB,
                "unpublished_mb": env.LATENTFARM_UNPUBLISHED_MB,
                "upscalers": env.LATENTFARM_UPSCALERS or folder / "upscalers",
                "owner": env.LATENTFARM_OWNER,
                "embeddings_dir": env.LATENTFARM_EMBEDDINGS_DIR,
                "embeddings_mb": env.LATENTFARM_EMBEDDINGS_MB,
                "caps": _caps(env),
                "civitai_url": env.LATENTFARM_CIVITAI_URL,
                "civitai_token": env.LATENTFARM_CIVITAI_TOKEN,
                "allow_private_urls": env.LATENTFARM_ALLOW_PRIVATE_URLS,
                "engine": env.LATENTFARM_ENGINE,
                "image_seconds": env.LATENTFARM_IMAGE_SECONDS,
                "jitter": env.LATENTFARM_JITTER,
                "simulate_s3": env.LATENTFARM_SIMULATE_S3,
                "lanes": tuple(env.LATENTFARM_LANES.split(",")),
                "tags": tuple(filter(None, env.LATENTFARM_TAGS.split(","))),
                "stall_s": env.LATENTFARM_STALL_S,
                "grace_s": env.LATENTFARM_GRACE_S,
                "log_level": env.LATENTFARM_LOG_LEVEL,
                "log_format": env.LATENTFARM_LOG_FORMAT,
                "api_host": env.LATENTFARM_API_HOST,
                "api_port": env.LATENTFARM_API_PORT,
                "secret_key": env.LATENTFARM_SECRET_KEY,
                "api_origins": tuple(filter(None, env.LATENTFARM_API_ORIGINS.split(","))),
                **_services(env, farm),
            }
        )


def _services(env: _Environment, farm: FarmFile | None) -> dict[str, str | None]:
    """Return where Redis and S3 are and how to enter: what the environment says, else what the local farm left.

    A farm at another address than the environment's is not the one meant. A store's keys belong to the store.
    """
    given = {
        "redis_url": env.LATENTFARM_REDIS_URL,
        "redis_password": env.LATENTFARM_REDIS_PASSWORD,
        "s3_endpoint": env.LATENTFARM_S3_ENDPOINT,
        "s3_bucket": env.LATENTFARM_S3_BUCKET,
    }
    open_ = {"redis_password": None, "s3_endpoint": None, "s3_bucket": "latentfarm"}
    keys = {"s3_access_key": env.AWS_ACCESS_KEY_ID, "s3_secret_key": env.AWS_SECRET_ACCESS_KEY}
    if farm is not None and given["redis_url"] in (None, farm.redis_url):
        left = farm.model_dump(include=set(given))
        if given["s3_endpoint"] in (None, farm.s3_endpoint):
            keys = {"s3_access_key": farm.s3_access_key, "s3_secret_key": farm.s3_secret_key}
    else:
        left = {}
    return open_ | left | {name: value for name, value in given.items() if value} | keys


def secret_key_of(settings: Settings) -> str | None:
    """Return what webhook secrets are encrypted with: as it is set, or as the farm started in the data folder keeps it."""
    if settings.secret_key is not None:
        return settings.secret_key
    farm = FarmFile.read(settings.data)
    if farm is None or farm.redis_url != settings.redis_url:
        return None
    try:
        return (settings.data / SECRET_FILE).read_text(encoding="utf-8").strip() or None
    except OSError:  # there is none, or it is somebody else's
        return None


def data_folder(given: Path | None, from_environment: Path | None = None) -> Path:
    """Return the folder of the local farm: the one given, the environment's, or the user's own."""
    folder = given or from_environment or Path(platformdirs.user_data_dir("latentfarm", appauthor=False))
    return folder.expanduser().absolute()


def _caps(env: _Environment) -> Caps:
    return Caps(
        file_mb=env.LATENTFARM_EMBEDDING_FILE_MB,
        vectors=env.LATENTFARM_EMBEDDING_VECTORS,
        memory_mb=env.LATENTFARM_INTAKE_MEMORY_MB,
        seconds=env.LATENTFARM_INTAKE_S,
    )


def without_secrets_of_producers(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment for a worker or a server."""
    return {name: value for name, value in environ.items() if name not in FOR_PRODUCERS}


def environment_caps(environ: Mapping[str, str] = os.environ) -> Caps:
    """Return how much of an embedding file is read, which needs no farm."""
    return _caps(_read(environ))


def environment_api_port(environ: Mapping[str, str] = os.environ) -> int:
    """Return where the API is to listen."""
    return _read(environ).LATENTFARM_API_PORT


def environment_data(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return `LATENTFARM_DATA`, checking every other variable on the way."""
    return _read(environ).LATENTFARM_DATA


def _read(environ: Mapping[str, str]) -> _Environment:
    for name in environ:
        if name.startswith("LATENTFARM_") and name not in VARIABLES + CLIENT_VARIABLES:
            near = nearest(name, VARIABLES, 1)
            raise BadSettings(name, "is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
    values = {name: environ[name] for name in VARIABLES if environ.get(name)}
    try:
        return _Environment.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadSettings(str(first["loc"][0]), first["msg"].lower()) from error
