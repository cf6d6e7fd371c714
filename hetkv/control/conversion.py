"""How one segment travels between two layouts: `wire_dtype`, `segment_conversion`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from hetkv.errors import IncompatibleError
from hetkv.kv.dtypes import DType
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import Interval

_OCP = {DType.FLOAT8_E4M3FNUZ: DType.FLOAT8_E4M3FN, DType.FLOAT8_E5M2FNUZ: DType.FLOAT8_E5M2}
_TWIN_SCALE = {DType.FLOAT8_E4M3FNUZ: 0.5, DType.FLOAT8_E5M2FNUZ: 1.0}
"""Scale of the OCP twin's codes per scale of the fnuz codes."""
_EXACT = (DType.INT8, DType.UINT8)
"""Dtypes that are moved and never converted, int8 unless its scales are in memory."""
_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, 2.0**127
_KEPT_FACTOR = {
    (DType.FLOAT8_E4M3FN, DType.FLOAT8_E4M3FNUZ): 2.0,
    (DType.FLOAT8_E4M3FNUZ, DType.FLOAT8_E4M3FN): 1.0,
    (DType.FLOAT8_E5M2, DType.FLOAT8_E5M2FNUZ): 1.0,
    (DType.FLOAT8_E5M2FNUZ, DType.FLOAT8_E5M2): 1.0,
}
"""By what a scale is multiplied so that codes of one dtype become codes of the other without a new scale.

fn to fnuz: all codes stay, at twice the scale. The other way the values stay: 240, the largest, is a code of fn, and
only a subnormal below fn's smallest is rounded. The e5m2 twins have the same largest value, so values stay too.
"""

ScaleStep = Literal["", "keep", "fill", "apply", "quantise"]
"""What a step does with scales in memory or on the wire.

- `keep`: they are copied, times the conversion's `factor`; codes convert by the step's multipliers.
- `fill`: the pool's are written with `fill`, as the wire has none; codes convert by the step's multipliers.
- `apply`: the result has none; each code is multiplied by its scale and the step's multiplier.
- `quantise`: found from the largest magnitude of the values of each group.
"""


class Conversion(NamedTuple):
    """How one segment travels. Multipliers are one per head of the route, or `None` for 1.0.

    Where the dtypes of a step are equal and its multipliers `None`, that step moves bits (`apply` and `quantise` never
    do).
    """

    wire: DType
    pack: tuple[float, ...] | None
    """Wire value = pool value of the sender x this: its scale over the wire's scale."""
    unpack: tuple[float, ...] | None
    """Pool value of the receiver = wire value x this: the wire's scale over its scale."""
    scale_groups: int = 0
    """Scales of each token and head that travel with the codes; 0: none."""
    pack_scales: ScaleStep = ""
    unpack_scales: ScaleStep = ""
    factor: float = 1.0
    """`keep` on the receiver: its scale = wire scale x this."""
    fill: tuple[float, ...] = ()
    """`fill`: the receiver's scales, one per head of the route."""
    joint: bool = False
    """`quantise` finds one scale for all heads of the route."""
    largest: float = 0.0
    """The code that the largest magnitude of a group becomes where the sender finds scales; 0: the wire dtype's."""


def wire_dtype(src: DType, dst: DType, exact: Sequence[DType] = _EXACT) -> DType | None:
    """The narrower of the two dtypes, the sender's on a tie, fp8 in its OCP form; `None` where they do not convert.

    int8 goes to int8 alone and uint8 (opaque bytes) to uint8 alone: those of `exact`.
    """
    if src in exact or dst in exact:
        return src if src is dst else None
    narrow = src if src.itemsize <= dst.itemsize else dst
    return _OCP.get(narrow, narrow)


def segment_conversion(
    src: SegmentLayout, dst: SegmentLayout, heads: Interval, src_heads: Interval, dst_heads: Interval
) -> Conversion:
    """Wire dtype, multipliers and scale steps of one segment for the global `heads` of a route.

    An element is code x scale. `src_heads` and `dst_heads` are the global heads of the whole layouts.

    Static scales: the wire's scale is that of the side whose dtype travels, the sender's where both do, so that side's
    step moves bits. fnuz dtypes travel as their OCP twins: e4m3fnuz as e4m3fn, whose codes mean twice as much, so at
    half the pool's scale (that step then maps code to code); e5m2fnuz as e5m2, which has the same largest value, at the
    pool's scale. Two layouts of one fnuz dtype exchange its codes as they are where all scales are equal, and are
    requantised to the receiver's scale where not.

    Scales in memory: a sender's travel with its codes. A receiver's are copied where the dtype and the groups allow it,
    written where the sender's are static, and otherwise found anew: by the sender where its dtype is wider, so that the
    narrow dtype travels, and by the receiver where not.

    Raises `IncompatibleError` where the dtypes do not convert or the receiver cannot hold the scales.
    """
    if src.scale_groups or dst.scale_groups:
        return _with_scales_in_memory(src, dst, heads, src_heads, dst_heads)
    wire = wire_dtype(src.dtype, dst.dtype)
    if wire is None:
        raise _different_dtypes(src, dst)
    if wire is DType.UINT8:
        return Conversion(wire, None, None)
    source, target = static_scales(src, heads, src_heads), static_scales(dst, heads, dst_heads)
    if wire is DType.INT8 and source != target:
        raise IncompatibleError("scale", source, target, "int8 is not requantised to a static scale")
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
    _check_normal((pack or ()) + (unpack or ()), source, target)
    return Conversion(wire, pack, unpack)


def static_scales(part: SegmentLayout, heads: Interval, held: Interval) -> list[float]:
    """Static scale of each global head; 1.0 where the layout has none."""
    values = part.scale.values if part.scale is not None else (1.0,)
    if len(values) == 1:
        return [values[0]] * heads.size
    return list(values[heads.start - held.start : heads.stop - held.start])


def scale_text(part: SegmentLayout) -> str:
    """A layout's scales in words, as errors name them."""
    if not part.scale_groups:
        return f"static {list(part.scale.values)}" if part.scale is not None else "none"
    per = "token" if part.shares_scales else "token and head"
    return f"in memory, per {per}" + (f", {part.scale_groups} groups of channels" if part.scale_groups > 1 else "")


def _with_scales_in_memory(
    src: SegmentLayout, dst: SegmentLayout, heads: Interval, src_heads: Interval, dst_heads: Interval
) -> Conversion:
    exact = [DType.UINT8] + [DType.INT8] * (not all(p.scale_groups for p in (src, dst) if p.dtype is DType.INT8))
    wire = wire_dtype(src.dtype, dst.dtype, exact)
    if wire is None:
        raise _different_dtypes(src, dst)
    if src.dtype is dst.dtype:
        wire = src.dtype  # also an fnuz dtype: only its own kind reads it
    if src.scale_groups:
        return _from_scales(src, dst, wire, heads, src_heads, dst_heads)
    source = static_scales(src, heads, src_heads)
    whole = dst.heads == 1 or not dst.shares_scales or heads == dst_heads
    if not whole:
        raise _shared(src, dst)
    if src.dtype.itemsize > dst.dtype.itemsize:
        factor = _factor(wire, dst.dtype)
        assert factor is not None  # the wire has the receiver's dtype, or its OCP twin
        _check_normal(source, source, scale_text(dst), "a static scale is not a normal float32")
        return Conversion(
            wire, _multipliers(source), _constant(1 / factor, heads), dst.scale_groups, "quantise", "keep", factor,
            joint=dst.shares_scales,
        )  # fmt: skip
    on_wire = source if wire is src.dtype else [scale * _TWIN_SCALE[src.dtype] for scale in source]
    pack, factor = _ratio(source, on_wire), _factor(wire, dst.dtype)
    written = [scale * (factor or 1.0) for scale in on_wire]
    _check_normal(written, source, scale_text(dst), "a static scale is not a normal float32")
    if factor is None or (dst.shares_scales and len(set(source)) > 1):
        return Conversion(wire, pack, _multipliers(on_wire), unpack_scales="quantise", joint=dst.shares_scales)
    return Conversion(wire, pack, _constant(1 / factor, heads), unpack_scales="fill", fill=tuple(written))


def _from_scales(
    src: SegmentLayout, dst: SegmentLayout, wire: DType, heads: Interval, src_heads: Interval, dst_heads: Interval
) -> Conversion:
    """The sender's scales travel with its codes."""
    if not dst.scale_groups:
        if dst.dtype is DType.INT8:
            raise IncompatibleError(
                "scale", scale_text(src), scale_text(dst), "int8 without scales in memory cannot hold the sender's"
            )
        target = static_scales(dst, heads, dst_heads)
        unpack = _ratio([1.0] * heads.size, target)
        _check_normal(unpack or (), scale_text(src), target)
        return Conversion(wire, None, unpack, src.scale_groups, "keep", "apply")
    factor = _factor(wire, dst.dtype)
    shared_alike = src.shares_scales and src_heads.start <= dst_heads.start and dst_heads.stop <= src_heads.stop
    if factor is not None and src.scale_groups == dst.scale_groups and (not dst.shares_scales or shared_alike):
        return Conversion(wire, None, _constant(1 / factor, heads), src.scale_groups, "keep", "keep", factor)
    if dst.shares_scales and heads != dst_heads:
        raise _shared(src, dst)
    if src.scale_groups % dst.scale_groups and dst.scale_groups % src.scale_groups:
        raise IncompatibleError("scale", scale_text(src), scale_text(dst), "one side's groups divide the other's")
    return Conversion(wire, None, None, src.scale_groups, "keep", "quantise", joint=dst.shares_scales)


def _factor(src: DType, dst: DType) -> float | None:
    return 1.0 if src is dst else _KEPT_FACTOR.get((src, dst))


def _constant(value: float, heads: Interval) -> tuple[float, ...] | None:
    return None if value == 1.0 else (value,) * heads.size


def _multipliers(scales: list[float]) -> tuple[float, ...] | None:
    return None if all(scale == 1.0 for scale in scales) else tuple(scales)


def _ratio(numerators: list[float], denominators: list[float]) -> tuple[float, ...] | None:
    return _multipliers([a / b for a, b in zip(numerators, denominators, strict=True)])


def _check_normal(
    factors: Sequence[float], source: object, target: object, why: str = "their ratio is not a normal float32"
) -> None:
    if not all(_FLOAT32_MIN <= factor <= _FLOAT32_MAX for factor in factors):
        raise IncompatibleError("scale", source, target, why)


def _different_dtypes(src: SegmentLayout, dst: SegmentLayout) -> IncompatibleError:
    return IncompatibleError(
        "dtype",
        src.dtype.value,
        dst.dtype.value,
        "opaque bytes, and int8 without scales in memory, are not converted",
    )


def _shared(src: SegmentLayout, dst: SegmentLayout) -> IncompatibleError:
    why = "scales that the receiver's heads share need all those heads from one sender"
    return IncompatibleError("scale", scale_text(src), scale_text(dst), why)
