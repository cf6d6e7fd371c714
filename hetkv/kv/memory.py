"""Memory that holds KV, from any allocator: `Memory`, read from PyTorch, NumPy, DLPack or a raw pointer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

from hetkv.errors import InputError
from hetkv.kv import dlpack
from hetkv.kv.dtypes import DType


@dataclass(frozen=True)
class Memory:
    """Where an array is. For a raw pointer, make it by hand: `Memory(address, (blocks, 16, 8, 128), "bfloat16")`.

    The memory must stay allocated while a pool uses it; `owner` is kept alive for that.
    """

    address: int
    shape: tuple[int, ...]
    dtype: DType
    strides: tuple[int, ...] = ()
    """Bytes, one for each axis; none: dense, in C order."""
    device: str = "cpu"
    """`cpu`, or `cuda` or `hip` with or without an index (`cuda:1`); without one the driver is asked for it."""
    readonly: bool = False
    room: int = 0
    """Bytes from `address` that may be used; 0: what shape and strides reach."""
    owner: Any = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        try:
            put(self, "address", index(self.address))
            put(self, "shape", tuple(index(size) for size in self.shape))
            put(self, "strides", tuple(index(step) for step in self.strides))
        except TypeError:
            raise InputError(f"address, shape and strides are integers, not {self}") from None
        put(self, "dtype", DType.parse(self.dtype))
        if not self.strides:
            put(self, "strides", dense_strides(self.shape, self.dtype.itemsize))
        if self.address < 1 or len(self.strides) != len(self.shape) or min(self.shape, default=1) < 1:
            raise InputError(f"memory at {self.address:#x} of shape {self.shape}, strides {self.strides} is none")
        if min(self.strides, default=0) < 0:
            raise InputError(f"strides {self.strides} of shape {self.shape}: negative strides are not supported")
        if not self.room:
            put(self, "room", self.span)

    @property
    def span(self) -> int:
        """Bytes from `address` to the end of the last element."""
        return span(self.shape, self.strides, self.itemsize)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    def select(self, axis: int, at: int) -> Memory:
        """Index `at` of one axis, which goes."""
        return Memory(
            self.address + at * self.strides[axis],
            self.shape[:axis] + self.shape[axis + 1 :],
            self.dtype,
            self.strides[:axis] + self.strides[axis + 1 :],
            self.device,
            self.readonly,
            self.room - at * self.strides[axis],
            self.owner,
        )

    @classmethod
    def of(cls, source: Any, dtype: object = None) -> Memory:
        """The memory of a `torch.Tensor`, a NumPy array, or what has `__cuda_array_interface__` or `__dlpack__`.

        `dtype`: what the elements are where the array cannot say (bfloat16 or fp8 in `uint16` or `uint8`). A `Memory`
        is returned as it is. Raises `InputError` for anything else.
        """
        wanted = None if dtype is None else DType.parse(dtype)
        if isinstance(source, Memory):
            if wanted not in (None, source.dtype):
                raise InputError(f"the memory holds {source.dtype.value}, not {dtype}")
            return source
        found = _read(source)
        strides, room = found.strides, found.room
        element = _element(found.dtype, found.itemsize, wanted)
        return cls(found.address, found.shape, element, strides, found.device, found.readonly, room, found.owner)

    @classmethod
    def bytes_of(cls, source: Any) -> Memory:
        """The same bytes whatever their elements are: `[room]` of `uint8`."""
        found = source if isinstance(source, Memory) else _read(source)
        shape, strides = found.shape, found.strides or dense_strides(found.shape, found.itemsize)
        room = found.room or span(shape, strides, found.itemsize)
        return cls(found.address, (room,), DType.UINT8, (), found.device, found.readonly, room, found.owner)


class _Array(NamedTuple):
    """What an array says of itself. Strides in bytes; none: dense. `room` 0: what shape and strides reach."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    device: str
    readonly: bool
    room: int
    owner: Any


def _read(source: Any) -> _Array:
    if is_torch(source):
        return _of_torch(source)
    if hasattr(source, "__array_interface__"):
        return _of_interface(source, source.__array_interface__, "cpu")
    if hasattr(source, "__cuda_array_interface__"):
        return _of_interface(source, source.__cuda_array_interface__, "cuda")
    if hasattr(source, "__dlpack__"):
        at = dlpack.read(source)
        strides = tuple(step * at.itemsize for step in at.strides)
        return _Array(at.address, at.shape, strides, at.dtype, at.itemsize, at.device, at.readonly, 0, at.capsule)
    raise InputError(
        f"{type(source).__name__} is not memory: give a tensor of PyTorch, a NumPy array, an object with __dlpack__ or "
        "__cuda_array_interface__, or hetkv.Memory"
    )


def is_torch(source: Any) -> bool:
    """Whether it is a tensor of PyTorch, which is not imported for that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def dense_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Bytes between the elements of a dense array in C order."""
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def span(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first element to the end of the last."""
    return sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) + itemsize


def probe(sources: Sequence[Any]) -> Callable[[], list[object]]:
    """A cheap indication of where arrays' memory is now."""
    tensors = [source for source in sources if is_torch(source)]
    arrays = [at for at in sources if hasattr(at, "__array_interface__") and not is_torch(at)]
    arrays = [source for source in arrays if not isinstance(source, Memory)]
    if not tensors:
        return lambda: [source.__array_interface__["data"] for source in arrays]
    storages = [tensor.untyped_storage() for tensor in tensors]
    start, size = sys.modules["torch"].Tensor.data_ptr, type(storages[0]).nbytes

    def where() -> list[object]:
        found = [*map(start, tensors), *map(size, storages)]
        return found + [source.__array_interface__["data"] for source in arrays]

    return where


def check_mapped(parts: Sequence[tuple[str, int, int]], write: bool) -> None:
    """Raise `InputError` unless this process maps each (name, address, bytes) of host memory and may use it so.

    What an array says of itself is not enough: a tensor over a read-only file looks like any other.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    usable: list[list[int]] = []
    for line in lines:
        where, rights = line.split(maxsplit=2)[:2]
        if rights[0] != "r" or (write and rights[1] != "w"):
            continue
        start, stop = (int(edge, 16) for edge in where.split("-"))
        if usable and usable[-1][1] == start:
            usable[-1][1] = stop
        else:
            usable.append([start, stop])
    for name, address, size in parts:
        if not any(start <= address and address + size <= stop for start, stop in usable):
            rights = "writable" if write else "readable"
            raise InputError(f"{name}: {size} bytes at {address:#x} are not {rights} memory of this process")


def _of_torch(tensor: Any) -> _Array:
    torch = sys.modules["torch"]
    if tensor.layout is not torch.strided:
        raise InputError(f"a tensor of layout {tensor.layout} is not strided memory")
    size, device = tensor.element_size(), str(tensor.device)
    if torch.version.hip:
        device = device.replace("cuda", "hip")
    strides = tuple(step * size for step in tensor.stride())
    room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * size
    name = str(tensor.dtype).removeprefix("torch.")
    return _Array(tensor.data_ptr(), tuple(tensor.shape), strides, name, size, device, False, room, tensor)


def _of_interface(source: Any, fields: dict[str, Any], device: str) -> _Array:
    """The array interface of NumPy, or the one of CUDA, which is the same with pointers of a device."""
    kind = fields["typestr"]
    if kind[0] == ">":
        raise InputError(f"elements of type {kind} are big-endian")
    if fields.get("data") is None:
        raise InputError("an array whose memory is a buffer object has no address")
    name = str(getattr(getattr(source, "dtype", None), "name", ""))
    name = name if name in _NAMES else _TYPESTR.get(kind[1:], kind)
    address, readonly = fields["data"]
    shape, strides = tuple(fields["shape"]), tuple(fields.get("strides") or ())
    return _Array(address or 0, shape, strides, name, int(kind[2:]), device, bool(readonly), 0, source)


_NAMES = {dtype.value for dtype in DType}
_TYPESTR = {"f4": "float32", "f2": "float16", "i1": "int8", "u1": "uint8", "u2": "uint16", "i2": "int16"}
_OPAQUE = ("uint8", "int8", "uint16", "int16", "|V1", "|V2", "<V2")
"""Elements that may hold those of another dtype of their size."""


def _element(name: str, itemsize: int, wanted: DType | None) -> DType:
    """The dtype of elements that the array calls `name`."""
    if wanted is not None and (name == wanted.value or (itemsize == wanted.itemsize and name in _OPAQUE)):
        return wanted
    if wanted is not None:
        raise InputError(f"the memory holds {name}, not {wanted.value}")
    if name not in _NAMES:
        raise InputError(f"elements of {itemsize} bytes of type {name!r}: give dtype, such as dtype='bfloat16'")
    return DType(name)
