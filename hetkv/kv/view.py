"""Views of paged memory as an array `[num_blocks, block_size, heads, channels]`: `strided_view`."""

from __future__ import annotations

from typing import Any

from hetkv.errors import InputError
from hetkv.kv.memory import Memory, is_torch
from hetkv.kv.segment import SegmentLayout


def strided_view(part: SegmentLayout, source: Any, block_size: int, num_blocks: int) -> Any:
    """Strided view of a segment, whose base is the first byte of `source`: a tensor where that is one, else NumPy's.

    Where the channel axis is packed the view is `[num_blocks, block_size, heads, channels // pack, pack]`. Without
    `ml_dtypes`, NumPy shows bfloat16 as `uint16` and fp8 as `uint8`. Raises `InputError` for memory of a device that
    is not PyTorch's.
    """
    shape, strides = [num_blocks, block_size, part.heads], [part.block_stride, part.token_stride, part.head_stride]
    if part.pack == part.channels:
        shape, strides = [*shape, part.channels], [*strides, part.inner_stride]
    else:
        shape = [*shape, part.channels // part.pack, part.pack]
        strides = [*strides, part.outer_stride, part.inner_stride]
    if is_torch(source):
        return _torch_view(part, source, shape, strides)
    memory = Memory.bytes_of(source)
    if memory.device != "cpu":
        raise InputError(f"memory on {memory.device} has no view here: use the array that it was made of")
    import numpy as np

    dtype = part.dtype.numpy
    plain = dtype.str if dtype.isbuiltin == 1 else f"<u{dtype.itemsize}"  # those of ml_dtypes have no type string
    interface = {
        "version": 3,
        "data": (memory.address + part.offset, memory.readonly),
        "shape": tuple(shape),
        "strides": tuple(strides),
        "typestr": plain,
    }
    return np.asarray(_Interface(interface, source)).view(dtype)


class _Interface:
    """What NumPy makes an array of, which keeps it, and so its owner, alive."""

    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def _torch_view(part: SegmentLayout, tensor: Any, shape: list[int], strides: list[int]) -> Any:
    import torch

    size = part.dtype.itemsize
    elements = torch.empty(0, dtype=part.dtype.torch, device=tensor.device).set_(tensor.untyped_storage())
    first = tensor.storage_offset() * tensor.element_size() + part.offset
    return elements.as_strided(shape, [stride // size for stride in strides], first // size)
