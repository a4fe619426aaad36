"""The child process that reads strangers' files: it gets open files over a socket and answers with tensors or a refusal.

It imports numpy and Pillow, no torch, gives up every right it does not need before the first file, and ends with its
parent. `sandbox` is the other side.
"""

from __future__ import annotations

import array
import ctypes
import io
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from latentfarm_shared.embeddings.containers import read_container
from latentfarm_shared.embeddings.layouts import read_layout
from latentfarm_shared.embeddings.refusals import Caps, Refusal

LENGTH = struct.Struct("<I")
EMBEDDING, PICTURE = b"f", b"p"
PREVIEW_EDGE, PREVIEW_PIXELS = 768, 2**25
PR_SET_PDEATHSIG = 1


def _limit(caps: Caps) -> None:
    """Give up memory, files, processes and core dumps beyond what one embedding needs, and end with the parent."""
    limits = [(resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 32)]
    if sys.platform == "linux":
        limits += [(resource.RLIMIT_AS, caps.memory_mb * 2**20), (resource.RLIMIT_NPROC, 0)]
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for kind, value in limits:
        resource.setrlimit(kind, (value, value))


def _limit_time(caps: Caps) -> None:
    """Let the kernel end this process when one file takes more processor time than it may."""
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
            for part in (_picture if message == PICTURE else _embedding)(file, caps):
                _send(connection, part)


def _embedding(file: BinaryIO, caps: Caps) -> Iterator[bytes]:
    """Yield the answer to a file: a header, and the tensors it describes."""
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
    """Send one message: its length, then its bytes."""
    connection.sendall(LENGTH.pack(len(data)) + data)


def serve(descriptor: int, caps: Caps) -> None:
    """Answer for as long as the parent asks, over the socket it left open."""
    Image.init()  # decoders are imported while files can still be opened
    with socket.socket(fileno=descriptor) as connection:
        _limit(caps)
        _serve(connection, caps)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Caps.model_validate_json(sys.argv[2]))
