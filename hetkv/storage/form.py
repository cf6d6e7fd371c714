"""How a layer stands in a file: `stored_part` of a pool's, `FrameHeader` as it is read, and a frame as a pool.

A file is a peer whose pool has one block, canonical as the wire is. It is in the writer's dtype, fp8 in its OCP form.
As a file has no handshake, static scales that are not 1.0 stand in it as scales of each token and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hetkv.control.conversion import Conversion, segment_conversion, wire_dtype
from hetkv.errors import IncompatibleError, InputError, MalformedError, UnsupportedError
from hetkv.kv.dtypes import DType
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import FLOAT32_BYTES, SCALED, ScaleLayout
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import Interval, KVSpec, Shard

_FNUZ = (DType.FLOAT8_E4M3FNUZ, DType.FLOAT8_E5M2FNUZ)
_BY_CODE = {dtype.code: dtype for dtype in DType}


class StoredPart(NamedTuple):
    """One segment in a file."""

    dtype: DType
    scale_groups: int
    """Scales of each token and head that follow; 0: none."""


class FrameHeader(NamedTuple):
    """What a reader takes from a frame's message."""

    layer: int
    heads: Interval
    tokens: Interval
    parts: tuple[StoredPart, ...]
    """In the spec's order."""
    payload_length: int
    checksum: int

    @property
    def text(self) -> str:
        heads, tokens = self.heads, self.tokens
        return f"layer {self.layer}, heads [{heads.start}, {heads.stop}), tokens [{tokens.start}, {tokens.stop})"


def stored_part(part: SegmentLayout) -> StoredPart:
    """The form in which a pool's segment is stored."""
    static = part.scale.values if part.scale is not None else ()
    groups = part.scale_groups or int(part.dtype in SCALED and any(value != 1.0 for value in static))
    return StoredPart(wire_dtype(part.dtype, part.dtype) or part.dtype, groups)


def conversions(
    src: Mapping[str, SegmentLayout], dst: Mapping[str, SegmentLayout], heads: Interval, held: tuple[Interval, Interval]
) -> dict[str, Conversion]:
    """How each segment travels between two layers, as on a link. Raises `IncompatibleError`, which names it."""
    found = {}
    for name, part in src.items():
        try:
            found[name] = segment_conversion(part, dst[name], heads, *held)
        except IncompatibleError as error:
            raise IncompatibleError(f"{name}.{error.field}", error.mine, error.theirs, error.why) from None
    return found


def frame_pool(
    spec: KVSpec, layer: int, heads: Interval, num_tokens: int, parts: tuple[StoredPart, ...], payload: Any
) -> KVPool:
    """A payload (a NumPy array of bytes), as a pool that holds one layer in one block of `num_tokens` tokens."""
    layout = frame_layout(spec, layer, heads, num_tokens, parts)
    shard = Shard(Interval(layer, layer + 1), (heads,) * len(spec.layers))
    return KVPool(spec, shard, {layer: LayerMemory(layout, 1, dict.fromkeys(layout.segments, payload))})


def frame_layout(spec: KVSpec, layer: int, heads: Interval, num_tokens: int, parts: tuple[StoredPart, ...]) -> KVLayout:
    """The wire's own layout, as that of a pool whose only block has `num_tokens` tokens."""
    rows = heads.size * num_tokens
    segments = spec.layers[layer].segments
    sizes = [rows * at.channels * part.dtype.itemsize for at, part in zip(segments, parts, strict=True)]
    sizes += [rows * part.scale_groups * FLOAT32_BYTES for part in parts if part.scale_groups]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // 8) * 8)
    made, scales = {}, iter(starts[len(segments) :])
    for segment, part, offset in zip(segments, parts, starts, strict=False):
        scale = None
        if part.scale_groups:
            token = part.scale_groups * FLOAT32_BYTES
            scale = ScaleLayout(
                offset=next(scales),
                block_stride=token * rows,
                token_stride=token,
                head_stride=token * num_tokens,
                group_stride=FLOAT32_BYTES,
                channels_per_scale=segment.channels // part.scale_groups,
            )
        size = part.dtype.itemsize
        token = segment.channels * size
        made[segment.name] = SegmentLayout(
            part.dtype, heads.size, segment.channels, offset, token * rows, token, token * num_tokens, size,
            segment.channels, scale=scale,
        )  # fmt: skip
    return KVLayout("frame", num_tokens, made, shared=True)


def payload_bytes(spec: KVSpec, layer: int, heads: Interval, num_tokens: int, parts: tuple[StoredPart, ...]) -> int:
    """Bytes of a payload of so many tokens."""
    layout = frame_layout(spec, layer, heads, num_tokens, parts)
    ends = [part.extent(num_tokens, 1) for part in layout.segments.values()]
    ends += [part.scales.extent(num_tokens, 1) for part in layout.segments.values() if part.scale_groups]
    return -(-max(ends) // 8) * 8


def header_of(spec: KVSpec, fields: Mapping[str, Any]) -> FrameHeader:
    """Checks what a frame's message says of the model. Raises `IncompatibleError` or `MalformedError`, by name."""
    layer, heads = fields["layer"], Interval(fields["head_start"], fields["head_stop"])
    tokens = Interval(fields["token_start"], fields["token_stop"])
    if layer >= len(spec.layers) or spec.layers[layer].shares is not None:
        raise IncompatibleError("layer", f"{len(spec.layers)} layers", layer, "it has no cache of its own here")
    at = spec.layers[layer]
    if fields["group"] != at.group:
        raise IncompatibleError(f"layers[{layer}].group", at.group, fields["group"])
    if heads.stop > at.segments[0].heads:
        raise IncompatibleError(f"layers[{layer}].heads", at.segments[0].heads, f"[{heads.start}, {heads.stop})")
    if at.kind == "state" and tokens != (0, 1):
        raise MalformedError(f"tokens [{tokens.start}, {tokens.stop}) of a state layer, whose record is [0, 1)")
    encoding, count = fields["scale_encoding"], len(at.segments)
    scaled = [index for index in range(count) if encoding >> index & 1]
    if encoding >> count or fields["segments"] != (1 << (count + len(scaled))) - 1:
        wanted = f"{count} segments and their scales"
        raise IncompatibleError(f"layers[{layer}].segments", wanted, f"{fields['segments']:#b}, scales {encoding:#b}")
    parts = []
    for index, segment in enumerate(at.segments):
        channels, dtype = fields["channels"][index], _BY_CODE[fields["dtypes"][index]]
        if channels != segment.channels:
            raise IncompatibleError(f"layers[{layer}].{segment.name}.channels", segment.channels, channels)
        if dtype in _FNUZ:
            raise UnsupportedError(f"layers[{layer}].{segment.name}: a file has fp8 as OCP has it, not {dtype.value}")
        groups = fields["channels"][count + scaled.index(index)] if index in scaled else 0
        parts.append(StoredPart(dtype, groups))
    return FrameHeader(layer, heads, tokens, tuple(parts), fields["payload_length"], fields["checksum"])


def check_host(pool: KVPool) -> None:
    """Raise `InputError` for a pool on a device."""
    if pool.device != "cpu":
        raise InputError(f"the pool is on {pool.device}: files are written from host memory and read into it")
