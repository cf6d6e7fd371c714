"""Reads and checks the bodies of wire format v1: `DECODERS`, by type of message. `wire.py` has checked the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from hetkv.errors import MalformedError, UnsupportedError, WireError
from hetkv.kv.dtypes import DType
from hetkv.reference import layout
from hetkv.reference import messages as m
from hetkv.reference.payload import ITEM_SIZES, padded_size, payload_parts, scales_of


def unknown(what: str, code: int, minor: int) -> UnsupportedError:
    """The error of a code that this version does not know, in a message of version 1.`minor`."""
    version, theirs = f"{layout.MAJOR}.{layout.MINOR}", f"{layout.MAJOR}.{minor}"
    return UnsupportedError(f"{what} {code} is not known to version {version} (message is {theirs})")


def must_be_zero(what: str, value: int) -> None:
    """`MalformedError` for a reserved field that is used."""
    if value:
        raise MalformedError(f"{what} is {value}, not 0")


def _check_padding(what: str, padding: bytes) -> None:
    for value in padding:
        must_be_zero(what, value)


def _check_distinct(slots: Sequence[int], kind: str) -> None:
    ordered = sorted(slots)
    for slot, following in itertools.pairwise(ordered):
        if slot == following:
            raise MalformedError(f"{kind}: slot {slot} is named twice")


def _check_interval(what: str, start: int, stop: int) -> None:
    if start >= stop:
        raise MalformedError(f"frame: {what} interval [{start}, {stop}) is empty or reversed")


def _decode_frame(body: bytes, minor: int) -> m.Frame:
    fields = layout.FRAME.unpack(body)
    identity = _read_identity(fields[:18], minor)
    slot, generation, payload_length, checksum, saturated = fields[18:]
    replace = msgspec.structs.replace
    frame = replace(identity, slot=slot, generation=generation, payload_length=payload_length, checksum=checksum,
                    saturated=saturated)  # fmt: skip
    _check_payload(frame)
    return frame


def _decode_bundle(body: bytes, minor: int) -> m.Bundle:
    slot, generation, count, reserved = layout.BUNDLE.unpack_from(body)
    rest = body[layout.BUNDLE.size :]
    must_be_zero("bundle: reserved", reserved)
    if count == 0:
        raise MalformedError("bundle: num_frames is 0")
    if len(rest) != count * layout.RECORD.size:
        raise MalformedError(f"bundle: num_frames is {count}, but {len(rest)} bytes of frames follow")
    records: list[m.Record] = []
    end = 0
    for i, fields in enumerate(layout.RECORD.iter_unpack(rest)):
        try:
            record = _read_record(fields, minor)
            at = record.payload_offset
            if at % m.PAYLOAD_ALIGNMENT:
                raise MalformedError(f"payload_offset is {at}, not a multiple of {m.PAYLOAD_ALIGNMENT}")
            if not end <= at <= m.MAX_PAYLOAD_BYTES:
                raise MalformedError(f"payload_offset is {at}, not from {end} to {m.MAX_PAYLOAD_BYTES}")
        except (WireError, UnsupportedError) as error:
            raise type(error)(f"bundle: frames[{i}]: {error}") from None
        records.append(record)
        end = at + record.frame.payload_length
    return m.Bundle(slot, generation, tuple(records))


def _read_record(fields: tuple[Any, ...], minor: int) -> m.Record:
    request_id, epoch = fields[:2]
    if not any(request_id):
        raise MalformedError("request_id is all zeros")
    identity = _read_identity(fields[2:20], minor)
    offset, payload_length, checksum, saturated = fields[20:]
    replace = msgspec.structs.replace
    frame = replace(identity, payload_length=payload_length, checksum=checksum, saturated=saturated)
    _check_payload(frame)
    return m.Record(request_id, epoch, frame, offset)


def _read_identity(fields: tuple[Any, ...], minor: int) -> m.Frame:
    """What a frame says of itself."""
    group, segments, layer, head_start, head_stop, token_start, token_stop = fields[:7]
    dtypes, scale_encoding, codec, reserved, channels = fields[7:11], fields[11], fields[12], fields[13], fields[14:18]
    if segments == 0:
        raise MalformedError("frame: segments is 0, which names no segment")
    if segments >> m.MAX_SEGMENTS:
        raise MalformedError(f"frame: segments is {segments}, which names a segment above 3")
    _check_interval("head", head_start, head_stop)
    _check_interval("token", token_start, token_stop)
    must_be_zero("frame: reserved", reserved)
    if scale_encoding >> m.MAX_SEGMENTS:
        raise unknown("frame: scale_encoding", scale_encoding, minor)
    if codec:
        raise unknown("frame: codec", codec, minor)
    for i in range(m.MAX_SEGMENTS):
        if not segments >> i & 1:
            for what, value in (("dtypes", dtypes[i]), ("channels", channels[i])):
                if value:
                    raise MalformedError(f"frame: {what}[{i}] is {value}, but the segment is absent")
            continue
        if dtypes[i] == 0:
            raise MalformedError(f"frame: dtypes[{i}] is 0, but the segment is present")
        if dtypes[i] not in ITEM_SIZES:
            raise unknown(f"frame: dtypes[{i}]", dtypes[i], minor)
        if channels[i] == 0:
            raise MalformedError(f"frame: channels[{i}] is 0, but the segment is present")
    _check_scales(segments, scale_encoding, dtypes, channels)
    return m.Frame(
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
        if dtypes[i] not in layout.SCALED:
            raise MalformedError(f"frame: dtypes[{i}] is {dtypes[i]}, which takes no scales")
        if dtypes[scale] != DType.FLOAT32.code:
            raise MalformedError(f"frame: dtypes[{scale}] is {dtypes[scale]}, but scales are float32 (1)")
        if channels[i] % channels[scale]:
            raise MalformedError(f"frame: channels[{i}] is {channels[i]}, which {channels[scale]} scales do not divide")


def _check_payload(frame: m.Frame) -> None:
    parts = payload_parts(frame)
    total = sum(padded_size(part.bytes) for part in parts)
    if total > m.MAX_PAYLOAD_BYTES:
        raise MalformedError(
            f"frame: heads, tokens, channels and dtypes ask for a payload over the limit of {m.MAX_PAYLOAD_BYTES} bytes"
        )
    if frame.payload_length != total:
        raise MalformedError(
            f"frame: payload_length is {frame.payload_length}, but heads, tokens, channels and dtypes make {total}"
        )
    elements = sum(part.bytes // ITEM_SIZES[frame.dtypes[part.segment]] for part in parts)
    if frame.saturated > elements:
        raise MalformedError(f"frame: saturated is {frame.saturated}, but there are {elements} elements")


def _decode_ticket(body: bytes, minor: int) -> m.Ticket:
    lease_ms, count = layout.TICKET.unpack_from(body)
    return m.Ticket(lease_ms, _decode_ranges(body[layout.TICKET.size :], count, "ticket"))


def _decode_bound_ticket(body: bytes, minor: int) -> m.BoundTicket:
    lease_ms, count, content = layout.BOUND_TICKET.unpack_from(body)
    if not any(content):
        raise MalformedError("bound_ticket: content is all zeros")
    return m.BoundTicket(lease_ms, content, _decode_ranges(body[layout.BOUND_TICKET.size :], count, "bound_ticket"))


def _decode_ranges(rest: bytes, count: int, kind: str) -> tuple[tuple[int, int], ...]:
    if count == 0:
        raise MalformedError(f"{kind}: num_groups is 0")
    if len(rest) != count * layout.RANGE.size:
        raise MalformedError(f"{kind}: num_groups is {count}, but {len(rest)} bytes of ranges follow")
    groups = tuple((start, stop) for start, stop in layout.RANGE.iter_unpack(rest))
    for i, (start, stop) in enumerate(groups):
        if start > stop:
            raise MalformedError(f"{kind}: token interval [{start}, {stop}) of group {i} is reversed")
    return groups


def _decode_grant(body: bytes, minor: int) -> m.Grant:
    count, reserved = layout.LIST.unpack_from(body)
    rest = body[layout.LIST.size :]
    must_be_zero("grant: reserved", reserved)
    if count == 0:
        raise MalformedError("grant: num_slots is 0")
    if count > len(rest) // layout.SLOT_GRANT.size:
        raise MalformedError(f"grant: num_slots is {count}, but {len(rest)} bytes of slots follow")
    slots = []
    for i in range(count):
        where = f"grant: slots[{i}]"
        if len(rest) < layout.SLOT_GRANT.size:
            raise MalformedError(f"{where} is cut short: {len(rest)} bytes are left")
        slot, generation, address, size, rkey_length, reserved = layout.SLOT_GRANT.unpack_from(rest)
        rest = rest[layout.SLOT_GRANT.size :]
        must_be_zero(f"{where}.reserved", reserved)
        if size == 0:
            raise MalformedError(f"{where}.bytes is 0")
        if address + size >= 1 << 64:
            raise MalformedError(f"{where}: address {address} plus {size} bytes passes the end of memory")
        if rkey_length > len(rest):
            raise MalformedError(f"{where}.rkey_length is {rkey_length}, but {len(rest)} bytes are left")
        _check_padding(f"{where}: padding", rest[rkey_length : padded_size(rkey_length)])
        slots.append(m.SlotGrant(slot, generation, address, size, rest[:rkey_length]))
        rest = rest[padded_size(rkey_length) :]
    if rest:
        raise MalformedError(f"grant: {len(rest)} bytes follow the last slot")
    _check_distinct([slot.slot for slot in slots], "grant")
    return m.Grant(tuple(slots))


def _decode_names(body: bytes, kind: str) -> tuple[tuple[int, int], ...]:
    count, reserved = layout.LIST.unpack_from(body)
    rest = body[layout.LIST.size :]
    must_be_zero(f"{kind}: reserved", reserved)
    if len(rest) != count * layout.SLOT_NAME.size:
        raise MalformedError(f"{kind}: num_slots is {count}, but {len(rest)} bytes of slots follow")
    names = tuple((slot, generation) for slot, generation in layout.SLOT_NAME.iter_unpack(rest))
    _check_distinct([slot for slot, _ in names], kind)
    return names


def _decode_abort(body: bytes, minor: int) -> m.Abort:
    code, length = layout.ABORT.unpack_from(body)
    rest = body[layout.ABORT.size :]
    if code == 0:
        raise MalformedError("abort: code is 0, which is no error")
    if code > m.MAX_ABORT_CODE:
        raise unknown("abort: code", code, minor)
    if length > m.MAX_REASON_BYTES:
        raise MalformedError(f"abort: reason_length {length} is over the limit of {m.MAX_REASON_BYTES}")
    if len(rest) != padded_size(length):
        raise MalformedError(f"abort: reason_length is {length}, but {len(rest)} bytes of reason follow")
    _check_padding("abort: padding", rest[length:])
    try:
        return m.Abort(code, rest[:length].decode())
    except UnicodeDecodeError as error:
        raise MalformedError(f"abort: reason is not UTF-8 at its byte {error.start}") from None


DECODERS: dict[m.Type, Callable[[bytes, int], m.Body]] = {
    m.Type.FRAME: _decode_frame,
    m.Type.BUNDLE: _decode_bundle,
    m.Type.TICKET: _decode_ticket,
    m.Type.GRANT: _decode_grant,
    m.Type.RELEASE: lambda body, minor: m.Release(_decode_names(body, "release")),
    m.Type.RECALL: lambda body, minor: m.Recall(_decode_names(body, "recall")),
    m.Type.DONE: lambda body, minor: m.Done(*layout.DONE.unpack(body)),
    m.Type.ABORT: _decode_abort,
    m.Type.WANT: lambda body, minor: None,
    m.Type.HEARTBEAT: lambda body, minor: m.Heartbeat(*layout.HEARTBEAT.unpack(body)),
    m.Type.BYE: lambda body, minor: None,
    m.Type.HOST_ONLY: lambda body, minor: None,
    m.Type.BOUND_TICKET: _decode_bound_ticket,
}
