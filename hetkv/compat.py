"""Can two ranks exchange KV, and how is each segment converted? `check`, `wire_dtype`, `segment_conversion`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from hetkv.description import Description
from hetkv.dtypes import DType
from hetkv.errors import IncompatibleError
from hetkv.layout import KVLayout, SegmentLayout
from hetkv.reshard import overlap
from hetkv.spec import Interval, LayerSpec

PART_ALIGNMENT = 8
"""Each segment's part of a payload begins at a multiple of this (`RemapJob.wire_offset`)."""

_OCP = {DType.FLOAT8_E4M3FNUZ: DType.FLOAT8_E4M3FN, DType.FLOAT8_E5M2FNUZ: DType.FLOAT8_E5M2}
_TWIN_SCALE = {DType.FLOAT8_E4M3FNUZ: 0.5, DType.FLOAT8_E5M2FNUZ: 1.0}
"""Scale of the OCP twin's codes per scale of the fnuz codes."""
_EXACT = (DType.INT8, DType.UINT8)
"""Dtypes that are moved and never converted."""
_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, 2.0**127


class Conversion(NamedTuple):
    """How one segment travels. Multipliers are one per head of the route, or `None` for 1.0.

    Where the dtypes of a step are equal and its multipliers `None`, that step moves bits.
    """

    wire: DType
    pack: tuple[float, ...] | None
    """Wire value = pool value of the sender x this: its scale over the wire's scale."""
    unpack: tuple[float, ...] | None
    """Pool value of the receiver = wire value x this: the wire's scale over its scale."""


def wire_dtype(src: DType, dst: DType) -> DType | None:
    """The narrower of the two dtypes, the sender's on a tie, fp8 in its OCP form; `None` where they do not convert.

    int8 goes to int8 alone and uint8 (opaque bytes) to uint8 alone.
    """
    if src in _EXACT or dst in _EXACT:
        return src if src is dst else None
    narrow = src if src.itemsize <= dst.itemsize else dst
    return _OCP.get(narrow, narrow)


def segment_conversion(
    src: SegmentLayout, dst: SegmentLayout, heads: Interval, src_heads: Interval, dst_heads: Interval
) -> Conversion:
    """Wire dtype and multipliers of one segment for the global `heads` of a route (design: element = code x scale).

    `src_heads` and `dst_heads` are the global heads of the whole layouts. The wire's scale is that of the side whose
    dtype travels, the sender's where both do, so that side's step moves bits. fnuz dtypes travel as their OCP twins:
    e4m3fnuz as e4m3fn, whose codes mean twice as much, so at half the pool's scale (that step then maps code to code);
    e5m2fnuz as e5m2, which has the same largest value, at the pool's scale. Two layouts of one fnuz dtype exchange its
    codes as they are where all scales are equal, and are requantised to the receiver's scale where not. Raises
    `IncompatibleError` where the dtypes do not convert, or scales lie in memory.
    """
    wire = wire_dtype(src.dtype, dst.dtype)
    if wire is None:
        raise IncompatibleError("dtype", src.dtype.value, dst.dtype.value, "int8 and opaque bytes are not converted")
    if wire is DType.UINT8:
        return Conversion(wire, None, None)
    dynamic = [part.scale is not None and not part.scale.values for part in (src, dst)]
    if any(dynamic):
        mine, theirs = ("scales in memory" if kept else "no scales in memory" for kept in dynamic)
        raise IncompatibleError("scale", mine, theirs, "this wire version carries static scales only")
    source, target = _scales(src, heads, src_heads), _scales(dst, heads, dst_heads)
    if wire is DType.INT8 and source != target:
        raise IncompatibleError("scale", source, target, "int8 is not requantised")
    if src.dtype is dst.dtype and source == target:
        return Conversion(src.dtype, None, None)
    if wire is src.dtype:
        on_wire = source
    elif wire is dst.dtype:
        on_wire = target
    elif src.dtype is not dst.dtype and src.dtype.itemsize <= dst.dtype.itemsize:
        on_wire = [scale * _TWIN_SCALE[src.dtype] for scale in source]
    else:
        on_wire = [scale * _TWIN_SCALE[dst.dtype] for scale in target]
    pack, unpack = _ratio(source, on_wire), _ratio(on_wire, target)
    if not all(_FLOAT32_MIN <= ratio <= _FLOAT32_MAX for ratio in (pack or ()) + (unpack or ())):
        raise IncompatibleError("scale", source, target, "their ratio is not a normal float32")
    return Conversion(wire, pack, unpack)


def token_bytes(layer: LayerSpec, src: KVLayout, dst: KVLayout, num_heads: int) -> int:
    """Payload bytes of one token of `num_heads` heads of a layer: the least that a slot must hold."""
    total = 0
    for segment in layer.segments:
        wire = wire_dtype(src.segments[segment.name].dtype, dst.segments[segment.name].dtype)
        size = num_heads * segment.channels * (wire.itemsize if wire is not None else 0)
        total += -(-size // PART_ALIGNMENT) * PART_ALIGNMENT
    return total


def check(mine: Description, theirs: Description) -> None:
    """Raise `IncompatibleError` with the first field that keeps two ranks from exchanging KV, and both sides' values.

    Pure, and the same from both sides except that `mine` and `theirs` are exchanged.
    """
    if mine.role == theirs.role:
        raise IncompatibleError("role", mine.role, theirs.role)
    for path, ours, other in differences(mine.spec, theirs.spec, "spec"):
        raise IncompatibleError(path, ours, other)
    _check_heartbeat(mine, theirs)
    sender, receiver = (mine, theirs) if mine.role == "sender" else (theirs, mine)
    shared = list(overlap(mine.spec, mine.shard, theirs.shard))
    if not shared:
        raise IncompatibleError("shard", _shard_text(mine), _shard_text(theirs), "no layer and head is on both sides")
    need = 0
    for layer, heads in shared:
        _check_layer(mine, sender, receiver, layer, heads)
        need = max(need, token_bytes(mine.spec.layers[layer], sender.layout(layer), receiver.layout(layer), heads.size))
    if receiver.slot_bytes < need:
        values = f"frames of at least {need} bytes", f"slots of {receiver.slot_bytes} bytes"
        ours, other = values if mine is sender else values[::-1]
        raise IncompatibleError("slot_bytes", ours, other, "a slot holds one token of a layer")


def differences(mine: object, theirs: object, path: str) -> Iterator[tuple[str, object, object]]:
    """(path, value, value) of every leaf in which two descriptions of one type differ, in field order."""
    if mine == theirs:
        return
    if isinstance(mine, msgspec.Struct) and type(mine) is type(theirs):
        for name in mine.__struct_fields__:
            yield from differences(getattr(mine, name), getattr(theirs, name), f"{path}.{name}")
    elif isinstance(mine, tuple) and isinstance(theirs, tuple):
        names = getattr(mine, "_fields", None)
        if len(mine) != len(theirs):
            yield f"len({path})", len(mine), len(theirs)
        for index, (ours, other) in enumerate(zip(mine, theirs, strict=False)):
            yield from differences(ours, other, f"{path}.{names[index]}" if names else f"{path}[{index}]")
    else:
        yield path, mine, theirs


def _check_heartbeat(mine: Description, theirs: Description) -> None:
    """Each side must wait for at least two of the other's heartbeats."""
    why = "a timeout must be at least twice the other side's interval"
    if mine.heartbeat_timeout_ms < 2 * theirs.heartbeat_interval_ms:
        ours, other = f"timeout {mine.heartbeat_timeout_ms}", f"interval {theirs.heartbeat_interval_ms}"
    elif theirs.heartbeat_timeout_ms < 2 * mine.heartbeat_interval_ms:
        ours, other = f"interval {mine.heartbeat_interval_ms}", f"timeout {theirs.heartbeat_timeout_ms}"
    else:
        return
    raise IncompatibleError("heartbeat_ms", ours, other, why)


def _check_layer(mine: Description, sender: Description, receiver: Description, layer: int, heads: Interval) -> None:
    """Every segment of a layer must convert; opaque state must be bytes on both sides."""
    spec = mine.spec.layers[layer]
    for segment in spec.segments:
        src, dst = (side.layout(layer).segments[segment.name] for side in (sender, receiver))
        name = f"layers[{layer}].{segment.name}"
        try:
            if spec.kind == "state" and not (src.dtype is dst.dtype is DType.UINT8):
                raise IncompatibleError("dtype", src.dtype.value, dst.dtype.value, "state is opaque bytes, uint8")
            segment_conversion(src, dst, heads, sender.shard.heads[layer], receiver.shard.heads[layer])
        except IncompatibleError as error:
            values = (error.mine, error.theirs) if mine is sender else (error.theirs, error.mine)
            raise IncompatibleError(f"{name}.{error.field}", values[0], values[1], error.why) from None


def _scales(part: SegmentLayout, heads: Interval, held: Interval) -> list[float]:
    """Static scale of each global head; 1.0 where the layout has none."""
    values = part.scale.values if part.scale is not None else (1.0,)
    if len(values) == 1:
        return [values[0]] * heads.size
    return list(values[heads.start - held.start : heads.stop - held.start])


def _ratio(numerators: list[float], denominators: list[float]) -> tuple[float, ...] | None:
    ratios = tuple(a / b for a, b in zip(numerators, denominators, strict=True))
    return None if all(ratio == 1.0 for ratio in ratios) else ratios


def _shard_text(side: Description) -> str:
    start, stop = side.shard.layers
    heads = {side.shard.heads[layer] for layer in range(start, stop)}
    return f"layers [{start}, {stop}), heads " + " and ".join(f"[{a}, {b})" for a, b in sorted(heads))
