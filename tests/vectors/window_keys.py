"""Golden and malformed keys of slots in device memory (docs/wire-format.md, section 2), for make.py."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import msgspec

from hetkv.reference.window_key import WindowKey, encode

CUDA_KEY = WindowKey(
    process=bytes(range(16)),
    backend="cuda",
    device=1,
    handle=bytes(range(64, 128)),
    offset=4096,
    length=1 << 30,
    ucx=b"rkey of slot 3",
)
GOOD_KEYS: dict[str, tuple[str, WindowKey]] = {
    "cuda": ("with an IPC handle and a UCX key", CUDA_KEY),
    "hip": ("UCX does not reach it", msgspec.structs.replace(CUDA_KEY, backend="hip", device=0, ucx=b"")),
    "ucx": ("no IPC handle", WindowKey(process=bytes(16), backend="cuda", device=0, ucx=bytes(range(200)))),
    "limits": (
        "the largest values that fields may have",
        WindowKey(
            process=b"\xff" * 16,
            backend="x" * 15,
            device=2**32 - 1,
            handle=b"\xff" * 64,
            offset=2**64 - 1,
            length=2**64 - 1,
            ucx=b"\xff",
        ),
    ),
}


class Bad(NamedTuple):
    about: str
    data: bytes
    error: str
    text: str


def bad_keys() -> dict[str, Bad]:
    """Every way in which a key is malformed."""
    m, u, good = "MalformedError", "UnsupportedError", encode(CUDA_KEY)

    def put(at: int, code: str, value: int | bytes) -> bytes:
        field = struct.pack("<" + code, value)
        return good[:at] + field + good[at + len(field) :]

    return {
        "empty": Bad("no bytes", b"", m, "is cut short"),
        "cut": Bad("135 bytes", good[:135], m, "is cut short"),
        "magic": Bad("a UCX key's place", put(0, "8s", b"hetkvwim"), m, "has another magic"),
        "version": Bad("a later version", put(8, "I", 2), u, "has version 2, this side reads 1"),
        "ucx-cut": Bad("the last byte is missing", good[:-1], m, "has another length than it says"),
        "ucx-long": Bad("a byte too many", good + bytes(1), m, "has another length than it says"),
        "ucx-huge": Bad("ucx_length 2^32 - 1", put(12, "I", 2**32 - 1), m, "has another length than it says"),
        "backend": Bad("a name without an end", put(32, "16s", b"c" * 16), m, "has bytes that must be zero"),
        "backend-padding": Bad(
            "a byte after the name's end",
            put(32, "16s", b"cuda\0\0x".ljust(16, b"\0")),
            m,
            "has bytes that must be zero",
        ),
        "reserved": Bad("reserved field used", put(52, "I", 1), m, "has bytes that must be zero"),
    }


def key_vectors() -> dict[str, Any]:
    """What `keys.json` holds: each key whole, in hexadecimal."""
    good = {
        name: {
            "about": about,
            "hex": encode(key).hex(),
            "fields": {
                field: value.hex() if isinstance(value, bytes) else value
                for field, value in msgspec.structs.asdict(key).items()
            },
        }
        for name, (about, key) in GOOD_KEYS.items()
    }
    bad = {
        name: {"about": bad.about, "hex": bad.data.hex(), "error": bad.error, "text": bad.text}
        for name, bad in bad_keys().items()
    }
    return {"good": good, "bad": bad}
