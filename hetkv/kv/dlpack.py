"""Reads DLPack capsules (dmlc/dlpack, versions 0 and 1) without a framework: `read`."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, NamedTuple

from hetkv.errors import InputError

MAX_VERSION = (1, 1)
READ_ONLY = 1


class _Tensor(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_: ClassVar = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 10: "hip", 11: "cpu"}
"""DLDeviceType; pinned host memory of either vendor is host memory."""
DTYPES = {
    (0, 8): "int8",
    (0, 16): "int16",
    (1, 8): "uint8",
    (1, 16): "uint16",
    (2, 16): "float16",
    (2, 32): "float32",
    (4, 16): "bfloat16",
    (10, 8): "float8_e4m3fn",
    (11, 8): "float8_e4m3fnuz",
    (12, 8): "float8_e5m2",
    (13, 8): "float8_e5m2fnuz",
}
"""DLDataTypeCode and bits."""


class Exported(NamedTuple):
    """What a capsule says. Strides are in elements; none: dense. `capsule` owns the memory until it is collected."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int
    device: str
    readonly: bool
    capsule: Any


def read(source: Any) -> Exported:
    """Ask an object for its capsule and read it. Raises `InputError` for what is not strided memory of a known device.

    The capsule is left unconsumed, so that its own destructor gives the memory back.
    """
    kind, number = (int(part) for part in source.__dlpack_device__())
    device = DEVICES.get(kind)
    if device is None:
        raise InputError(f"DLPack device type {kind}: memory must be on a CPU, or on a CUDA or ROCm device")
    options: dict[str, Any] = {} if device == "cpu" else {"stream": -1}  # nothing is read now, so nothing is awaited
    try:
        capsule = source.__dlpack__(**options, max_version=MAX_VERSION)
    except TypeError:  # an exporter of version 0
        capsule = source.__dlpack__(**options)
    except BufferError as error:
        raise InputError(f"{type(source).__name__} cannot be exported by DLPack: {error}") from None
    tensor, readonly = _open(capsule)
    if tensor.lanes != 1 or (tensor.code, tensor.bits) not in DTYPES:
        raise InputError(f"DLPack elements of code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes")
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else ()
    where = device if device == "cpu" else f"{device}:{number}"
    address = (tensor.data or 0) + tensor.byte_offset
    name = DTYPES[tensor.code, tensor.bits]
    return Exported(address, shape, strides, name, tensor.bits // 8, where, readonly, capsule)


def _open(capsule: Any) -> tuple[_Tensor, bool]:
    """The tensor inside a capsule, and whether it must not be written."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    valid = ctypes.pythonapi.PyCapsule_IsValid
    valid.restype, valid.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
    if valid(capsule, b"dltensor"):
        return _Tensor.from_address(get(capsule, b"dltensor")), False
    if not valid(capsule, b"dltensor_versioned"):
        raise InputError("__dlpack__ returned no capsule of a tensor")
    whole = _Versioned.from_address(get(capsule, b"dltensor_versioned"))
    if whole.major != MAX_VERSION[0]:
        raise InputError(f"DLPack version {whole.major}.{whole.minor}; versions up to 1 are read")
    return whole.tensor, bool(whole.flags & READ_ONLY)
