"""Malformed messages of wire format v1, each with the error that both codecs report."""

from __future__ import annotations

import struct
from typing import NamedTuple

from good_vectors import ABORT, BOUND, BUNDLE, GOOD, GRANT, KEY, KV, RELEASE, REQUEST, TICKET, frame, message

from hetkv.kv.dtypes import DType
from hetkv.reference import messages
from hetkv.reference.wire import seal


class Bad(NamedTuple):
    about: str
    data: bytes
    error: str
    text: str


def patch(data: bytes, at: int, code: str, value: int | bytes, sealed: bool = True) -> bytes:
    """`data` with a little-endian field at byte `at` replaced, and a MAC that fits again unless `sealed` is false."""
    field = struct.pack("<" + code, value)
    changed = data[:at] + field + data[at + len(field) :]
    return seal(changed[:-8], KEY) if sealed else changed


def resize(data: bytes, extra: bytes = b"", cut: int = 0) -> bytes:
    """`data` with its body cut or extended; length and MAC fit again."""
    body = data[: len(data) - 8 - cut] + extra
    return seal(body[:8] + struct.pack("<I", len(body) + 8) + body[12:], KEY)


def bad_vectors() -> dict[str, Bad]:
    """Every way to be malformed, each with the error's name and a part of its text."""
    m, u, a = "MalformedError", "UnsupportedError", "AuthenticationError"
    kv, ticket = message(KV, messages.Type.FRAME), message(TICKET, messages.Type.TICKET)
    grant, release = message(GRANT, messages.Type.GRANT), message(RELEASE, messages.Type.RELEASE)
    abort, done = message(ABORT, messages.Type.ABORT), message(messages.Done(1, 2), messages.Type.DONE)
    beat, bye = message(messages.Heartbeat(5), messages.Type.HEARTBEAT), message(None, messages.Type.BYE)
    latin = resize(patch(abort, 52, "I", 1), b"\xe9" + bytes(7), cut=len(abort) - 64)
    newer = patch(kv, 5, "B", 6)
    bound = message(BOUND, messages.Type.BOUND_TICKET)
    bundle = message(BUNDLE, messages.Type.BUNDLE)
    scaled, mla = (message(GOOD[name][1], messages.Type.FRAME) for name in ("frame-scales", "frame-scales-mla"))
    one = frame([DType.UINT8], [1], heads=1, tokens=1)
    huge = patch(patch(message(one, messages.Type.FRAME), 72, "Q", 2**64 - 1), 88, "I", 2**32 - 1)
    return {
        # The prelude.
        "empty": Bad("no bytes", b"", m, "message of 0 bytes is shorter than 56"),
        "truncated-prelude": Bad("55 bytes", kv[:55], m, "message of 55 bytes is shorter than 56"),
        "truncated": Bad("the last 8 bytes are missing", kv[:-8], m, "length is 144, but 136 bytes arrived"),
        "trailing": Bad("8 bytes too many", kv + bytes(8), m, "length is 144, but 152 bytes arrived"),
        "magic": Bad("foreign magic", patch(kv, 0, "4s", b"PK\3\4"), m, "magic is 504b0304, not 484b5631"),
        "major": Bad("a new major version", patch(kv, 4, "B", 2), u, "major version is 2; this side reads 1"),
        "major-zero": Bad("major version 0", patch(kv, 4, "B", 0), u, "major version is 0"),
        "reserved": Bad("reserved field used", patch(kv, 12, "I", 1), m, "reserved field at byte 12 is 1, not 0"),
        "type-zero": Bad("type 0", patch(bye, 6, "H", 0), u, "type 0 is not known to version 1.5 (message is 1.5)"),
        "type-newer": Bad(
            "a type of version 1.6",
            patch(patch(bye, 6, "H", 14), 5, "B", 6),
            u,
            "type 14 is not known to version 1.5 (message is 1.6)",
        ),
        "length-oversized": Bad(
            "length over the limit", patch(kv, 8, "I", 65544), m, "length 65544 is over the limit of 65536"
        ),
        "length-huge": Bad("length 2^32 - 1", patch(kv, 8, "I", 2**32 - 1), m, "length 4294967295 is over the limit"),
        "length-short": Bad("length below the bytes", patch(kv, 8, "I", 136), m, "length is 136, but 144"),
        "length-unaligned": Bad("60 bytes", resize(bye, bytes(4)), m, "length 60 is not a multiple of 8"),
        "length-frame": Bad("a longer frame", resize(kv, bytes(8)), m, "length of a frame is 152; must be 144"),
        "length-bye": Bad("a bye with a body", resize(bye, bytes(8)), m, "length of a bye is 64; must be 56"),
        "length-ticket": Bad(
            "a ticket without a body", patch(bye, 6, "H", 2), m, "length of a ticket is 56; must be at least 64"
        ),
        "bit-flip-body": Bad("one bit of the layer", patch(kv, 52, "B", 10, sealed=False), a, "MAC of a frame"),
        "bit-flip-sequence": Bad("a replay renumbered", patch(kv, 16, "Q", 3, sealed=False), a, "MAC of a frame"),
        "bit-flip-mac": Bad("one bit of the MAC", beat[:-1] + bytes([beat[-1] ^ 1]), a, "MAC of a heartbeat"),
        "wrong-key": Bad("the other direction's key", seal(kv[:-8], bytes(16)), a, "MAC of a frame does not match"),
        "request-missing": Bad("no request", patch(kv, 24, "16s", b""), m, "request_id of a frame is all zeros"),
        "request-extra": Bad(
            "a heartbeat of a request", patch(beat, 24, "16s", REQUEST), m, f"is {REQUEST.hex()}, not zeros"
        ),
        "epoch-extra": Bad("a bye of an epoch", patch(bye, 40, "Q", 7), m, "epoch of a bye is 7, not 0"),
        # The frame.
        "segments-none": Bad("no segment", patch(kv, 50, "H", 0), m, "segments is 0"),
        "segments-many": Bad("segment 4", patch(kv, 50, "H", 19), m, "segments is 19, which names a segment above 3"),
        "heads-empty": Bad("no head", patch(kv, 60, "I", 4), m, "head interval [4, 4) is empty or reversed"),
        "heads-reversed": Bad("heads reversed", patch(kv, 60, "I", 2), m, "head interval [4, 2) is empty or reversed"),
        "tokens-empty": Bad("no token", patch(kv, 72, "Q", 32), m, "token interval [32, 32) is empty or reversed"),
        "tokens-reversed": Bad("tokens reversed", patch(kv, 72, "Q", 31), m, "token interval [32, 31) is empty or"),
        "frame-reserved": Bad("reserved field used", patch(kv, 86, "H", 256), m, "frame: reserved is 256, not 0"),
        "scale-newer": Bad(
            "a scale encoding of 1.6",
            patch(newer, 84, "B", 16),
            u,
            "frame: scale_encoding 16 is not known to version 1.5 (message is 1.6)",
        ),
        "scale-absent": Bad(
            "scales of no segment", patch(kv, 84, "B", 4), m, "scale_encoding is 4, which names an absent segment"
        ),
        "scale-of-scales": Bad(
            "K and its scales scaled", patch(scaled, 84, "B", 7), m, "but segments is 15: too few for the scales"
        ),
        "scale-alone": Bad(
            "a segment that scales itself",
            patch(message(GOOD["frame-int8"][1], messages.Type.FRAME), 84, "B", 1),
            m,
            "but segments is 1: too few for the scales",
        ),
        "scale-bfloat16": Bad(
            "scales of bfloat16 values", patch(mla, 80, "B", 3), m, "dtypes[0] is 3, which takes no scales"
        ),
        "scale-uint8": Bad(
            "scales of opaque bytes", patch(mla, 80, "B", 9), m, "dtypes[0] is 9, which takes no scales"
        ),
        "scale-dtype": Bad(
            "scales in float16", patch(mla, 82, "B", 2), m, "dtypes[2] is 2, but scales are float32 (1)"
        ),
        "scale-groups": Bad(
            "5 scales for 512 channels", patch(mla, 96, "I", 5), m, "channels[0] is 512, which 5 scales do not divide"
        ),
        "scale-groups-many": Bad(
            "more scales than channels", patch(mla, 96, "I", 1024), m, "which 1024 scales do not divide"
        ),
        "codec-newer": Bad(
            "a codec of 1.6", patch(newer, 85, "B", 2), u, "frame: codec 2 is not known to version 1.5 (message is 1.6)"
        ),
        "dtype-newer": Bad(
            "a dtype of 1.6",
            patch(newer, 81, "B", 10),
            u,
            "frame: dtypes[1] 10 is not known to version 1.5 (message is 1.6)",
        ),
        "dtype-missing": Bad("no dtype", patch(kv, 80, "B", 0), m, "dtypes[0] is 0, but the segment is present"),
        "dtype-extra": Bad(
            "dtype of no segment", patch(kv, 83, "B", 3), m, "dtypes[3] is 3, but the segment is absent"
        ),
        "channels-missing": Bad(
            "no channels", patch(kv, 92, "I", 0), m, "channels[1] is 0, but the segment is present"
        ),
        "channels-extra": Bad(
            "channels of no segment", patch(kv, 96, "I", 64), m, "channels[2] is 64, but the segment"
        ),
        "payload-short": Bad(
            "payload length too small", patch(kv, 112, "Q", 5112), m, "payload_length is 5112, but heads, tokens"
        ),
        "payload-long": Bad("payload length too large", patch(kv, 112, "Q", 5128), m, "dtypes make 5120"),
        "payload-unpadded": Bad(
            "padding not counted",
            patch(message(GOOD["frame-mixed"][1], messages.Type.FRAME), 112, "Q", 1533 + 36 + 378),
            m,
            "payload_length is 1947, but heads, tokens, channels and dtypes make 1960",
        ),
        "payload-overflow": Bad("more than 2^64 bytes", huge, m, "over the limit of 1099511627776 bytes"),
        "saturated-many": Bad(
            "more than all elements", patch(kv, 128, "Q", 2561), m, "saturated is 2561, but there are 2560 elements"
        ),
        # The bundle.
        "length-bundle": Bad(
            "a bundle without a body", patch(bye, 6, "H", 12), m, "length of a bundle is 56; must be at least 72"
        ),
        "bundle-none": Bad("no frame", resize(patch(bundle, 56, "I", 0), cut=336), m, "bundle: num_frames is 0"),
        "bundle-many": Bad(
            "more frames than bytes", patch(bundle, 56, "I", 4), m, "num_frames is 4, but 336 bytes of frames follow"
        ),
        "bundle-huge": Bad("2^32 - 1 frames", patch(bundle, 56, "I", 2**32 - 1), m, "is 4294967295, but 336"),
        "bundle-few": Bad("fewer frames than bytes", patch(bundle, 56, "I", 2), m, "num_frames is 2, but 336 bytes"),
        "bundle-cut": Bad("half a frame", resize(bundle, cut=56), m, "num_frames is 3, but 280 bytes of frames"),
        "bundle-reserved": Bad("reserved field used", patch(bundle, 60, "I", 7), m, "bundle: reserved is 7, not 0"),
        "bundle-request": Bad(
            "a bundle of a request", patch(bundle, 24, "16s", REQUEST), m, f"is {REQUEST.hex()}, not zeros"
        ),
        "bundle-frame-request": Bad(
            "a frame of no request", patch(bundle, 64, "16s", b""), m, "bundle: frames[0]: request_id is all zeros"
        ),
        "bundle-frame-segments": Bad(
            "no segment in the second", patch(bundle, 176 + 26, "H", 0), m, "bundle: frames[1]: frame: segments is 0"
        ),
        "bundle-frame-payload": Bad(
            "a payload too short", patch(bundle, 64 + 88, "Q", 5112), m, "frames[0]: frame: payload_length is 5112"
        ),
        "bundle-frame-dtype": Bad(
            "a dtype of 1.6",
            patch(patch(bundle, 5, "B", 6), 176 + 56, "B", 10),
            u,
            "bundle: frames[1]: frame: dtypes[0] 10 is not known to version 1.5 (message is 1.6)",
        ),
        "bundle-unaligned": Bad(
            "a payload at 8", patch(bundle, 64 + 80, "Q", 8), m, "frames[0]: payload_offset is 8, not a multiple of 64"
        ),
        "bundle-overlap": Bad(
            "payloads that overlap", patch(bundle, 176 + 80, "Q", 5056), m, "payload_offset is 5056, not from 5120 to"
        ),
        "bundle-far": Bad(
            "a payload past all slots", patch(bundle, 288 + 80, "Q", 2**40 + 64), m, "frames[2]: payload_offset is"
        ),
        # The other bodies.
        "ticket-none": Bad("no group", resize(patch(ticket, 52, "I", 0), cut=48), m, "ticket: num_groups is 0"),
        "ticket-many": Bad(
            "more groups than bytes", patch(ticket, 52, "I", 4), m, "num_groups is 4, but 48 bytes of ranges follow"
        ),
        "ticket-huge": Bad("2^32 - 1 groups", patch(ticket, 52, "I", 2**32 - 1), m, "num_groups is 4294967295, but 48"),
        "ticket-reversed": Bad(
            "a range reversed", patch(ticket, 72, "Q", 700), m, "token interval [700, 640) of group 1 is reversed"
        ),
        "bound-ticket-zeros": Bad(
            "bound to nothing", patch(bound, 56, "16s", b""), m, "bound_ticket: content is all zeros"
        ),
        "bound-ticket-none": Bad(
            "no group", resize(patch(bound, 52, "I", 0), cut=32), m, "bound_ticket: num_groups is"
        ),
        "bound-ticket-unbound": Bad(
            "the body of a ticket", patch(ticket, 6, "H", 11), m, "num_groups is 3, but 32 bytes of ranges follow"
        ),
        "bound-ticket-short": Bad(
            "a ticket of no group as one",
            patch(patch(resize(ticket, cut=48), 52, "I", 0), 6, "H", 11),
            m,
            "at least 80",
        ),
        "bound-ticket-reversed": Bad(
            "a range reversed", patch(bound, 88, "Q", 700), m, "bound_ticket: token interval [700, 640) of group 1 is"
        ),
        "grant-none": Bad("no slot", resize(patch(grant, 48, "I", 0), cut=80), m, "grant: num_slots is 0"),
        "grant-many": Bad(
            "more slots than bytes", patch(grant, 48, "I", 3), m, "num_slots is 3, but 80 bytes of slots"
        ),
        "grant-cut": Bad(
            "an rkey eats the next slot", patch(grant, 80, "I", 40), m, "slots[1] is cut short: 8 bytes are left"
        ),
        "grant-rkey": Bad("an rkey past the end", patch(grant, 80, "I", 49), m, "slots[0].rkey_length is 49, but 48"),
        "grant-rkey-huge": Bad("an rkey of 2^32 - 1", patch(grant, 80, "I", 2**32 - 1), m, "is 4294967295, but 48"),
        "grant-padding": Bad("padding used", patch(grant, 103, "B", 1), m, "slots[0]: padding is 1, not 0"),
        "grant-reserved": Bad("reserved list field", patch(grant, 52, "I", 9), m, "grant: reserved is 9, not 0"),
        "grant-slot-reserved": Bad("reserved slot field", patch(grant, 84, "I", 9), m, "slots[0].reserved is 9, not 0"),
        "grant-empty-slot": Bad("a slot of no bytes", patch(grant, 72, "Q", 0), m, "grant: slots[0].bytes is 0"),
        "grant-address": Bad(
            "past the end of memory", patch(grant, 64, "Q", 2**64 - (1 << 20)), m, "passes the end of memory"
        ),
        "grant-twice": Bad("one slot twice", patch(grant, 104, "I", 3), m, "grant: slot 3 is named twice"),
        "grant-trailing": Bad("bytes after the slots", resize(grant, bytes(8)), m, "8 bytes follow the last slot"),
        "release-many": Bad("more slots than bytes", patch(release, 48, "I", 3), m, "release: num_slots is 3, but 16"),
        "release-few": Bad("fewer slots than bytes", patch(release, 48, "I", 1), m, "release: num_slots is 1, but 16"),
        "release-reserved": Bad("reserved field", patch(release, 52, "I", 1), m, "release: reserved is 1, not 0"),
        "release-twice": Bad("one slot twice", patch(release, 64, "I", 3), m, "release: slot 3 is named twice"),
        "recall-twice": Bad(
            "one slot twice", patch(patch(release, 64, "I", 3), 6, "H", 5), m, "recall: slot 3 is named twice"
        ),
        "done-request": Bad("done with nothing", patch(done, 24, "16s", b""), m, "request_id of a done is all zeros"),
        "abort-code-zero": Bad("no error", patch(abort, 48, "I", 0), m, "abort: code is 0, which is no error"),
        "abort-code-newer": Bad(
            "a code of 1.6",
            patch(patch(abort, 48, "I", 13), 5, "B", 6),
            u,
            "abort: code 13 is not known to version 1.5 (message is 1.6)",
        ),
        "abort-reason-long": Bad(
            "a reason of 513 bytes",
            resize(patch(message(GOOD["abort-longest"][1], messages.Type.ABORT), 52, "I", 513), bytes(8)),
            m,
            "reason_length 513 is over the limit of 512",
        ),
        "abort-reason-cut": Bad("a reason past the end", patch(abort, 52, "I", 33), m, "reason_length is 33, but 32"),
        "abort-padding": Bad("padding used", patch(abort, len(abort) - 9, "B", 1), m, "abort: padding is 1, not 0"),
        "abort-latin1": Bad("a reason in Latin-1", latin, m, "abort: reason is not UTF-8 at its byte 0"),
    }
