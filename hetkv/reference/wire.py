"""Wire format v1 in pure Python: a second codec, written from `docs/wire-format.md`, that keeps the C++ one honest.

It is for tools and tests: the data plane uses the C++ codec. Both give the same bytes, the same verdicts and the same
error texts. Files of frames are in `hetkv/reference/framefile.py`.
"""

from __future__ import annotations

import hmac
import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hetkv.errors import AuthenticationError, InputError, MalformedError, UnsupportedError, WireError
from hetkv.kv.dtypes import DType
from hetkv.reference.checksum import siphash24
from hetkv.reference.messages import (
    BODIES,
    MAX_ABORT_CODE,
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_REASON_BYTES,
    MAX_SEGMENTS,
    PAYLOAD_ALIGNMENT,
    Abort,
    Body,
    BoundTicket,
    Bundle,
    Done,
    Frame,
    Grant,
    Heartbeat,
    Prelude,
    Recall,
    Record,
    Release,
    SlotGrant,
    Ticket,
    Type,
)
from hetkv.reference.payload import ITEM_SIZES, padded_size, payload_parts, scales_of

MAGIC = b"HKV1"
MAJOR, MINOR = 1, 4
FRAME_BYTES = 144
"""A whole frame message; in a file, the header before each payload."""
CHECKSUM_KEY = b"hetkv.checksum.1"
"""Public key of `checksum_seed`."""

_PRELUDE = struct.Struct("<4sBBHIIQ16sQ")
_FRAME = struct.Struct("<HHIIIQQ4BBBH4IIIQQQ")
_BUNDLE = struct.Struct("<IIII")
_RECORD = struct.Struct("<16sQHHIIIQQ4BBBH4IQQQQ")
_TICKET = struct.Struct("<II")
_BOUND_TICKET = struct.Struct("<II16s")
_RANGE = struct.Struct("<QQ")
_LIST = struct.Struct("<II")
_SLOT_GRANT = struct.Struct("<IIQQII")
_SLOT_NAME = struct.Struct("<II")
_DONE = struct.Struct("<QQ")
_ABORT = struct.Struct("<II")
_HEARTBEAT = struct.Struct("<Q")
_MAC = struct.Struct("<Q")
_MIN_BYTES = _PRELUDE.size + _MAC.size
_SCALED = {dtype.code for dtype in DType if dtype.itemsize == 1 and dtype is not DType.UINT8}


# Smallest body of a type, and whether each body of the type has that size.
_BODY_SIZES = {
    Type.FRAME: (_FRAME.size, True),
    Type.BUNDLE: (_BUNDLE.size, False),
    Type.TICKET: (_TICKET.size, False),
    Type.GRANT: (_LIST.size, False),
    Type.RELEASE: (_LIST.size, False),
    Type.RECALL: (_LIST.size, False),
    Type.DONE: (_DONE.size, True),
    Type.ABORT: (_ABORT.size, False),
    Type.WANT: (0, True),
    Type.HEARTBEAT: (_HEARTBEAT.size, True),
    Type.BYE: (0, True),
    Type.HOST_ONLY: (0, True),
    Type.BOUND_TICKET: (_BOUND_TICKET.size, False),
}
_OF_REQUEST = {Type.FRAME, Type.TICKET, Type.BOUND_TICKET, Type.DONE, Type.ABORT}


def checksum_seed(prelude: Prelude, frame: Frame) -> int:
    """Seed of a frame's checksum: what the frame is, and nothing of where it travels."""
    identity = _pack_prelude(prelude, 0)[24:] + _pack_identity(frame)
    return siphash24(CHECKSUM_KEY, identity)


def encode(prelude: Prelude, body: Body, key: bytes) -> bytes:
    """One whole message. Raises `InputError` where `decode` would not give the same values back."""
    if type(body) is not BODIES[prelude.type]:
        raise InputError(f"body of a {prelude.type.text} is a {type(body).__name__}")
    try:
        packed = _pack_body(body)
        message = seal(_pack_prelude(prelude, _MIN_BYTES + len(packed)) + packed, key)
        decode(message, key)
    except (struct.error, UnicodeEncodeError, UnsupportedError, WireError) as error:
        raise InputError(f"not a valid {prelude.type.text}: {error}") from None
    return message


def decode(message: bytes, key: bytes) -> tuple[Prelude, Body]:
    """Checks and reads one whole message. Raises `MalformedError`, `UnsupportedError` or `AuthenticationError`."""
    if len(message) < _MIN_BYTES:
        raise MalformedError(f"message of {len(message)} bytes is shorter than {_MIN_BYTES}")
    magic, major, minor, code, length, reserved, sequence, request_id, epoch = _PRELUDE.unpack_from(message)
    if magic != MAGIC:
        raise MalformedError(f"magic is {magic.hex()}, not {MAGIC.hex()} (HKV1)")
    if major != MAJOR:
        raise UnsupportedError(f"major version is {major}; this side reads {MAJOR}")
    _must_be_zero("reserved field at byte 12", reserved)
    if code not in Type.__members__.values():
        raise _unknown("type", code, minor)
    prelude = Prelude(Type(code), sequence, request_id, epoch)
    _check_length(prelude.type, length, len(message))
    if not hmac.compare_digest(message[-8:], _MAC.pack(siphash24(key, message[:-8]))):
        raise AuthenticationError(f"MAC of a {prelude.type.text} does not match its bytes")
    _check_request(prelude)
    return prelude, _DECODERS[prelude.type](message[_PRELUDE.size : -_MAC.size], minor)


def seal(unsealed: bytes, key: bytes) -> bytes:
    """`unsealed` (a message without its MAC) followed by its MAC; nothing is checked."""
    return unsealed + _MAC.pack(siphash24(key, unsealed))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _pack_prelude(prelude: Prelude, length: int) -> bytes:
    if len(prelude.request_id) != 16:
        raise InputError(f"request_id has {len(prelude.request_id)} bytes, not 16")
    return _PRELUDE.pack(
        MAGIC, MAJOR, MINOR, prelude.type, length, 0, prelude.sequence, prelude.request_id, prelude.epoch
    )


def _pack_identity(frame: Frame) -> bytes:
    return _pack_frame(frame)[:56]


def _pack_record(record: Record) -> bytes:
    frame = record.frame
    tail = struct.pack("<QQQQ", record.payload_offset, frame.payload_length, frame.checksum, frame.saturated)
    return struct.pack("<16sQ", record.request_id, record.epoch) + _pack_identity(frame) + tail


def _pack_frame(frame: Frame) -> bytes:
    return _FRAME.pack(
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
    return b"".join(_RANGE.pack(*group) for group in groups)


def _pack_body(body: Body) -> bytes:
    match body:
        case None:
            return b""
        case Frame():
            return _pack_frame(body)
        case Bundle(slot, generation, records):
            return _BUNDLE.pack(slot, generation, len(records), 0) + b"".join(map(_pack_record, records))
        case Ticket(lease_ms, groups):
            return _TICKET.pack(lease_ms, len(groups)) + _pack_ranges(groups)
        case BoundTicket(lease_ms, content, groups):
            if len(content) != 16:
                raise InputError(f"content has {len(content)} bytes, not 16")
            return _BOUND_TICKET.pack(lease_ms, len(groups), content) + _pack_ranges(groups)
        case Grant(slots):
            return _LIST.pack(len(slots), 0) + b"".join(
                _SLOT_GRANT.pack(slot.slot, slot.generation, slot.address, slot.num_bytes, len(slot.rkey), 0)
                + _padded(slot.rkey)
                for slot in slots
            )
        case Release(slots) | Recall(slots):
            return _LIST.pack(len(slots), 0) + b"".join(_SLOT_NAME.pack(*slot) for slot in slots)
        case Done():
            return _DONE.pack(body.frames, body.payload_bytes)
        case Abort(code, reason):
            text = reason.encode()
            return _ABORT.pack(code, len(text)) + _padded(text)
        case Heartbeat():
            return _HEARTBEAT.pack(body.clock_ns)


def _unknown(what: str, code: int, minor: int) -> UnsupportedError:
    return UnsupportedError(f"{what} {code} is not known to version {MAJOR}.{MINOR} (message is {MAJOR}.{minor})")


def _must_be_zero(what: str, value: int) -> None:
    if value:
        raise MalformedError(f"{what} is {value}, not 0")


def _check_padding(what: str, padding: bytes) -> None:
    for value in padding:
        _must_be_zero(what, value)


def _check_length(kind: Type, length: int, arrived: int) -> None:
    if length > MAX_MESSAGE_BYTES:
        raise MalformedError(f"length {length} is over the limit of {MAX_MESSAGE_BYTES}")
    if length != arrived:
        raise MalformedError(f"length is {length}, but {arrived} bytes arrived")
    if length % 8:
        raise MalformedError(f"length {length} is not a multiple of 8")
    body, fixed = _BODY_SIZES[kind]
    least = _MIN_BYTES + body
    if length < least or (fixed and length > least):
        raise MalformedError(f"length of a {kind.text} is {length}; must be {'' if fixed else 'at least '}{least}")


def _check_request(prelude: Prelude) -> None:
    named = any(prelude.request_id)
    kind = prelude.type.text
    if prelude.type in _OF_REQUEST:
        if not named:
            raise MalformedError(f"request_id of a {kind} is all zeros")
        return
    if named:
        raise MalformedError(f"request_id of a {kind} is {prelude.request_id.hex()}, not zeros")
    _must_be_zero(f"epoch of a {kind}", prelude.epoch)


def _check_distinct(slots: Sequence[int], kind: str) -> None:
    ordered = sorted(slots)
    for slot, following in itertools.pairwise(ordered):
        if slot == following:
            raise MalformedError(f"{kind}: slot {slot} is named twice")


def _check_interval(what: str, start: int, stop: int) -> None:
    if start >= stop:
        raise MalformedError(f"frame: {what} interval [{start}, {stop}) is empty or reversed")


def _decode_frame(body: bytes, minor: int) -> Frame:
    fields = _FRAME.unpack(body)
    identity = _read_identity(fields[:18], minor)
    slot, generation, payload_length, checksum, saturated = fields[18:]
    replace = msgspec.structs.replace
    frame = replace(identity, slot=slot, generation=generation, payload_length=payload_length, checksum=checksum,
                    saturated=saturated)  # fmt: skip
    _check_payload(frame)
    return frame


def _decode_bundle(body: bytes, minor: int) -> Bundle:
    slot, generation, count, reserved = _BUNDLE.unpack_from(body)
    rest = body[_BUNDLE.size :]
    _must_be_zero("bundle: reserved", reserved)
    if count == 0:
        raise MalformedError("bundle: num_frames is 0")
    if len(rest) != count * _RECORD.size:
        raise MalformedError(f"bundle: num_frames is {count}, but {len(rest)} bytes of frames follow")
    records: list[Record] = []
    end = 0
    for i, fields in enumerate(_RECORD.iter_unpack(rest)):
        try:
            record = _read_record(fields, minor)
            at = record.payload_offset
            if at % PAYLOAD_ALIGNMENT:
                raise MalformedError(f"payload_offset is {at}, not a multiple of {PAYLOAD_ALIGNMENT}")
            if not end <= at <= MAX_PAYLOAD_BYTES:
                raise MalformedError(f"payload_offset is {at}, not from {end} to {MAX_PAYLOAD_BYTES}")
        except (WireError, UnsupportedError) as error:
            raise type(error)(f"bundle: frames[{i}]: {error}") from None
        records.append(record)
        end = at + record.frame.payload_length
    return Bundle(slot, generation, tuple(records))


def _read_record(fields: tuple[Any, ...], minor: int) -> Record:
    request_id, epoch = fields[:2]
    if not any(request_id):
        raise MalformedError("request_id is all zeros")
    identity = _read_identity(fields[2:20], minor)
    offset, payload_length, checksum, saturated = fields[20:]
    replace = msgspec.structs.replace
    frame = replace(identity, payload_length=payload_length, checksum=checksum, saturated=saturated)
    _check_payload(frame)
    return Record(request_id, epoch, frame, offset)


def _read_identity(fields: tuple[Any, ...], minor: int) -> Frame:
    """What a frame says of itself."""
    group, segments, layer, head_start, head_stop, token_start, token_stop = fields[:7]
    dtypes, scale_encoding, codec, reserved, channels = fields[7:11], fields[11], fields[12], fields[13], fields[14:18]
    if segments == 0:
        raise MalformedError("frame: segments is 0, which names no segment")
    if segments >> MAX_SEGMENTS:
        raise MalformedError(f"frame: segments is {segments}, which names a segment above 3")
    _check_interval("head", head_start, head_stop)
    _check_interval("token", token_start, token_stop)
    _must_be_zero("frame: reserved", reserved)
    if scale_encoding >> MAX_SEGMENTS:
        raise _unknown("frame: scale_encoding", scale_encoding, minor)
    if codec:
        raise _unknown("frame: codec", codec, minor)
    for i in range(MAX_SEGMENTS):
        if not segments >> i & 1:
            for what, value in (("dtypes", dtypes[i]), ("channels", channels[i])):
                if value:
                    raise MalformedError(f"frame: {what}[{i}] is {value}, but the segment is absent")
            continue
        if dtypes[i] == 0:
            raise MalformedError(f"frame: dtypes[{i}] is 0, but the segment is present")
        if dtypes[i] not in ITEM_SIZES:
            raise _unknown(f"frame: dtypes[{i}]", dtypes[i], minor)
        if channels[i] == 0:
            raise MalformedError(f"frame: channels[{i}] is 0, but the segment is present")
    _check_scales(segments, scale_encoding, dtypes, channels)
    return Frame(
        group, segments, layer, head_start, head_stop, token_start, token_stop, dtypes, channels,
        scale_encoding=scale_encoding, codec=codec,
    )  # fmt: skip


def _check_scales(segments: int, encoding: int, dtypes: Sequence[int], channels: Sequence[int]) -> None:
    """Each segment that the encoding names has scales, which follow everything that is not scales."""
    if encoding & ~segments:
        raise MalformedError(f"frame: scale_encoding is {encoding}, which names an absent segment")
    scales = scales_of(segments, encoding)
    if any(encoding >> scale & 1 for scale in scales.values()):
        raise MalformedError(f"frame: scale_encoding is {encoding}, but segments is {segments}: too few for the scales")
    for i, scale in sorted(scales.items()):
        if dtypes[i] not in _SCALED:
            raise MalformedError(f"frame: dtypes[{i}] is {dtypes[i]}, which takes no scales")
        if dtypes[scale] != DType.FLOAT32.code:
            raise MalformedError(f"frame: dtypes[{scale}] is {dtypes[scale]}, but scales are float32 (1)")
        if channels[i] % channels[scale]:
            raise MalformedError(f"frame: channels[{i}] is {channels[i]}, which {channels[scale]} scales do not divide")


def _check_payload(frame: Frame) -> None:
    parts = payload_parts(frame)
    total = sum(padded_size(part.bytes) for part in parts)
    if total > MAX_PAYLOAD_BYTES:
        raise MalformedError(
            f"frame: heads, tokens, channels and dtypes ask for a payload over the limit of {MAX_PAYLOAD_BYTES} bytes"
        )
    if frame.payload_length != total:
        raise MalformedError(
            f"frame: payload_length is {frame.payload_length}, but heads, tokens, channels and dtypes make {total}"
        )
    elements = sum(part.bytes // ITEM_SIZES[frame.dtypes[part.segment]] for part in parts)
    if frame.saturated > elements:
        raise MalformedError(f"frame: saturated is {frame.saturated}, but there are {elements} elements")


def _decode_ticket(body: bytes, minor: int) -> Ticket:
    lease_ms, count = _TICKET.unpack_from(body)
    return Ticket(lease_ms, _decode_ranges(body[_TICKET.size :], count, "ticket"))


def _decode_bound_ticket(body: bytes, minor: int) -> BoundTicket:
    lease_ms, count, content = _BOUND_TICKET.unpack_from(body)
    if not any(content):
        raise MalformedError("bound_ticket: content is all zeros")
    return BoundTicket(lease_ms, content, _decode_ranges(body[_BOUND_TICKET.size :], count, "bound_ticket"))


def _decode_ranges(rest: bytes, count: int, kind: str) -> tuple[tuple[int, int], ...]:
    if count == 0:
        raise MalformedError(f"{kind}: num_groups is 0")
    if len(rest) != count * _RANGE.size:
        raise MalformedError(f"{kind}: num_groups is {count}, but {len(rest)} bytes of ranges follow")
    groups = tuple((start, stop) for start, stop in _RANGE.iter_unpack(rest))
    for i, (start, stop) in enumerate(groups):
        if start > stop:
            raise MalformedError(f"{kind}: token interval [{start}, {stop}) of group {i} is reversed")
    return groups


def _decode_grant(body: bytes, minor: int) -> Grant:
    count, reserved = _LIST.unpack_from(body)
    rest = body[_LIST.size :]
    _must_be_zero("grant: reserved", reserved)
    if count == 0:
        raise MalformedError("grant: num_slots is 0")
    if count > len(rest) // _SLOT_GRANT.size:
        raise MalformedError(f"grant: num_slots is {count}, but {len(rest)} bytes of slots follow")
    slots = []
    for i in range(count):
        where = f"grant: slots[{i}]"
        if len(rest) < _SLOT_GRANT.size:
            raise MalformedError(f"{where} is cut short: {len(rest)} bytes are left")
        slot, generation, address, size, rkey_length, reserved = _SLOT_GRANT.unpack_from(rest)
        rest = rest[_SLOT_GRANT.size :]
        _must_be_zero(f"{where}.reserved", reserved)
        if size == 0:
            raise MalformedError(f"{where}.bytes is 0")
        if address + size >= 1 << 64:
            raise MalformedError(f"{where}: address {address} plus {size} bytes passes the end of memory")
        if rkey_length > len(rest):
            raise MalformedError(f"{where}.rkey_length is {rkey_length}, but {len(rest)} bytes are left")
        _check_padding(f"{where}: padding", rest[rkey_length : padded_size(rkey_length)])
        slots.append(SlotGrant(slot, generation, address, size, rest[:rkey_length]))
        rest = rest[padded_size(rkey_length) :]
    if rest:
        raise MalformedError(f"grant: {len(rest)} bytes follow the last slot")
    _check_distinct([slot.slot for slot in slots], "grant")
    return Grant(tuple(slots))


def _decode_names(body: bytes, kind: str) -> tuple[tuple[int, int], ...]:
    count, reserved = _LIST.unpack_from(body)
    rest = body[_LIST.size :]
    _must_be_zero(f"{kind}: reserved", reserved)
    if len(rest) != count * _SLOT_NAME.size:
        raise MalformedError(f"{kind}: num_slots is {count}, but {len(rest)} bytes of slots follow")
    names = tuple((slot, generation) for slot, generation in _SLOT_NAME.iter_unpack(rest))
    _check_distinct([slot for slot, _ in names], kind)
    return names


def _decode_abort(body: bytes, minor: int) -> Abort:
    code, length = _ABORT.unpack_from(body)
    rest = body[_ABORT.size :]
    if code == 0:
        raise MalformedError("abort: code is 0, which is no error")
    if code > MAX_ABORT_CODE:
        raise _unknown("abort: code", code, minor)
    if length > MAX_REASON_BYTES:
        raise MalformedError(f"abort: reason_length {length} is over the limit of {MAX_REASON_BYTES}")
    if len(rest) != padded_size(length):
        raise MalformedError(f"abort: reason_length is {length}, but {len(rest)} bytes of reason follow")
    _check_padding("abort: padding", rest[length:])
    try:
        return Abort(code, rest[:length].decode())
    except UnicodeDecodeError as error:
        raise MalformedError(f"abort: reason is not UTF-8 at its byte {error.start}") from None


_DECODERS: dict[Type, Callable[[bytes, int], Body]] = {
    Type.FRAME: _decode_frame,
    Type.BUNDLE: _decode_bundle,
    Type.TICKET: _decode_ticket,
    Type.GRANT: _decode_grant,
    Type.RELEASE: lambda body, minor: Release(_decode_names(body, "release")),
    Type.RECALL: lambda body, minor: Recall(_decode_names(body, "recall")),
    Type.DONE: lambda body, minor: Done(*_DONE.unpack(body)),
    Type.ABORT: _decode_abort,
    Type.WANT: lambda body, minor: None,
    Type.HEARTBEAT: lambda body, minor: Heartbeat(*_HEARTBEAT.unpack(body)),
    Type.BYE: lambda body, minor: None,
    Type.HOST_ONLY: lambda body, minor: None,
    Type.BOUND_TICKET: _decode_bound_ticket,
}
