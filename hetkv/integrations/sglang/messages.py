"""What the ranks of the two sides write to each other over SGLang's sockets, besides SGLang's own status messages."""

from __future__ import annotations

import msgspec

REGISTER, ASK, LINKED = b"HETKV_REGISTER", b"HETKV_ASK", b"HETKV_LINKED"


class Register(msgspec.Struct, frozen=True):
    """A decode rank listens at `address`, and hears SGLang's messages at `endpoint:dst_port`."""

    address: str
    endpoint: str
    dst_port: int


class Ask(msgspec.Struct, frozen=True):
    """A request's pages are allocated. The names are those that SGLang reads of such records."""

    room: int
    address: str
    """Of the decode rank, as it has registered."""
    endpoint: str
    dst_port: int
    pages: int
    required: int
    """Decode ranks that will ask this prefill rank."""
    prefix: int
    """Tokens that the decode has already."""
    is_dummy: bool


class Linked(msgspec.Struct, frozen=True):
    """A prefill rank has connected to the decode rank at `address`, or why it has not."""

    address: str
    rank_ip: str
    rank_port: int
    instance: str
    error: str


def encode(kind: bytes, message: msgspec.Struct) -> list[bytes]:
    """The frames of a message."""
    return [kind, msgspec.msgpack.encode(message)]


def name_of(room: int) -> str:
    """A request on hetkv's wire."""
    return f"sglang/{room}"
