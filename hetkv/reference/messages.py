"""Messages of wire format v1 (`docs/wire-format.md`) as Python values; `wire.py` makes bytes of them."""

from __future__ import annotations

import enum
from typing import TypeAlias

import msgspec

MAX_SEGMENTS = 4
MAX_MESSAGE_BYTES = 64 * 1024
MAX_REASON_BYTES = 512
MAX_PAYLOAD_BYTES = 1 << 40
PAYLOAD_ALIGNMENT = 64
"""Of a payload in a bundle's slot."""
MAX_ABORT_CODE = 12


class Type(enum.IntEnum):
    """What a message is."""

    FRAME = 1
    TICKET = 2
    GRANT = 3
    RELEASE = 4
    RECALL = 5
    DONE = 6
    ABORT = 7
    WANT = 8
    HEARTBEAT = 9
    BYE = 10
    BOUND_TICKET = 11
    BUNDLE = 12
    HOST_ONLY = 13

    @property
    def text(self) -> str:
        """Name in the specification and in errors."""
        return self.name.lower()


class Prelude(msgspec.Struct, frozen=True):
    """First 48 bytes of every message, without what is constant or follows from the rest."""

    type: Type
    sequence: int = 0
    request_id: bytes = bytes(16)
    epoch: int = 0


class Frame(msgspec.Struct, frozen=True):
    """Which part of a request's cache a payload is. Intervals are global, half-open; tuples have one item a segment."""

    group: int
    segments: int
    """Bit i: segment i of the layer's spec is in the payload, in rising order."""
    layer: int
    head_start: int
    head_stop: int
    token_start: int
    token_stop: int
    dtypes: tuple[int, int, int, int]
    """`DType.code`; 0 where the segment is absent."""
    channels: tuple[int, int, int, int]
    slot: int = 0
    generation: int = 0
    payload_length: int = 0
    checksum: int = 0
    saturated: int = 0
    scale_encoding: int = 0
    """Bit i: segment i is scaled by a part of this payload; the last segments are the scales."""
    codec: int = 0


class Record(msgspec.Struct, frozen=True):
    """One frame of a bundle; the frame's own slot and generation stay 0."""

    request_id: bytes
    epoch: int
    frame: Frame
    payload_offset: int


class Bundle(msgspec.Struct, frozen=True):
    """A slot that holds the payloads of several frames, in rising order."""

    slot: int
    generation: int
    records: tuple[Record, ...]


class Ticket(msgspec.Struct, frozen=True):
    """Send me these tokens: one half-open range a cache group."""

    lease_ms: int
    groups: tuple[tuple[int, int], ...]


class BoundTicket(msgspec.Struct, frozen=True):
    """A ticket for a request of one content: the sender compares the digest with its own."""

    lease_ms: int
    content: bytes
    """16 bytes, not all zero."""
    groups: tuple[tuple[int, int], ...]


class SlotGrant(msgspec.Struct, frozen=True):
    """A slot that a sender may fill, and how to reach it."""

    slot: int
    generation: int
    address: int
    num_bytes: int
    rkey: bytes = b""


class Grant(msgspec.Struct, frozen=True):
    """Slots granted to the sender."""

    slots: tuple[SlotGrant, ...]


class Release(msgspec.Struct, frozen=True):
    """Slots given back unused, each `(slot, generation)`."""

    slots: tuple[tuple[int, int], ...] = ()


class Recall(msgspec.Struct, frozen=True):
    """Release what you do not use of these slots; of all where there are none."""

    slots: tuple[tuple[int, int], ...] = ()


class Done(msgspec.Struct, frozen=True):
    """All routes of this link for the request are verified and in the pool."""

    frames: int
    payload_bytes: int


class Abort(msgspec.Struct, frozen=True):
    """The request is given up. `code` is one of the abort codes of the specification."""

    code: int
    reason: str = ""


class Heartbeat(msgspec.Struct, frozen=True):
    """The side is alive; its monotonic clock in nanoseconds."""

    clock_ns: int


BODIES: dict[Type, type] = {
    Type.FRAME: Frame,
    Type.TICKET: Ticket,
    Type.GRANT: Grant,
    Type.RELEASE: Release,
    Type.RECALL: Recall,
    Type.DONE: Done,
    Type.ABORT: Abort,
    Type.WANT: type(None),
    Type.HEARTBEAT: Heartbeat,
    Type.BYE: type(None),
    Type.BOUND_TICKET: BoundTicket,
    Type.BUNDLE: Bundle,
    Type.HOST_ONLY: type(None),
}
Body: TypeAlias = Frame | Bundle | Ticket | BoundTicket | Grant | Release | Recall | Done | Abort | Heartbeat | None
