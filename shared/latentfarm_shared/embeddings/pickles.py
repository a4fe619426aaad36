"""Read tensors from PyTorch zip files without torch: a pickle machine that knows only inert stand-ins.

A `.pt` file is a zip with `data.pkl` and raw storages. The unpickler here resolves a short list of globals to
stand-ins that record what they were given; any other global is refused by name, so nothing in a file ever runs.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

MAX_MEMBERS = 256
MAX_FILE_BYTES = 16 * 2**20


class RefusedPickle(Exception):
    """The file is not a tensor file we read; the text says what it is."""


@dataclass(frozen=True)
class _Storage:
    """Raw bytes of one storage and how to read them."""

    dtype: str
    data: bytes


class _Holder(dict[Any, Any]):
    """Stands for ParameterDict and its like: keeps the state it is given."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state.get("_parameters") or state)


_DTYPES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "BFloat16Storage": "bf16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
}


def widen_bfloat16(data: bytes) -> Array:
    """Read bfloat16 bytes as float32: their bits are the upper half of a float32's."""
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_ignored: Any) -> Array:
    if not isinstance(storage, _Storage):
        raise RefusedPickle("a tensor without storage")
    shape: tuple[int, ...] = tuple(map(int, size))
    strides: tuple[int, ...] = tuple(map(int, stride))
    count = int(np.prod(shape, dtype=np.int64))
    flat = widen_bfloat16(storage.data) if storage.dtype == "bf16" else np.frombuffer(storage.data, storage.dtype)
    if len(shape) != len(strides) or len(shape) > 4 or min(shape, default=0) < 0 or min(strides, default=0) < 0:
        raise RefusedPickle("a tensor whose shape makes no sense")
    last = int(offset) + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if int(offset) < 0 or not 0 <= count <= len(flat) or (count and last >= len(flat)):
        raise RefusedPickle("a tensor that claims more values than the file holds")
    bytes_apart = tuple(s * flat.itemsize for s in strides)
    view = np.lib.stride_tricks.as_strided(flat[int(offset) :], shape, bytes_apart, writeable=False)
    return np.array(view, dtype=np.float32)


def _first(value: Any, *_ignored: Any) -> Any:
    return value


_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("collections", "OrderedDict"): _Holder,
    ("torch.nn.modules.container", "ParameterDict"): _Holder,
    ("torch.nn.parameter", "Parameter"): _first,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
} | {("torch", name): dtype for name, dtype in _DTYPES.items()}


class _InertUnpickler(pickle.Unpickler):
    """An unpickler that can only build plain containers, numbers, strings and arrays."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(archive.read(prefix + "data.pkl")), encoding="utf-8")
        self._archive, self._prefix = archive, prefix

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise RefusedPickle(f"it asks for {module}.{name}, which no embedding needs") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key = pid[0], pid[1], str(pid[2])
        if kind != "storage" or not isinstance(dtype, str) or not key.isdigit():
            raise RefusedPickle("an unknown kind of storage")
        return _Storage(dtype, self._archive.read(f"{self._prefix}data/{key}"))


def read_torch_zip(data: bytes) -> Any:
    """Return the object a PyTorch zip file holds, tensors as float32 arrays.

    Raises:
        RefusedPickle: not such a file, damaged, too large inside, or with globals beyond the list.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > MAX_MEMBERS or sum(m.file_size for m in members) > MAX_FILE_BYTES:
                raise RefusedPickle(f"it unpacks to more than {MAX_FILE_BYTES} bytes or {MAX_MEMBERS} members")
            pickles = [m.filename for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise RefusedPickle("a zip file that PyTorch did not write")
            return _InertUnpickler(archive, pickles[0].removesuffix("data.pkl")).load()
    except RefusedPickle:
        raise
    except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, KeyError, NotImplementedError) as error:
        raise RefusedPickle(f"a damaged PyTorch file ({type(error).__name__})") from error
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise RefusedPickle(f"a PyTorch file that makes no sense ({type(error).__name__})") from error
