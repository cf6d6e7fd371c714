"""Wire format v1 in pure Python: a second codec, written from `docs/wire-format.md`, that keeps the C++ one honest.

It is for tools and tests: the data plane uses the C++ codec. Both give the same bytes, the same verdicts and the same
error texts. Files of frames are in `hetkv/reference/framefile.py`.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence

from hetkv.errors import AuthenticationError, InputError, MalformedError, UnsupportedError, WireError
from hetkv.reference import layout
from hetkv.reference import messages as m
from hetkv.reference.bodies import DECODERS, must_be_zero, unknown
from hetkv.reference.checksum import siphash24

FRAME_BYTES = layout.FRAME_BYTES


def checksum_seed(prelude: m.Prelude, frame: m.Frame) -> int:
    """Seed of a frame's checksum: what the frame is, without where it travels."""
    identity = _pack_prelude(prelude, 0)[24:] + _pack_identity(frame)
    return siphash24(layout.CHECKSUM_KEY, identity)


def encode(prelude: m.Prelude, body: m.Body, key: bytes) -> bytes:
    """One whole message. Raises `InputError` where `decode` would not give the same values back."""
    if type(body) is not m.BODIES[prelude.type]:
        raise InputError(f"body of a {prelude.type.text} is a {type(body).__name__}")
    try:
        packed = _pack_body(body)
        message = seal(_pack_prelude(prelude, layout.MIN_BYTES + len(packed)) + packed, key)
        decode(message, key)
    except (struct.error, UnicodeEncodeError, UnsupportedError, WireError) as error:
        raise InputError(f"not a valid {prelude.type.text}: {error}") from None
    return message


def decode(message: bytes, key: bytes) -> tuple[m.Prelude, m.Body]:
    """Checks and reads one whole message. Raises `MalformedError`, `UnsupportedError` or `AuthenticationError`."""
    if len(message) < layout.MIN_BYTES:
        raise MalformedError(f"message of {len(message)} bytes is shorter than {layout.MIN_BYTES}")
    magic, major, minor, code, length, reserved, sequence, request_id, epoch = layout.PRELUDE.unpack_from(message)
    if magic != layout.MAGIC:
        raise MalformedError(f"magic is {magic.hex()}, not {layout.MAGIC.hex()} (HKV1)")
    if major != layout.MAJOR:
        raise UnsupportedError(f"major version is {major}; this side reads {layout.MAJOR}")
    must_be_zero("reserved field at byte 12", reserved)
    if code not in m.Type.__members__.values():
        raise unknown("type", code, minor)
    prelude = m.Prelude(m.Type(code), sequence, request_id, epoch)
    _check_length(prelude.type, length, len(message))
    if not hmac.compare_digest(message[-8:], layout.MAC.pack(siphash24(key, message[:-8]))):
        raise AuthenticationError(f"MAC of a {prelude.type.text} does not match its bytes")
    _check_request(prelude)
    return prelude, DECODERS[prelude.type](message[layout.PRELUDE.size : -layout.MAC.size], minor)


def seal(unsealed: bytes, key: bytes) -> bytes:
    """`unsealed` (a message without its MAC) followed by its MAC; nothing is checked."""
    return unsealed + layout.MAC.pack(siphash24(key, unsealed))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _pack_prelude(prelude: m.Prelude, length: int) -> bytes:
    if len(prelude.request_id) != 16:
        raise InputError(f"request_id has {len(prelude.request_id)} bytes, not 16")
    return layout.PRELUDE.pack(
        layout.MAGIC,
        layout.MAJOR,
        layout.MINOR,
        prelude.type,
        length,
        0,
        prelude.sequence,
        prelude.request_id,
        prelude.epoch,
    )


def _pack_identity(frame: m.Frame) -> bytes:
    return _pack_frame(frame)[:56]


def _pack_record(record: m.Record) -> bytes:
    frame = record.frame
    tail = struct.pack("<QQQQ", record.payload_offset, frame.payload_length, frame.checksum, frame.saturated)
    return struct.pack("<16sQ", record.request_id, record.epoch) + _pack_identity(frame) + tail


def _pack_frame(frame: m.Frame) -> bytes:
    return layout.FRAME.pack(
        frame.group,
        frame.segments,
        frame.layer,
        frame.head_start,
        frame.head_stop,
        frame.token_start,
        frame.token_stop,
        *frame.dtypes,
        frame.scale_encoding,
        frame.codec,
        0,
        *frame.channels,
        frame.slot,
        frame.generation,
        frame.payload_length,
        frame.checksum,
        frame.saturated,
    )


def _pack_ranges(groups: Sequence[tuple[int, int]]) -> bytes:
    return b"".join(layout.RANGE.pack(*group) for group in groups)


def _pack_body(body: m.Body) -> bytes:
    match body:
        case None:
            return b""
        case m.Frame():
            return _pack_frame(body)
        case m.Bundle(slot, generation, records):
            return layout.BUNDLE.pack(slot, generation, len(records), 0) + b"".join(map(_pack_record, records))
        case m.Ticket(lease_ms, groups):
            return layout.TICKET.pack(lease_ms, len(groups)) + _pack_ranges(groups)
        case m.BoundTicket(lease_ms, content, groups):
            if len(content) != 16:
                raise InputError(f"content has {len(content)} bytes, not 16")
            return layout.BOUND_TICKET.pack(lease_ms, len(groups), content) + _pack_ranges(groups)
        case m.Grant(slots):
            return layout.LIST.pack(len(slots), 0) + b"".join(
                layout.SLOT_GRANT.pack(slot.slot, slot.generation, slot.address, slot.num_bytes, len(slot.rkey), 0)
                + _padded(slot.rkey)
                for slot in slots
            )
        case m.Release(slots) | m.Recall(slots):
            return layout.LIST.pack(len(slots), 0) + b"".join(layout.SLOT_NAME.pack(*slot) for slot in slots)
        case m.Done():
            return layout.DONE.pack(body.frames, body.payload_bytes)
        case m.Abort(code, reason):
            text = reason.encode()
            return layout.ABORT.pack(code, len(text)) + _padded(text)
        case m.Heartbeat():
            return layout.HEARTBEAT.pack(body.clock_ns)


def _check_length(kind: m.Type, length: int, arrived: int) -> None:
    if length > m.MAX_MESSAGE_BYTES:
        raise MalformedError(f"length {length} is over the limit of {m.MAX_MESSAGE_BYTES}")
    if length != arrived:
        raise MalformedError(f"length is {length}, but {arrived} bytes arrived")
    if length % 8:
        raise MalformedError(f"length {length} is not a multiple of 8")
    body, fixed = layout.BODY_SIZES[kind]
    least = layout.MIN_BYTES + body
    if length < least or (fixed and length > least):
        raise MalformedError(f"length of a {kind.text} is {length}; must be {'' if fixed else 'at least '}{least}")


def _check_request(prelude: m.Prelude) -> None:
    named = any(prelude.request_id)
    kind = prelude.type.text
    if prelude.type in layout.OF_REQUEST:
        if not named:
            raise MalformedError(f"request_id of a {kind} is all zeros")
        return
    if named:
        raise MalformedError(f"request_id of a {kind} is {prelude.request_id.hex()}, not zeros")
    must_be_zero(f"epoch of a {kind}", prelude.epoch)
