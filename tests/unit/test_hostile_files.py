"""Files made to do harm: each is refused in time, within its memory, with nothing run and nothing left behind."""

import io
import json
import os
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from latentfarm_shared.embeddings.refusals import Caps
from latentfarm_shared.embeddings.sandbox import NotAnEmbedding, Sandbox
from PIL import Image
from safetensors.numpy import save

LIMIT_S, LIMIT_BYTES = 5.0, 512 * 2**20


def torch_file(
    pickled: bytes, storages: dict[str, bytes] | None = None, extra: dict[str, bytes] | None = None
) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return target.getvalue()


def tensor_pickle(
    rows: int, width: int, *, count: int, stride: tuple[int, int] | None = None, offset: int = 0
) -> bytes:
    """Return the pickle of `{"emb_params": tensor}` with any shape, stride and storage one likes."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    stride = stride or (width, 1)
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    shape = number(rows) + number(width) + b"\x86" + number(stride[0]) + number(stride[1]) + b"\x86"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape + hooks + b"tR"
    return b"\x80\x02}" + text("emb_params") + tensor + b"s."


class Calls:
    """Pickles to a call of anything."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self._call


def safetensors_header(header: object, body: bytes = b"") -> bytes:
    data = json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + body


def nested_pickle(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def doubling_pickle(levels: int) -> bytes:
    """Return a list that holds a list twice, which holds a list twice … : small in memory, endless to walk."""
    twice = (b"]q" + bytes([n + 1]) + b"(h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(levels))
    return b"\x80\x02]q\x00" + b"".join(twice) + b"."


def bomb_picture() -> bytes:
    """Return a small PNG that claims 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def text_bomb_picture() -> bytes:
    """Return a PNG whose compressed text unpacks to 1 GB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(1024)) + packer.flush()
    body = b"sd-ti-embedding\0\0" + packed
    target = io.BytesIO()
    Image.new("RGB", (8, 8)).save(target, "PNG")
    png = target.getvalue()
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return png[:33] + chunk + png[33:]


def spoilt(value: float) -> bytes:
    rows = np.ones((2, 768), np.float32)
    rows[1, 5] = value
    return save({"emb_params": rows})


HOSTILE: dict[str, tuple[bytes, str]] = {
    "runs a command": (torch_file(pickle.dumps({"x": Calls(os.system, "touch PWNED")}, 2)), "system"),
    "evaluates code": (torch_file(pickle.dumps({"x": Calls(eval, "open('PWNED', 'w')")}, 2)), "eval"),
    "asks for builtins by protocol 4": (torch_file(pickle.dumps({"x": Calls(exec, "1")}, 4)), "exec"),
    "reaches through an attribute": (
        torch_file(b"\x80\x02cos\nsystem\nq\x00X\x0a\x00\x00\x00touch PWNED\x85R."),
        "system",
    ),
    "old format that runs": (pickle.dumps(Calls(os.system, "touch PWNED"), 2), "system"),
    "extension registry": (torch_file(b"\x80\x02\x82\x01."), "damaged|no sense"),
    "zip bomb": (torch_file(b"\x80\x02}.", {"0": bytes(512 * 2**20)}), "unpacks"),
    "path traversal": (torch_file(b"\x80\x02}.", extra={"../../PWNED": b"x"}), "leads out"),
    "absolute path": (torch_file(b"\x80\x02}.", extra={"/tmp/PWNED": b"x"}), "leads out"),  # noqa: S108
    "strange member": (torch_file(b"\x80\x02}.", extra={"archive/code/__torch__.py": b"x"}), "not a PyTorch"),
    "ten thousand members": (torch_file(b"\x80\x02}.", {str(n): b"" for n in range(10_000)}), "unpacks"),
    "giant shape": (torch_file(tensor_pickle(2**40, 768, count=4), {"0": bytes(16)}), "no embedding|more values"),
    "shape that overflows": (torch_file(tensor_pickle(2**62, 2**62, count=4), {"0": bytes(16)}), "no embedding"),
    "stride of zero": (
        torch_file(tensor_pickle(500_000, 768, count=4, stride=(0, 0)), {"0": bytes(16)}),
        "no embedding",
    ),
    "negative stride": (torch_file(tensor_pickle(2, 2, count=4, stride=(-2, -1)), {"0": bytes(16)}), "no sense"),
    "negative offset": (torch_file(tensor_pickle(1, 2, count=4, offset=-1), {"0": bytes(16)}), "no sense"),
    "reads behind its storage": (torch_file(tensor_pickle(1, 768, count=768), {"0": bytes(16)}), "more values"),
    "no storage": (torch_file(tensor_pickle(1, 768, count=768)), "damaged"),
    "nested lists": (torch_file(nested_pickle(100_000)), "nested|no sense"),
    "doubling lists": (torch_file(doubling_pickle(60)), "nested"),
    "endless number": (torch_file(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1)), "damaged|no sense"),
    "string that claims 4 GB": (torch_file(b"\x80\x02\x8d" + struct.pack("<Q", 2**32) + b"x."), "damaged|no sense"),
    "memo of a billion": (torch_file(b"\x80\x02]r\xff\xff\xff\x3b."), "more than 448 MB"),
    "NaN": (spoilt(float("nan")), "finite"),
    "infinity": (spoilt(float("inf")), "finite"),
    "doubles beyond float32": (save({"emb_params": np.full((1, 768), 1e300)}), "finite"),
    "a thousand vectors": (save({"emb_params": np.ones((1000, 768), np.float32)}), "1000 vectors"),
    "no vectors": (save({"emb_params": np.ones((0, 768), np.float32)}), "0 vectors"),
    "five dimensions": (save({"emb_params": np.ones((1, 1, 1, 1, 8), np.float32)}), "no sense"),
    "header of 4 GB": (struct.pack("<Q", 2**32) + b"{" + bytes(100), "neither"),
    "header of braces": (struct.pack("<Q", 10**6) + b'{"a":' * 200_000, "damaged"),
    "header that is a list": (struct.pack("<Q", 4) + b"{  [" + bytes(40), "damaged"),
    "shape without end": (
        safetensors_header({"a": {"dtype": "F32", "shape": [2**60, 2**60], "data_offsets": [0, 16]}}, bytes(16)),
        "more values",
    ),
    "negative shape": (
        safetensors_header({"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}, bytes(16)),
        "no sense",
    ),
    "offsets outside": (
        safetensors_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [2**40, 2**40 + 16]}}, bytes(16)),
        "no sense",
    ),
    "a hundred thousand tensors": (
        safetensors_header({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}),
        "tensors",
    ),
    "picture of 60000 x 60000": (bomb_picture(), "far more"),
    "picture whose text unpacks to 1 GB": (text_bomb_picture(), "damaged|memory|picture"),
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_hostile_file_is_refused_in_time_and_nothing_is_left(
    kind: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, says = HOSTILE[kind]
    path = tmp_path / "download.pt"
    path.write_bytes(data)
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()

    with pytest.raises(NotAnEmbedding, match=says) as refused:
        sandbox.read(path)

    assert time.monotonic() - began < LIMIT_S
    assert str(path) in str(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["download.pt"]
    assert not Path("/PWNED").exists()  # the child's own folder is /
    assert _peak_bytes(sandbox) < LIMIT_BYTES


def _peak_bytes(sandbox: Sandbox) -> int:
    """Return the child's address space in bytes, which its limit bounds; 0 if it was ended."""
    child = sandbox._child
    if child is None:
        return 0
    return psutil.Process(child.pid).memory_info().vms


def test_file_that_takes_too_long_is_refused_and_the_next_one_is_read(tmp_path: Path) -> None:
    good, slow = tmp_path / "good.safetensors", tmp_path / "slow.pt"
    good.write_bytes(save({"emb_params": np.ones((1, 768), np.float32)}))
    slow.write_bytes(torch_file(b"\x80\x02]" + b"K\x01a" * 3_000_000 + b"."))
    with Sandbox(Caps(seconds=0.02)) as hasty, pytest.raises(NotAnEmbedding, match="TIMEOUT"):
        hasty.read(slow)
    with Sandbox() as sandbox:
        assert sandbox.read(good)[0].vectors == 1


def test_child_that_dies_is_replaced(sandbox: Sandbox, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    good.write_bytes(save({"emb_params": np.ones((1, 768), np.float32)}))
    sandbox.read(good)
    assert sandbox._child is not None
    sandbox._child.kill()
    sandbox._child.wait()

    assert sandbox.read(good)[0].vectors == 1


def test_child_can_write_nothing_and_has_little_memory(sandbox: Sandbox, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    good.write_bytes(save({"emb_params": np.ones((1, 768), np.float32)}))
    sandbox.read(good)
    assert sandbox._child is not None

    child = psutil.Process(sandbox._child.pid)

    assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert child.rlimit(psutil.RLIMIT_AS) == (448 * 2**20,) * 2
    assert not any("torch" in mapping.path for mapping in child.memory_maps())
