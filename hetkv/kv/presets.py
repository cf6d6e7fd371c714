"""Known layouts by name, dense: `PRESETS`. `KVLayout.preset` says what each is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.scale import FLOAT32_BYTES, ScaleLayout
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import Segment

PACK_BYTES = 16
"""Width of the innermost run of an x-packed K layout: ROCm paged attention reads 16-byte units."""


class Placement(NamedTuple):
    """Segments of a layout; `shared`: all in one allocation."""

    segments: dict[str, SegmentLayout]
    shared: bool = False


_Preset = Callable[[str, Sequence[Segment], int, DType, "ScaleLayout | None"], Placement]


def _dense(
    segment: Segment,
    order: str,
    block_size: int,
    dtype: DType,
    scale: ScaleLayout | None,
    *,
    block_bytes: int = 0,
    offset: int = 0,
    row: int = 0,
) -> SegmentLayout:
    """`token` and `head` in the given order around rows of `row` channels (default the segment's own)."""
    size = dtype.itemsize
    step = (row or segment.channels) * size
    token, head = (segment.heads * step, step) if order == "nhd" else (step, block_size * step)
    return SegmentLayout(
        dtype,
        segment.heads,
        segment.channels,
        offset,
        block_stride=block_bytes or block_size * segment.heads * step,
        token_stride=token,
        head_stride=head,
        inner_stride=size,
        pack=segment.channels,
        scale=scale,
    )


def _separate(order: str) -> _Preset:
    def make(
        name: str, segments: Sequence[Segment], block_size: int, dtype: DType, scale: ScaleLayout | None
    ) -> Placement:
        return Placement({s.name: _dense(s, order, block_size, dtype, scale) for s in segments})

    return make


def _interleaved(order: str) -> _Preset:
    def make(
        name: str, segments: Sequence[Segment], block_size: int, dtype: DType, scale: ScaleLayout | None
    ) -> Placement:
        sizes = [block_size * s.heads * s.channels * dtype.itemsize for s in segments]
        parts = {
            s.name: _dense(s, order, block_size, dtype, scale, block_bytes=sum(sizes), offset=sum(sizes[:i]))
            for i, s in enumerate(segments)
        }
        return Placement(parts, True)

    return make


def _packed(order: str) -> _Preset:
    def make(
        name: str, segments: Sequence[Segment], block_size: int, dtype: DType, scale: ScaleLayout | None
    ) -> Placement:
        row = sum(s.channels for s in segments)
        parts, offset = {}, 0
        for s in segments:
            parts[s.name] = _dense(s, order, block_size, dtype, scale, offset=offset, row=row)
            offset += s.channels * dtype.itemsize
        return Placement(parts, True)

    return make


def _rocm(
    name: str, segments: Sequence[Segment], block_size: int, dtype: DType, scale: ScaleLayout | None
) -> Placement:
    size = dtype.itemsize
    pack = PACK_BYTES // size
    parts = {}
    for s in segments:
        head = s.channels * block_size * size
        if s.name == "k":
            if s.channels % pack:
                raise InputError(
                    f"layout {name!r} packs {pack} channels of {dtype.value}: {s.channels} channels do not divide"
                )
            parts[s.name] = SegmentLayout(
                dtype,
                s.heads,
                s.channels,
                0,
                s.heads * head,
                pack * size,
                head,
                size,
                pack,
                block_size * pack * size,
                scale,
            )
        else:
            parts[s.name] = SegmentLayout(
                dtype, s.heads, s.channels, 0, s.heads * head, size, head, block_size * size, s.channels, 0, scale
            )
    return Placement(parts)


DS_MLA_GROUP = 128
"""Channels of the latent that share a scale in `fp8_ds_mla`."""


def _fp8_ds_mla(
    name: str, segments: Sequence[Segment], block_size: int, dtype: DType, scale: ScaleLayout | None
) -> Placement:
    """vLLM's `concat_and_cache_ds_mla_kernel`: 512 + 4 * 4 + 64 * 2 = 656 bytes a token for DeepSeek's MLA."""
    if [s.name for s in segments] != ["latent", "rope"] or scale is not None or dtype.itemsize != 1:
        raise InputError(f"layout {name!r} holds a latent of fp8 with scales of its own and its rope")
    latent, rope = segments
    if latent.channels % DS_MLA_GROUP or latent.heads != 1:
        raise InputError(f"layout {name!r} has a scale for each {DS_MLA_GROUP} channels of a latent, not {latent}")
    groups = latent.channels // DS_MLA_GROUP
    rope_offset = latent.channels + groups * FLOAT32_BYTES
    record = rope_offset + rope.channels * DType.BFLOAT16.itemsize
    block = block_size * record
    scales = ScaleLayout((), latent.channels, block, record, 0, FLOAT32_BYTES, DS_MLA_GROUP)
    first = _dense(latent, "nhd", block_size, dtype, scales)
    second = _dense(rope, "nhd", block_size, DType.BFLOAT16, None, offset=rope_offset)
    parts = {
        part.name: msgspec.structs.replace(made, block_stride=block, token_stride=record)
        for part, made in ((latent, first), (rope, second))
    }
    return Placement(parts, True)


PRESETS: dict[str, _Preset] = {
    "nhd": _separate("nhd"),
    "hnd": _separate("hnd"),
    "nhd_interleaved": _interleaved("nhd"),
    "hnd_interleaved": _interleaved("hnd"),
    "packed_nhd": _packed("nhd"),
    "packed_hnd": _packed("hnd"),
    "rocm": _rocm,
    "latent": _packed("nhd"),
    "fp8_ds_mla": _fp8_ds_mla,
    "state": _separate("hnd"),
}
