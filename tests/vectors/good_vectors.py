"""Golden messages of wire format v1: `GOOD`, by name."""

from __future__ import annotations

from typing import Any

import msgspec

from hetkv.kv.dtypes import DType
from hetkv.reference import messages as m
from hetkv.reference.payload import payload_parts
from hetkv.reference.wire import encode

KEY = bytes(range(16))
REQUEST = bytes.fromhex("0f1e2d3c4b5a69788796a5b4c3d2e1f0")
EPOCH = 7


def frame(dtypes: list[DType | None], channels: list[int], heads: int = 2, tokens: int = 5, **fields: Any) -> m.Frame:
    """A frame of `heads` heads from head 4 and `tokens` tokens from token 32, with the payload length that it needs."""
    fill = [None] * (4 - len(dtypes))
    made = m.Frame(
        group=fields.pop("group", 0),
        segments=sum(1 << i for i, dtype in enumerate(dtypes) if dtype),
        layer=fields.pop("layer", 11),
        head_start=4,
        head_stop=4 + heads,
        token_start=32,
        token_stop=32 + tokens,
        dtypes=tuple(dtype.code if dtype else 0 for dtype in [*dtypes, *fill]),
        channels=(*channels, *[0] * len(fill)),
        slot=3,
        generation=1,
        checksum=0x0123456789ABCDEF,
        **fields,
    )
    length = sum((part.bytes + 7) // 8 * 8 for part in payload_parts(made))
    return msgspec.structs.replace(made, payload_length=length)


def message(body: m.Body, kind: m.Type, sequence: int = 2) -> bytes:
    """A message of the right kind of prelude for its type."""
    if kind in (m.Type.FRAME, m.Type.TICKET, m.Type.BOUND_TICKET, m.Type.DONE, m.Type.ABORT):
        return encode(m.Prelude(kind, sequence, REQUEST, EPOCH), body, KEY)
    return encode(m.Prelude(kind, sequence), body, KEY)


KV = frame([DType.BFLOAT16, DType.BFLOAT16], [128, 128], saturated=1)
TICKET = m.Ticket(30_000, ((0, 640), (128, 640), (0, 0)))
BOUND = m.BoundTicket(30_000, bytes(range(0xC0, 0xD0)), ((0, 640), (128, 640)))
GRANT = m.Grant((m.SlotGrant(3, 1, 0x7F00_0000_1000, 1 << 20, b"rkey of slot 3"), m.SlotGrant(4, 9, 4096, 8)))
RELEASE = m.Release(((3, 1), (4, 9)))
OTHER = bytes(range(0x10, 0x20))


def record(request: bytes, epoch: int, at: int, made: m.Frame) -> m.Record:
    """A frame of a bundle."""
    return m.Record(request, epoch, msgspec.structs.replace(made, slot=0, generation=0), at)


BUNDLE = m.Bundle(
    3,
    1,
    (
        record(REQUEST, EPOCH, 0, frame([DType.BFLOAT16, DType.BFLOAT16], [128, 128], saturated=1)),
        record(REQUEST, EPOCH, 5120, frame([DType.BFLOAT16, DType.BFLOAT16], [128, 128], layer=12)),
        record(OTHER, EPOCH + 1, 10496, frame([DType.FLOAT8_E4M3FN], [511], heads=1, tokens=3, group=2)),
    ),
)
ABORT = m.Abort(8, "lease ran out: Größe \u2265 0")

GOOD: dict[str, tuple[str, m.Body, m.Type]] = {
    "frame": ("K and V of two heads and five tokens", KV, m.Type.FRAME),
    "frame-mixed": (
        "MLA record: fp8 values, fp32 scales, bf16 rotary part; parts padded to 8 bytes",
        frame([DType.FLOAT8_E4M3FN, DType.FLOAT32, DType.BFLOAT16], [511, 3, 63], heads=1, tokens=3, group=2),
        m.Type.FRAME,
    ),
    "frame-scales": (
        "K and V in int8, each with a scale for each token and head",
        frame([DType.INT8, DType.INT8, DType.FLOAT32, DType.FLOAT32], [128, 128, 1, 1], scale_encoding=3),
        m.Type.FRAME,
    ),
    "frame-scales-mla": (
        "MLA record: an fp8 latent with a scale for each 128 channels, a bf16 rotary part",
        frame([DType.FLOAT8_E4M3FN, DType.BFLOAT16, DType.FLOAT32], [512, 64, 4], heads=1, tokens=3, scale_encoding=1),
        m.Type.FRAME,
    ),
    "frame-scales-second": (
        "fp8 K with a static scale, V with scales of 16 channels each; its scales are segment 3",
        frame(
            [DType.FLOAT8_E5M2, DType.FLOAT8_E4M3FN, None, DType.FLOAT32], [64, 96, 0, 6], scale_encoding=2, saturated=9
        ),
        m.Type.FRAME,
    ),
    "bundle": ("two layers of one request, one of another", BUNDLE, m.Type.BUNDLE),
    "bundle-one": (
        "a single frame, which does not begin the slot",
        m.Bundle(0, 0, (record(OTHER, 1, 64, frame([DType.UINT8], [8], heads=1, tokens=1)),)),
        m.Type.BUNDLE,
    ),
    "frame-value-only": ("segment 1 alone", frame([None, DType.FLOAT16], [0, 64]), m.Type.FRAME),
    "frame-limits": (
        "the largest values that fields may have",
        msgspec.structs.replace(
            frame([DType.UINT8] * 4, [1, 1, 1, 1], heads=1, tokens=8),
            group=0xFFFF,
            layer=0xFFFFFFFF,
            head_start=0xFFFFFFFE,
            head_stop=0xFFFFFFFF,
            token_start=2**64 - 9,
            token_stop=2**64 - 1,
            slot=0xFFFFFFFF,
            generation=0xFFFFFFFF,
            checksum=2**64 - 1,
            saturated=32,
        ),
        m.Type.FRAME,
    ),
    **{
        f"frame-{dtype.value}": (f"one segment of {dtype.value}", frame([dtype], [96], tokens=1), m.Type.FRAME)
        for dtype in DType
    },
    "ticket": ("three cache groups, the last one wants nothing", TICKET, m.Type.TICKET),
    "bound-ticket": ("a ticket for a request of one content", BOUND, m.Type.BOUND_TICKET),
    "bound-ticket-least": (
        "a content of one bit; nothing is wanted",
        m.BoundTicket(1, bytes(15) + b"\1", ((0, 0),)),
        m.Type.BOUND_TICKET,
    ),
    "grant": ("a new slot with its rkey, and one that the link has seen", GRANT, m.Type.GRANT),
    "grant-last": ("a slot that ends at the last address", m.Grant((m.SlotGrant(0, 0, 2**64 - 9, 8),)), m.Type.GRANT),
    "release": ("two slots", RELEASE, m.Type.RELEASE),
    "release-none": ("no slot", m.Release(), m.Type.RELEASE),
    "recall": ("one slot", m.Recall(((3, 1),)), m.Type.RECALL),
    "recall-all": ("no slot named: all of them", m.Recall(), m.Type.RECALL),
    "done": ("32 frames", m.Done(32, 1 << 29), m.Type.DONE),
    "abort": ("a reason with characters of two and three bytes", ABORT, m.Type.ABORT),
    "abort-silent": ("no reason", m.Abort(1), m.Type.ABORT),
    "abort-longest": ("a reason of 512 bytes", m.Abort(11, "x" * 512), m.Type.ABORT),
    "want": ("no body", None, m.Type.WANT),
    "heartbeat": ("a clock", m.Heartbeat(123_456_789_012), m.Type.HEARTBEAT),
    "bye": ("no body", None, m.Type.BYE),
    "host-only": ("no body", None, m.Type.HOST_ONLY),
}
