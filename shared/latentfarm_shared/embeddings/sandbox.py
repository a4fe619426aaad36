"""Files of strangers are read in a child process with little memory and time, which can write nothing.

The parent opens the file and hands the child its descriptor over a socket; the child answers with tensors or with the
reason for a refusal. One that takes too long, or dies, is replaced, and its file refused. `reader` is the other side.
"""

from __future__ import annotations

import array
import hashlib
import io
import json
import os
import socket
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
from latentfarm_shared.embeddings.layouts import Found
from latentfarm_shared.embeddings.reader import EMBEDDING, LENGTH, PICTURE
from latentfarm_shared.embeddings.refusals import DEFAULT_CAPS, Caps, Code, Refusal
from latentfarm_shared.errors import Unavailable, UnreadableFile

READER = "latentfarm_shared.embeddings.reader"
START_S = 30.0  # importing numpy on a busy machine


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
                header, deadline = self._request(connection, PICTURE, file)
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
            header, deadline = self._request(connection, EMBEDDING, file)
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
        command = [sys.executable, "-P", "-m", READER, str(theirs.fileno()), self.caps.model_dump_json()]
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
    return _exactly(connection, LENGTH.unpack(_exactly(connection, LENGTH.size, deadline))[0], deadline)


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


def read_embedding(path: Path, caps: Caps = DEFAULT_CAPS) -> EmbeddingFile:
    """Read a file that holds one embedding, in a child process of its own.

    Raises:
        NotAnEmbedding: as `Sandbox.read_one`.
    """
    with Sandbox(caps) as sandbox:
        return sandbox.read_one(path)
