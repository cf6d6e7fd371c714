"""Placement of one segment of a layer for one rank's heads: `SegmentLayout`.

The address of an element, in bytes from the base of its segment's memory, is

    offset + block * block_stride + (token % block_size) * token_stride + head * head_stride
           + (channel // pack) * outer_stride + (channel % pack) * inner_stride

where `block = block_table[token // block_size]`. `csrc/map.h` is the same formula in C++.
"""

from __future__ import annotations

import msgspec

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.scale import FLOAT32_BYTES, SCALED, ScaleLayout


class SegmentLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Offsets and strides are in bytes; `pack` is in channels."""

    dtype: DType
    heads: int
    channels: int
    offset: int
    block_stride: int
    token_stride: int
    head_stride: int
    inner_stride: int
    pack: int
    """Channels of one inner run; equal to `channels` where the channel axis is not split."""
    outer_stride: int = 0
    scale: ScaleLayout | None = None

    @property
    def scale_groups(self) -> int:
        """Scales in memory of one token and head; 0 where there are none."""
        if self.scale is None or not self.scale.in_memory:
            return 0
        return self.channels // (self.scale.channels_per_scale or self.channels)

    @property
    def scales(self) -> SegmentLayout:
        """The scales in memory, as a segment whose channels are groups. Only for segments that have such scales."""
        scale = self.scale
        assert scale is not None
        return SegmentLayout(
            DType.FLOAT32,
            self.heads,
            self.scale_groups,
            scale.offset,
            scale.block_stride,
            scale.token_stride,
            scale.head_stride,
            inner_stride=scale.group_stride or FLOAT32_BYTES,
            pack=self.scale_groups,
        )

    @property
    def shares_scales(self) -> bool:
        """Several heads share the scales of a token."""
        return self.scale_groups > 0 and self.heads > 1 and self.scale is not None and self.scale.head_stride == 0

    def block_span(self, block_size: int) -> int:
        """Bytes from `offset` of a block to the end of its last element."""
        return (
            (block_size - 1) * self.token_stride
            + (self.heads - 1) * self.head_stride
            + (self.channels // self.pack - 1) * self.outer_stride
            + (self.pack - 1) * self.inner_stride
            + self.dtype.itemsize
        )

    def extent(self, block_size: int, num_blocks: int) -> int:
        """Bytes of memory, from the base, that `num_blocks` blocks reach into."""
        return self.offset + (num_blocks - 1) * self.block_stride + self.block_span(block_size)

    def axes(self, block_size: int, num_blocks: int) -> tuple[tuple[int, int], ...]:
        """(count, stride) of every axis, in any order."""
        return (
            (num_blocks, self.block_stride),
            (block_size, self.token_stride),
            (self.heads, self.head_stride),
            (self.channels // self.pack, self.outer_stride),
            (self.pack, self.inner_stride),
        )


def check_scale(where: str, part: SegmentLayout, block_size: int) -> None:
    """Raise `InputError` where a segment cannot have the scales that its layout says. `where` begins the text."""
    scale = part.scale
    if scale is None or not scale.in_memory:
        return
    if part.dtype not in SCALED:
        raise InputError(f"{where}: {part.dtype.value} has no scales in memory, only fp8 and int8 have")
    per = scale.channels_per_scale or part.channels
    if part.channels < 1 or part.channels % per:
        raise InputError(f"{where}: {part.channels} channels with a scale for each {per}")
    if block_size > 1 and scale.token_stride == 0:
        raise InputError(f"{where}: scales in memory are one a token, but their token stride is 0")
    if part.channels // per > 1 and scale.group_stride == 0:
        raise InputError(f"{where}: {part.channels // per} scales a head, but their group stride is 0")
