"""Where the parts of a frame's payload are, and which of them are scales (`docs/wire-format.md`, sections 3 and 4)."""

from __future__ import annotations

from typing import NamedTuple

from hetkv.kv.dtypes import DType
from hetkv.reference.messages import MAX_SEGMENTS, Frame

ITEM_SIZES = {dtype.code: dtype.itemsize for dtype in DType}
"""Bytes of an element by dtype code."""


class Part(NamedTuple):
    """Where one segment is in a payload, in bytes; the zeros up to the next multiple of 8 are not counted."""

    segment: int
    offset: int
    bytes: int


def payload_parts(frame: Frame) -> list[Part]:
    """Parts of a frame's payload, in order. The payload ends at the multiple of 8 after the last one."""
    rows = (frame.head_stop - frame.head_start) * (frame.token_stop - frame.token_start)
    parts = []
    offset = 0
    for i in range(MAX_SEGMENTS):
        if frame.segments >> i & 1:
            size = rows * frame.channels[i] * ITEM_SIZES[frame.dtypes[i]]
            parts.append(Part(i, offset, size))
            offset += padded_size(size)
    return parts


def scales_of(segments: int, scale_encoding: int) -> dict[int, int]:
    """The segment that holds the scales of each segment that has some: the last ones present, in the same order."""
    scaled = [i for i in range(MAX_SEGMENTS) if scale_encoding >> i & 1]
    present = [i for i in range(MAX_SEGMENTS) if segments >> i & 1]
    return dict(zip(reversed(scaled), reversed(present), strict=False))


def padded_size(count: int) -> int:
    """The next multiple of 8."""
    return (count + 7) // 8 * 8
