"""Lossless coders of payloads for `hetkv bench codec`: zstd and LZ4 of the system, by ctypes, alone and after a split.

The split makes two planes of 16-bit values: the bytes that hold the exponent, which repeat, and those of the mantissa,
which do not and are left as they are. Of bfloat16 each value is turned left by one bit first, so that the exponent's 8
bits are one byte.
"""

from __future__ import annotations

import ctypes
from ctypes.util import find_library
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from hetkv.core import core
from hetkv.errors import BenchmarkError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_LEVEL, _LITERAL_COMPRESSION = 100, 1002
"""Of `ZSTD_CCtx_setParameter`. The second one, ZSTD_c_literalCompressionMode, is experimental by zstd's own word."""
_HUFFMAN = 1


class Coder(Protocol):
    """Codes bytes; the caller keeps what comes out before the next call."""

    def encode(self, data: Bytes) -> Bytes: ...

    def decode(self, data: Bytes, length: int) -> Bytes: ...


class Zstd:
    """`level` below 1 trades matches for speed; literals are Huffman coded at every level."""

    def __init__(self, level: int) -> None:
        self._library = library = _load("zstd")
        for name in ("ZSTD_compressBound", "ZSTD_compress2", "ZSTD_decompressDCtx", "ZSTD_CCtx_setParameter"):
            getattr(library, name).restype = ctypes.c_size_t
        library.ZSTD_createCCtx.restype = library.ZSTD_createDCtx.restype = ctypes.c_void_p
        self._to, self._from = ctypes.c_void_p(library.ZSTD_createCCtx()), ctypes.c_void_p(library.ZSTD_createDCtx())
        for parameter, value in ((_LEVEL, level), (_LITERAL_COMPRESSION, _HUFFMAN)):
            self._check(library.ZSTD_CCtx_setParameter(self._to, parameter, value))
        self._coded = np.empty(0, np.uint8)
        self._plain = np.empty(0, np.uint8)

    def encode(self, data: Bytes) -> Bytes:
        bound = int(self._library.ZSTD_compressBound(ctypes.c_size_t(len(data))))
        if len(self._coded) < bound:
            self._coded = np.zeros(bound, np.uint8)
        size = self._library.ZSTD_compress2(self._to, *_place(self._coded), *_place(data))
        return self._coded[: self._check(size)]

    def decode(self, data: Bytes, length: int) -> Bytes:
        if len(self._plain) < length:
            self._plain = np.zeros(length, np.uint8)
        size = self._library.ZSTD_decompressDCtx(self._from, *_place(self._plain), *_place(data))
        return self._plain[: self._check(size)]

    def _check(self, code: int) -> int:
        if self._library.ZSTD_isError(ctypes.c_size_t(code)):
            self._library.ZSTD_getErrorName.restype = ctypes.c_char_p
            raise BenchmarkError(f"zstd: {self._library.ZSTD_getErrorName(ctypes.c_size_t(code)).decode()}")
        return code


class Lz4:
    """Its fast mode."""

    def __init__(self) -> None:
        self._library = _load("lz4")
        self._coded = np.empty(0, np.uint8)
        self._plain = np.empty(0, np.uint8)

    def encode(self, data: Bytes) -> Bytes:
        bound = self._library.LZ4_compressBound(len(data))
        if len(self._coded) < bound:
            self._coded = np.zeros(bound, np.uint8)
        (to, room), (start, length) = _place(self._coded), _place(data)
        size = self._library.LZ4_compress_default(start, to, ctypes.c_int(length.value), ctypes.c_int(room.value))
        if size <= 0:
            raise BenchmarkError("LZ4 has not coded the data")
        return self._coded[:size]

    def decode(self, data: Bytes, length: int) -> Bytes:
        if len(self._plain) < length:
            self._plain = np.zeros(length, np.uint8)
        (to, _), (start, size) = _place(self._plain), _place(data)
        found = self._library.LZ4_decompress_safe(start, to, ctypes.c_int(size.value), ctypes.c_int(length))
        if found != length:
            raise BenchmarkError(f"LZ4 has decoded {found} of {length} bytes")
        return self._plain[:length]


class Coded(NamedTuple):
    """Both planes."""

    exponents: Bytes
    rest: Bytes

    @property
    def size(self) -> int:
        return len(self.exponents) + len(self.rest)


class Split:
    """Planes of 16-bit values; the exponents' goes to a coder."""

    def __init__(self, coder: Coder, dtype: Literal["bf16", "fp16"]) -> None:
        self._coder, self._turn = coder, dtype == "bf16"

    def encode(self, data: Bytes) -> Coded:
        upper, self._lower = np.empty(len(data) // 2, np.uint8), np.empty(len(data) // 2, np.uint8)
        core.split16(data, upper, self._lower, self._turn)
        return Coded(self._coder.encode(upper), self._lower)

    def decode(self, coded: Coded, length: int) -> Bytes:
        values = np.empty(length, np.uint8)
        core.join16(self._coder.decode(coded.exponents, length // 2), coded.rest, values, self._turn)
        return values


def _place(data: Bytes) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data))


def _load(name: str) -> Any:
    path = find_library(name)
    if path is None:
        raise BenchmarkError(f"lib{name} is not installed on this system")
    return ctypes.CDLL(path)
