"""SipHash-2-4 and the payload checksum of `docs/wire-format.md`, in pure Python: the second of two implementations."""

from __future__ import annotations

import struct

_U64 = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def siphash24(key: bytes, data: bytes) -> int:
    """SipHash-2-4 with 64-bit output (Aumasson and Bernstein, 2012). `key` has 16 bytes."""
    k0, k1 = struct.unpack("<QQ", key)
    v0, v1, v2, v3 = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573

    def rounds(count: int) -> None:
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0 = (v0 + v1) & _U64
            v1 = ((v1 << 13) & _U64 | v1 >> 51) ^ v0
            v0 = (v0 << 32) & _U64 | v0 >> 32
            v2 = (v2 + v3) & _U64
            v3 = ((v3 << 16) & _U64 | v3 >> 48) ^ v2
            v0 = (v0 + v3) & _U64
            v3 = ((v3 << 21) & _U64 | v3 >> 43) ^ v0
            v2 = (v2 + v1) & _U64
            v1 = ((v1 << 17) & _U64 | v1 >> 47) ^ v2
            v2 = (v2 << 32) & _U64 | v2 >> 32

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 0xFF])
    for (word,) in struct.iter_unpack("<Q", padded):
        v3 ^= word
        rounds(2)
        v0 ^= word
    v2 ^= 0xFF
    rounds(4)
    digest: int = v0 ^ v1 ^ v2 ^ v3
    return digest


def payload_checksum(payload: bytes | bytearray, seed: int, offset: int = 0) -> int:
    """Checksum of a payload, or of its part from byte `offset` (a multiple of 8) on; those of parts add up.

    The sum, modulo 2^64, over little-endian 8-byte words of `low32(x) * high32(x) + word`, where
    `x = word ^ (seed + (index + 1) * step)`; the last word is padded with zeros.
    """
    total = 0
    key = seed + offset // 8 * _STEP
    for (word,) in struct.iter_unpack("<Q", payload + bytes(-len(payload) % 8)):
        key = (key + _STEP) & _U64
        x = word ^ key
        total += (x & 0xFFFFFFFF) * (x >> 32) + word
    return total & _U64
