"""Files of strangers are read in a child process with little memory and time, which can write nothing.

The parent opens the file and hands the child its descriptor over a socket; the child answers with tensors or with the
reason for a refusal. One that takes too long, or dies, is replaced, and its file refused. The child imports numpy and
Pillow, no torch, and ends with its parent.
"""

from __future__ import annotations

import array
import hashlib
import io
import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from latentfarm_shared.embeddings.files import EmbeddingFile
from latentfarm_shared.embeddings.layouts import Found, read_layout
from latentfarm_shared.embeddings.refusals import DEFAULT_CAPS, Caps, Code, Refusal
from latentfarm_shared.errors import Unavailable, UnreadableFile

_LENGTH = struct.Struct("<I")
START_S = 30.0  # importing numpy on a busy machine
_EMBEDDING, _PICTURE = b"f", b"p"
PREVIEW_EDGE, PREVIEW_PIXELS = 768, 2**25
PR_SET_PDEATHSIG = 1


# ---- parent


class NotAnEmbedding(UnreadableFile):
    """A file was refused; `refusal` is one of the codes of `Refusal`."""

    code = "NOT_AN_EMBEDDING"

    def __init__(self, path: str, reason: str, refusal: Code = "NOT_AN_EMBEDDING") -> None:
        super().__init__(path, reason)
        self.args = (path, reason, refusal)
        self.refusal = refusal


class Sandbox:
    """Reads embedding files one after the other in a child process. Safe to share between threads."""

    def __init__(self, caps: Caps = DEFAULT_CAPS) -> None:
        """Start nothing yet."""
        self.caps = caps
        self._child: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._guard = threading.Lock()
        self._farewell: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        """Read files inside."""
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()

    def read(self, path: Path) -> list[EmbeddingFile]:
        """Return every embedding in a file; more than one only where a LoRA bundles them.

        Raises:
            NotAnEmbedding: it cannot be opened or is no embedding; says what it is.
        """
        with opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            return self.read_open(file, path.name, digest)

    def read_one(self, path: Path) -> EmbeddingFile:
        """Return the one embedding in a file.

        Raises:
            NotAnEmbedding: as `read`, or it holds several.
        """
        found = self.read(path)
        if len(found) > 1:
            names = ", ".join(item.stem for item in found)
            raise NotAnEmbedding(
                str(path), f"SEVERAL_TERMS: it holds {len(found)} embeddings: {names}", "SEVERAL_TERMS"
            )
        return found[0]

    def read_open(self, file: BinaryIO, name: str, digest: str) -> list[EmbeddingFile]:
        """Return every embedding in an open file, which must be a real one; `name` and `digest` are as for `read`."""
        try:
            with self._guard:
                found = self._ask(file)
        except Refusal as refusal:
            raise NotAnEmbedding(name, str(refusal), refusal.code) from refusal
        return [EmbeddingFile.of(item, name, digest) for item in found]

    def picture(self, path: Path) -> bytes:
        """Return a stranger's picture of any kind as a PNG of moderate size, without what else was in it; nothing if it is none."""
        try:
            with opened(path) as file, self._guard:
                connection = self._ready()
                header, deadline = self._request(connection, _PICTURE, file)
                return _receive(connection, deadline) if "png" in header else b""
        except (NotAnEmbedding, TimeoutError, EOFError, OSError, ValueError):
            with self._guard:
                self._end()
            return b""

    def close(self) -> None:
        """End the child."""
        with self._guard:
            self._end()

    def _ask(self, file: BinaryIO) -> list[Found]:
        """Have one file read; a child that failed at it is ended."""
        connection = self._ready()
        try:
            header, deadline = self._request(connection, _EMBEDDING, file)
            if "code" in header:
                raise Refusal(header["code"], header["reason"])
            return [_found(item, connection, deadline) for item in header["found"]]
        except TimeoutError:
            self._end()
            raise Refusal("TIMEOUT", f"reading it took longer than {self.caps.seconds:g} s") from None
        except (EOFError, OSError, ValueError):
            self._end()
            raise Refusal("CORRUPT", f"reading it needed more than {self.caps.memory_mb} MB, or failed") from None

    def _request(self, connection: socket.socket, what: bytes, file: BinaryIO) -> tuple[dict[str, Any], float]:
        """Hand a file over; return the answer's header and until when the rest must come."""
        deadline = time.monotonic() + self.caps.seconds
        connection.settimeout(self.caps.seconds)
        connection.sendmsg([what], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))])
        return json.loads(_receive(connection, deadline)), deadline

    def _ready(self) -> socket.socket:
        if self._socket is not None and self._child is not None and self._child.poll() is None:
            return self._socket
        self._end()
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), self.caps.model_dump_json()]
        with theirs:
            self._child = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
            )
        self._socket = ours
        self._farewell = weakref.finalize(self, _end_child, self._child, ours)
        try:
            _receive(ours, time.monotonic() + START_S)  # "ready"
        except (EOFError, OSError) as error:
            self._end()
            raise Unavailable("the reader of embedding files", "it does not start", "is latentfarm whole?") from error
        return ours

    def _end(self) -> None:
        self._farewell()
        self._socket = self._child = None


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file of somebody's; errors name its path.

    Raises:
        NotAnEmbedding: it cannot be opened, is no file, or what is done with it inside refuses it.
    """
    try:
        if path.exists() and not path.is_file():
            raise NotAnEmbedding(str(path), "UNREADABLE: is no file", "UNREADABLE")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        reason = f"UNREADABLE: cannot be opened ({error.strerror or error})"
        raise NotAnEmbedding(str(path), reason, "UNREADABLE") from error
    except NotAnEmbedding as error:
        raise NotAnEmbedding(str(path), error.reason, error.refusal) from error.__cause__


def _end_child(child: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    child.kill()
    child.wait()


def _receive(connection: socket.socket, deadline: float) -> bytes:
    """Receive one message: its length, then its bytes."""
    return _exactly(connection, _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))[0], deadline)


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(min(count - len(data), 2**20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _found(item: dict[str, object], connection: socket.socket, deadline: float) -> Found:
    """Build one embedding from its description and the tensors that follow."""
    shapes: dict[str, list[int]] = item.pop("shapes")  # type: ignore[assignment]
    tensors = {}
    for encoder, shape in shapes.items():
        tensors[encoder] = np.frombuffer(_receive(connection, deadline), "<f4").reshape(shape)
    return Found(tensors=tensors, **item)  # type: ignore[arg-type]


# ---- child


def _limit(caps: Caps) -> None:
    """Give up memory, files, processes and core dumps beyond what one embedding needs, and end with the parent."""
    import ctypes  # noqa: PLC0415 - only in the child
    import resource  # noqa: PLC0415
    import signal  # noqa: PLC0415

    limits = [(resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 32)]
    if sys.platform == "linux":
        limits += [(resource.RLIMIT_AS, caps.memory_mb * 2**20), (resource.RLIMIT_NPROC, 0)]
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for kind, value in limits:
        resource.setrlimit(kind, (value, value))


def _limit_time(caps: Caps) -> None:
    """Let the kernel end this process when one file takes more processor time than it may."""
    import resource  # noqa: PLC0415

    usage = resource.getrusage(resource.RUSAGE_SELF)
    allowed = math.ceil(usage.ru_utime + usage.ru_stime + caps.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))


def _serve(connection: socket.socket, caps: Caps) -> None:
    _send(connection, b"ready")
    while True:
        message, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
        if not message:
            return
        (_, _, descriptor), *_ = ancillary
        _limit_time(caps)
        with os.fdopen(array.array("i", descriptor)[0], "rb") as file:
            for part in (_picture if message == _PICTURE else _embedding)(file, caps):
                _send(connection, part)


def _embedding(file: BinaryIO, caps: Caps) -> Iterator[bytes]:
    """Yield the answer to a file: a header, and the tensors it describes."""
    from latentfarm_shared.embeddings.containers import read_container  # noqa: PLC0415 - the parent needs none of it

    try:
        found = read_layout(read_container(file, caps), caps)
    except Refusal as refusal:
        yield json.dumps({"code": refusal.code, "reason": refusal.reason}).encode()
        return
    except MemoryError:
        reason = f"reading it needs more than {caps.memory_mb} MB"
        yield json.dumps({"code": "TOO_LARGE", "reason": reason}).encode()
        return
    except Exception as error:  # noqa: BLE001 - whatever a strange file provokes is that file's refusal
        reason = f"it makes no sense ({type(error).__name__})"
        yield json.dumps({"code": "CORRUPT", "reason": reason}).encode()
        return
    described = [
        {
            "layout": item.layout,
            "internal_name": item.internal_name,
            "own_name": item.own_name,
            "needs_name": item.needs_name,
            "shapes": {encoder: tensor.shape for encoder, tensor in item.tensors.items()},
        }
        for item in found
    ]
    yield json.dumps({"found": described}).encode()
    for item in found:
        for tensor in item.tensors.values():
            yield np.ascontiguousarray(tensor, "<f4").tobytes()


def _picture(file: BinaryIO, _caps: Caps) -> Iterator[bytes]:
    """Yield the answer to a picture: a header, and a small PNG of it."""
    from PIL import Image  # noqa: PLC0415 - the parent needs none of it

    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "AVIF")) as picture:
            if picture.width * picture.height > PREVIEW_PIXELS:
                raise ValueError("too large")
            small = picture.convert("RGB")
            small.thumbnail((PREVIEW_EDGE, PREVIEW_EDGE))
            target = io.BytesIO()
            small.save(target, "PNG")
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it is no preview
        yield b"{}"
        return
    yield b'{"png": true}'
    yield target.getvalue()


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _child(descriptor: int, caps: Caps, limit: Callable[[Caps], None] = _limit) -> None:
    import PIL.Image  # noqa: PLC0415 - imported before files are out of reach

    import latentfarm_shared.embeddings.containers  # noqa: PLC0415

    PIL.Image.init()
    del latentfarm_shared
    with socket.socket(fileno=descriptor) as connection:
        limit(caps)
        _serve(connection, caps)


def read_embedding(path: Path, caps: Caps = DEFAULT_CAPS) -> EmbeddingFile:
    """Read a file that holds one embedding, in a child process of its own.

    Raises:
        NotAnEmbedding: as `Sandbox.read_one`.
    """
    with Sandbox(caps) as sandbox:
        return sandbox.read_one(path)


if __name__ == "__main__":
    _child(int(sys.argv[1]), Caps.model_validate_json(sys.argv[2]))
