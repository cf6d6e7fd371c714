"""The key of a slot in device memory, in pure Python: what a grant carries in place of a bare UCX key.

docs/wire-format.md, section 2 is normative; `csrc/engine/window_key.h` is what transfers use.
"""

from __future__ import annotations

import struct

import msgspec

from hetkv.errors import InputError, MalformedError, UnsupportedError

MAGIC, VERSION = b"hetkvwin", 1
_HEAD = struct.Struct("<8sII16s16sII64sQQ")  # then the UCX key
_SUBJECT = "the key of a window in device memory"


class WindowKey(msgspec.Struct, frozen=True, kw_only=True):
    """Its fields; see the table of the wire format."""

    process: bytes
    """16 random bytes of the process that owns the window."""
    backend: str
    """`cuda` or `hip`; at most 15 ASCII bytes."""
    device: int
    handle: bytes = bytes(64)
    """The vendor's IPC handle of the allocation."""
    offset: int = 0
    """Bytes of the slot in the allocation."""
    length: int = 0
    """Bytes of the allocation; 0: there is no handle."""
    ucx: bytes = b""


def encode(key: WindowKey) -> bytes:
    """The key's bytes. Raises `InputError` for fields that do not fit."""
    name = key.backend.encode("ascii", "replace")
    if len(key.process) != 16 or len(key.handle) != 64 or len(name) > 15:
        raise InputError(f"{_SUBJECT} has a process of 16 bytes, a handle of 64 and a backend of at most 15")
    try:
        head = _HEAD.pack(
            MAGIC, VERSION, len(key.ucx), key.process, name, key.device, 0, key.handle, key.offset, key.length
        )
    except struct.error as error:
        raise InputError(f"{_SUBJECT}: {error}") from None
    return head + key.ucx


def decode(data: bytes) -> WindowKey:
    """The fields of a key. Raises `MalformedError`, or `UnsupportedError` for a later version."""
    if len(data) < _HEAD.size:
        raise MalformedError(f"{_SUBJECT} is cut short")
    magic, version, ucx_length, process, backend, device, reserved, handle, offset, length = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise MalformedError(f"{_SUBJECT} has another magic")
    if version != VERSION:
        raise UnsupportedError(f"{_SUBJECT} has version {version}, this side reads {VERSION}")
    if ucx_length != len(data) - _HEAD.size:
        raise MalformedError(f"{_SUBJECT} has another length than it says")
    name = backend.rstrip(b"\0").decode("latin-1")
    if reserved or backend[-1] or "\0" in name:
        raise MalformedError(f"{_SUBJECT} has bytes that must be zero")
    return WindowKey(
        process=process,
        backend=name,
        device=device,
        handle=handle,
        offset=offset,
        length=length,
        ucx=data[_HEAD.size :],
    )
