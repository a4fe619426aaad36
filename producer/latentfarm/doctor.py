"""What is wrong with a farm, and what to do about it: every part looked at, the first trouble hides none of the others."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from latentfarm_shared import __version__
from latentfarm_shared.errors import FarmError
from latentfarm_shared.ledger.ledger import translated
from latentfarm_shared.registry import blob_key
from latentfarm_shared.settings import secret_key_of
from latentfarm_shared.storage import ObjectConflict
from pydantic import BaseModel, ConfigDict

from latentfarm.farm import DirectFarm
from latentfarm.keys import ApiKeys

SKEW_S, SLOW_MS, LEAST_GB = 2.0, 20.0, 5.0
Verdict = Literal["ok", "warning", "bad"]


class Finding(BaseModel):
    """What was found of one part; `advice` says what to do unless it is ok."""

    model_config = ConfigDict(frozen=True)

    part: str
    verdict: Verdict
    message: str
    advice: str = ""


def ok(part: str, message: str) -> Finding:
    """Return that a part is well."""
    return Finding(part=part, verdict="ok", message=message)


def warning(part: str, message: str, advice: str) -> Finding:
    """Return that a part works, but not for long or not well."""
    return Finding(part=part, verdict="warning", message=message, advice=advice)


def bad(part: str, message: str, advice: str) -> Finding:
    """Return that a part does not work."""
    return Finding(part=part, verdict="bad", message=message, advice=advice)


def examine(farm: DirectFarm) -> Iterator[Finding]:
    """Look at every part of a farm."""
    looks: tuple[tuple[str, Callable[[DirectFarm], Iterator[Finding]]], ...] = (
        ("Redis", _redis), ("S3", _s3), ("disk", _disk), ("checkpoints", _checkpoints), ("workers", _workers),
        ("device", _device), ("API", _api),
    )  # fmt: skip
    for part, look in looks:
        try:
            yield from look(farm)
        except FarmError as error:
            yield bad(part, str(error), "mend this first; what hangs on it was not looked at")


def _redis(farm: DirectFarm) -> Iterator[Finding]:
    client = farm.ledger.redis
    with translated():
        began = time.perf_counter()
        for _ in range(5):
            client.ping()
        took = (time.perf_counter() - began) * 200
        info = client.info()
        seconds, micros = client.time()
    skew = time.time() - (int(seconds) + int(micros) / 1e6)
    name = f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info['redis_version']}"
    slow = warning("Redis", f"answers in {took:.1f} ms", "put it nearer to the workers, or look at its load")
    yield slow if took > SLOW_MS else ok("Redis", f"{name}, answers in {took:.1f} ms")
    if abs(skew) > SKEW_S:
        yield warning(
            "clock", f"this machine and Redis differ by {skew:+.1f} s", "let both ask the same time server (NTP)"
        )
    else:
        yield ok("clock", f"{skew:+.2f} s from Redis")
    if int(info.get("aof_enabled", 0)):
        yield ok("log", "Redis writes its log to disk")
    else:
        yield bad("log", "Redis keeps no log, so a restart loses every job", "start it with --appendonly yes")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield bad("memory", f"Redis may throw jobs away ({policy})", "set maxmemory-policy noeviction")
    most, used = int(info.get("maxmemory", 0)), int(info["used_memory"])
    if most and used > 0.7 * most:
        yield bad(
            "memory", f"{used / most:.0%} of Redis' memory is in use", "delete old jobs (--keep), or give it more"
        )
    else:
        yield ok(
            "memory", f"Redis uses {used / 2**20:.0f} MB" + (f" of {most / 2**20:.0f}" if most else ", without a bound")
        )


def _s3(farm: DirectFarm) -> Iterator[Finding]:
    farm.store.check()
    key, data = f"doctor/{secrets.token_hex(8)}", b"a small object"
    farm.store.put_once(key, data, "text/plain", "one")
    try:
        if farm.store.get(key) != data:
            yield bad("S3", "gives back something else than was written", "this is no store the farm can use")
            return
        yield ok("S3", f"{farm.store.url('')} can be written and read")
        try:
            farm.store.put_once(key, b"another", "text/plain", "two")
        except ObjectConflict:
            yield ok("S3 conditions", "what is there is not overwritten")
        else:
            yield bad("S3 conditions", "overwrites what is there", "use a store with conditional PUT, or report this")
    finally:
        farm.store.delete_all(key)
    yield ok("S3 deletion", "objects can be deleted")


def _disk(farm: DirectFarm) -> Iterator[Finding]:
    for name, path in (("data", farm.settings.data), ("cache", farm.settings.cache)):
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free / 2**30
        if not os.access(there, os.W_OK):
            yield bad("disk", f"{name} folder {path} cannot be written", f"make it writable for user {os.getuid()}")
        elif free < LEAST_GB:
            yield warning("disk", f"{free:.1f} GB free for {name} in {path}", "make room; checkpoints take gigabytes")
        else:
            yield ok("disk", f"{free:.0f} GB free for {name}")
    private = farm.settings.data / "farm.json"
    if private.exists() and private.stat().st_mode & 0o077:
        yield bad("permissions", f"others can read {private}, which holds passwords", f"chmod 600 {private}")


def _checkpoints(farm: DirectFarm) -> Iterator[Finding]:
    found = farm.models.ls()
    if not found:
        yield bad("checkpoints", "there is none", "latentfarm models add FOLDER, FILE or HUB-ID")
    for record in found:
        missing = [f for f in record.files if record.source == "s3" and not farm.store.exists(blob_key(f.sha256))]
        if missing:
            reason = f"{record.name}: {len(missing)} of its files are gone from S3"
            yield bad("checkpoints", reason, f"latentfarm models add it again, as {record.name}")
        else:
            yield ok("checkpoints", f"{record.name} ({record.family}, {len(record.files)} files)")


def _workers(farm: DirectFarm) -> Iterator[Finding]:
    found = farm.workers()
    if not found:
        yield bad("workers", "none is alive", "latentfarm worker, or latentfarm up")
    for worker in found:
        if worker.version and worker.version != __version__:
            advice = "bring both to one version; jobs remember the version of their own rules"
            yield warning("workers", f"{worker.name} is version {worker.version}, this is {__version__}", advice)
        elif not worker.queues:
            yield warning("workers", f"{worker.name} is {worker.phase}", "wait until it is warm, or look at its log")
        elif worker.draining:
            yield warning("workers", f"{worker.name} is drained", f"latentfarm workers undrain {worker.station}")
        else:
            yield ok("workers", f"{worker.name} on {worker.device}, {worker.claims} of {worker.slots} slots in use")
    for station, story in farm.ledger.aside().items():
        yield bad("workers", f"{station} is set aside: {story}", f"mend it, then latentfarm workers release {station}")


def _device(farm: DirectFarm) -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield ok("device", "no torch here, which producers do not need")
        return
    if farm.settings.device.startswith("cuda") and not Path("/dev/nvidiactl").exists():
        yield bad(
            "device",
            f"LATENTFARM_DEVICE is {farm.settings.device}, and there is no NVIDIA driver",
            "install it, or set cpu",
        )
    else:
        yield ok("device", f"{farm.settings.device} for workers that are started here")


def _api(farm: DirectFarm) -> Iterator[Finding]:
    if not ApiKeys(farm.ledger).are_needed():
        yield ok("API", "no keys: it answers this machine alone")
    elif secret_key_of(farm.settings) is None:
        yield warning("API", "there are keys, but webhooks cannot be signed", "set LATENTFARM_SECRET_KEY")
    else:
        yield ok("API", "callers need keys")
