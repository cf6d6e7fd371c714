"""The second implementation of coded parts of payloads: docs/wire-format.md, section 10.

zstd is the system's, by ctypes, as there is none in Python's library before 3.14.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes.util import find_library

import numpy as np

from hetkv.errors import MalformedError, UnsupportedError

HEADER = struct.Struct("<IB3s")
BFLOAT16, FLOAT16, INT4 = 1, 2, 3
BLOCK = 64
"""Bytes of a block of codes, which is 32 where they fit in four bits."""


def decode_part(coded: bytes, most: int) -> bytes:
    """The bytes of a coded part. Raises `MalformedError`; parts of over `most` bytes are malformed, too."""
    if len(coded) < HEADER.size:
        raise MalformedError(f"a coded payload has {len(coded)} bytes")
    plain, values, zeros = HEADER.unpack_from(coded)
    if zeros != bytes(3):
        raise MalformedError("a coded payload has a reserved byte that is not 0")
    if values not in (BFLOAT16, FLOAT16, INT4):
        raise MalformedError(f"a coded payload has values of unknown kind {values}")
    if plain == 0 or plain % 2 or plain > most:
        raise MalformedError(f"a coded payload claims {plain} bytes")
    if values == INT4:
        if len(coded) >= plain:
            raise MalformedError(f"a coded payload of {plain} bytes has {len(coded)}")
        return _unpacked(coded[HEADER.size :], plain)
    half = plain // 2
    if len(coded) <= HEADER.size + half or len(coded) >= plain:
        raise MalformedError(f"a coded payload of {plain} bytes has {len(coded)}")
    lower = np.frombuffer(coded, np.uint8, half, HEADER.size).astype(np.uint16)
    upper = np.frombuffer(_zstd(coded[HEADER.size + half :], half, plain), np.uint8).astype(np.uint16)
    turned = upper << 8 | lower
    return (turned >> 1 | turned << 15 if values == BFLOAT16 else turned).astype("<u2").tobytes()


def _unpacked(data: bytes, plain: int) -> bytes:
    """Blocks whose bit is set have two codes a byte, of which the second is 32 codes later."""
    count = plain // BLOCK
    head = -(-count // 8)
    packed = [data[at // 8] >> at % 8 & 1 for at in range(8 * head)] if len(data) >= head else []
    if len(data) != head + plain - BLOCK // 2 * sum(packed) or any(packed[count:]):
        raise MalformedError(f"a coded payload does not decode to its {plain} bytes")
    out, at = bytearray(), head
    for is_packed in packed[:count]:
        block = data[at : at + (BLOCK // 2 if is_packed else BLOCK)]
        codes = [byte & 15 for byte in block] + [byte >> 4 for byte in block]
        out += bytes((code - 16 if code > 7 else code) & 255 for code in codes) if is_packed else block
        at += len(block)
    return bytes(out) + data[at:]


def _zstd(data: bytes, length: int, plain: int) -> bytes:
    path = find_library("zstd")
    if path is None:
        raise UnsupportedError("libzstd is not installed here")
    decompress = ctypes.CDLL(path).ZSTD_decompress
    decompress.restype = ctypes.c_size_t
    out = ctypes.create_string_buffer(length)
    if decompress(out, ctypes.c_size_t(length), data, ctypes.c_size_t(len(data))) != length:
        raise MalformedError(f"a coded payload does not decode to its {plain} bytes")
    return out.raw
