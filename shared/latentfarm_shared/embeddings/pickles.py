"""Read tensors from PyTorch files without torch: a pickle machine that knows only inert stand-ins.

A `.pt` file is a zip with `data.pkl` and raw storages, or, from before PyTorch 1.6, pickles with the storages behind
them. The unpickler resolves a short list of globals to stand-ins that record what they were given; any other global
is refused by name, so nothing in a file ever runs.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentfarm_shared.embeddings.refusals import Caps, Refusal

Array = NDArray[np.float32]

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # what a file from before PyTorch 1.6 starts with
MAX_DEPTH = 16
_MEMBER = re.compile(r"(?:[^/\\\0]+/)?(?:data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment"
                     r"|\.data/serialization_id)")  # fmt: skip


@dataclass(eq=False)
class Storage:
    """Raw bytes of one storage and how to read them; `data` comes later in old files."""

    dtype: str
    count: int
    data: bytes | None = None
    order: str = "<"


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor as a file describes it, not read yet."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any


class Holder(dict[Any, Any]):
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
    "ShortStorage": "<i2",
    "CharStorage": "<i1",
    "ByteStorage": "<u1",
    "BoolStorage": "|b1",
}
_ITEM_BYTES = {"bf16": 2}


def widen_bfloat16(data: bytes) -> Array:
    """Read bfloat16 bytes as float32: their bits are the upper half of a float32's."""
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


class NumberFormat:
    """Stands for numpy's dtype: keeps its code."""

    def __init__(self, code: Any = "", *_ignored: Any) -> None:
        self.code = code

    def __setstate__(self, _state: Any) -> None:
        """Keep nothing more."""


class NumpyArray:
    """Stands for a numpy array, in which tensors of some devices were saved: keeps shape, format and bytes."""

    def __init__(self, *_ignored: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


_NUMPY_CODES = {"f2": "<f2", "f4": "<f4", "f8": "<f8"}


def _from_numpy(array: Any, *_ignored: Any) -> LazyTensor:
    """Describe the tensor that a numpy array holds, row by row."""
    if not isinstance(array, NumpyArray) or not isinstance(array.state, tuple) or len(array.state) != 5:
        raise Refusal("CORRUPT", "a tensor that makes no sense")
    _, shape, number_format, is_fortran, data = array.state
    code = _NUMPY_CODES.get(str(getattr(number_format, "code", "")))
    if code is None or is_fortran or not isinstance(data, bytes) or not isinstance(shape, tuple):
        raise Refusal("NOT_AN_EMBEDDING", "a tensor in an unknown number format")
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    return LazyTensor(Storage(code, len(data), data), 0, shape, strides)


def _encoded(text: Any, *_ignored: Any) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else b""


def _first(value: Any, *_ignored: Any) -> Any:
    return value


_GLOBALS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): lambda *a: LazyTensor(*a[:4]),
    ("torch._utils", "_rebuild_tensor"): lambda *a: LazyTensor(*a[:4]),
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("collections", "OrderedDict"): Holder,
    ("torch.nn.modules.container", "ParameterDict"): Holder,
    ("torch.nn.parameter", "Parameter"): _first,
    ("torch", "Size"): tuple,
    ("torch", "device"): _first,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _from_numpy,
    ("_codecs", "encode"): _encoded,
    ("numpy", "dtype"): NumberFormat,
    ("numpy", "ndarray"): NumpyArray,
}
_GLOBALS |= {(f"{package}.multiarray", "scalar"): NumberFormat for package in ("numpy.core", "numpy._core")}
_GLOBALS |= {(f"{package}.multiarray", "_reconstruct"): NumpyArray for package in ("numpy.core", "numpy._core")}
_GLOBALS |= {("torch", name): dtype for name, dtype in _DTYPES.items()}
_GLOBALS |= {("torch", name): name for name in ("float32", "float16", "bfloat16", "float64", "int64")}


class _InertUnpickler(pickle.Unpickler):
    """An unpickler that can only build plain containers, numbers, strings and descriptions of tensors."""

    def __init__(self, stream: io.BytesIO, storages: _Storages) -> None:
        super().__init__(stream, encoding="utf-8")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise Refusal("UNSAFE", f"its pickle asks for {module}.{name}, which no embedding needs") from None

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise Refusal("CORRUPT", "an unknown kind of storage")
        _, dtype, key, _, count = pid[:5]
        if dtype not in _DTYPES.values() or not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise Refusal("CORRUPT", "an unknown kind of storage")
        return self._storages.get(key, dtype, count)


class _Storages:
    """The storages of one file by key, each described once."""

    def __init__(self, archive: zipfile.ZipFile | None = None, prefix: str = "", order: str = "<") -> None:
        self._archive, self._prefix, self._order = archive, prefix, order
        self.by_key: dict[str, Storage] = {}

    def get(self, key: str, dtype: str, count: int) -> Storage:
        if key not in self.by_key:
            data = None
            if self._archive is not None:
                if not key.isdigit():
                    raise Refusal("CORRUPT", "an unknown kind of storage")
                data = self._archive.read(f"{self._prefix}data/{key}")
            self.by_key[key] = Storage(dtype, count, data, self._order)
        return self.by_key[key]


def read_torch(data: bytes, caps: Caps) -> Any:
    """Return the object a PyTorch file holds, in plain containers, tensors as float32 arrays.

    Raises:
        Refusal: damaged, too large inside, or with globals beyond the list.
    """
    try:
        content = _read_zip(data, caps) if data[:2] == b"PK" else _read_legacy(data)
        return _Materialiser(caps).plain(content)
    except Refusal:
        raise
    except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, EOFError, KeyError, NotImplementedError) as error:
        raise Refusal("CORRUPT", f"a damaged PyTorch file ({type(error).__name__})") from error
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError, RuntimeError) as error:
        raise Refusal("CORRUPT", f"a PyTorch file that makes no sense ({type(error).__name__})") from error


def _read_zip(data: bytes, caps: Caps) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) > caps.members or sum(m.file_size for m in members) > caps.file_bytes:
            raise Refusal("TOO_LARGE", f"it unpacks to more than {caps.file_mb} MB or {caps.members} members")
        for member in members:
            if ".." in member.filename.split("/") or member.filename.startswith("/"):
                raise Refusal("UNSAFE", f"its archive holds a path that leads out of it ({member.filename[:80]!r})")
            if not _MEMBER.fullmatch(member.filename):
                raise Refusal("NOT_AN_EMBEDDING", f"a zip file that holds {member.filename[:80]!r}, not a PyTorch file")
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            raise Refusal("CORRUPT", "its archive holds a name twice")
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise Refusal("NOT_AN_EMBEDDING", "a zip file that PyTorch did not write")
        prefix = pickles[0].removesuffix("data.pkl")
        big = prefix + "byteorder" in names and archive.read(prefix + "byteorder") == b"big"
        storages = _Storages(archive, prefix, ">" if big else "<")
        return _InertUnpickler(io.BytesIO(archive.read(pickles[0])), storages).load()


def _read_legacy(data: bytes) -> Any:
    """Read magic number, protocol, system, object and storage keys, then each storage behind its length."""
    stream, storages = io.BytesIO(data), _Storages()

    def load() -> Any:
        return _InertUnpickler(stream, storages).load()

    if load() != MAGIC_NUMBER:
        raise Refusal("NOT_AN_EMBEDDING", "a pickle that PyTorch did not write")
    load(), load()
    content, keys = load(), load()
    for key in keys:
        storage = storages.by_key[key]
        count = int.from_bytes(stream.read(8), "little", signed=True)
        if count != storage.count:
            raise Refusal("CORRUPT", "a storage that is not as long as it says")
        size = (
            count * _ITEM_BYTES.get(storage.dtype, 0) or count * np.dtype(storage.dtype.replace("bf16", "<u2")).itemsize
        )
        storage.data = stream.read(size)
    return content


def _values(storage: Storage) -> NDArray[Any]:
    """Return a storage's values, flat, in this machine's order of bytes."""
    data = storage.data or b""
    if storage.dtype == "bf16":
        return widen_bfloat16(data if storage.order == "<" else np.frombuffer(data, ">u2").astype("<u2").tobytes())
    return np.frombuffer(data, storage.dtype.replace("<", storage.order))


class _Materialiser:
    """Turns what the pickle described into plain containers and arrays, counting on the way."""

    def __init__(self, caps: Caps) -> None:
        self._caps, self._nodes, self._values = caps, 0, 0

    def plain(self, item: Any, depth: int = 0) -> Any:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > 16 * self._caps.tensors:
            raise Refusal("CORRUPT", "it is nested deeper, or holds more, than any embedding")
        if isinstance(item, LazyTensor):
            return self._array(item)
        if isinstance(item, dict):
            return {key: self.plain(value, depth + 1) for key, value in item.items() if isinstance(key, str | int)}
        if isinstance(item, list | tuple):
            return [self.plain(value, depth + 1) for value in item]
        return item if isinstance(item, str | int | float | bool) else None

    def _array(self, tensor: LazyTensor) -> Array:
        storage = tensor.storage
        if not isinstance(storage, Storage) or storage.data is None:
            raise Refusal("CORRUPT", "a tensor without storage")
        shape = tuple(map(int, tensor.shape))
        strides = tuple(map(int, tensor.stride))
        offset = int(tensor.offset)
        if len(shape) != len(strides) or len(shape) > 4 or min((*shape, *strides, offset, 0)) < 0:
            raise Refusal("BAD_SHAPE", "a tensor whose shape makes no sense")
        count = math.prod(shape)
        self._values += count
        if self._values * 4 > 4 * self._caps.file_bytes:
            raise Refusal("TOO_LARGE", f"a tensor of shape {list(shape)} is no embedding")
        flat = _values(storage)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if count and last >= len(flat):
            raise Refusal("BAD_SHAPE", "a tensor that claims more values than the file holds")
        if not count:
            return np.zeros(shape, np.float32)
        bytes_apart = tuple(s * flat.itemsize for s in strides)
        view = np.lib.stride_tricks.as_strided(flat[offset:], shape, bytes_apart, writeable=False)
        with np.errstate(over="ignore"):
            return np.array(view, dtype=np.float32)
