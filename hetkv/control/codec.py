"""Codecs of payloads that are sent over a network: what two sides agree on, and how segments travel then.

`fp8` and `int4` are lossy and so never chosen by themselves: both sides name one. Each is a conversion like any other:
a segment that has two or four bytes an element in both pools travels as e4m3fn or int8 codes and float32 scales, which
the sender finds and the receiver applies. It is left out where slots are shared memory and on links with RDMA. The
codes of `int4` are from -7 to 7, two of which a stream packs in a byte.

`lossless` gives back every bit: parts of payloads are coded where they enter a stream and decoded where they leave it.
A side names it where it can decode; the sender then decides, by measured rates or always.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from hetkv.control.agreement import Agreement, LayerRoute
from hetkv.control.compat import MAX_PARTS
from hetkv.control.conversion import Conversion, static_scales
from hetkv.kv.dtypes import DType
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import Interval

Codec = Literal["none", "fp8", "int4", "lossless"]
Make = Callable[[SegmentLayout, SegmentLayout, Interval, Interval, Interval], Conversion]
CODECS_SINCE = 5
"""Minor version from which descriptions name codecs."""
DEVICE_CODECS_SINCE = 7
"""Minor version from which devices find and apply scales, which `fp8` and `int4` need."""
CODED_VALUES = {DType.BFLOAT16: 1, DType.FLOAT16: 2}
"""What `lossless` codes, by its number on the wire."""
INT4_VALUES = 3
"""The number on the wire of codes of four bits."""
INT4_LARGEST = 7.0
GROUP_CHANNELS = 128
"""Channels that share a scale of `fp8`, where they divide a head's."""
INT4_GROUPS = 32, 16
"""The same of `int4`: the first that divides."""
LEAST_CHANNELS = 32
"""Of a head: with fewer, scales and padding eat up what is saved."""


def agreed_codec(agreement: Agreement, kind: Literal["unix", "tcp"]) -> Codec:
    """The codec of a link whose streams are of that kind; the same on both sides."""
    mine, theirs = agreement.mine, agreement.theirs
    rdma = bool(mine.worker_address and theirs.worker_address)
    if kind != "tcp" or rdma or agreement.minor < CODECS_SINCE:
        return "none"
    both = set(mine.codecs) & set(theirs.codecs)
    if mine.device == theirs.device == "cpu" or agreement.minor >= DEVICE_CODECS_SINCE:
        if "fp8" in both:
            return "fp8"
        if "int4" in both:
            return "int4"
    return "lossless" if "lossless" in both and coded_values(agreement) else "none"


def coded_values(agreement: Agreement) -> int:
    """What most of the payload bytes of a token are that `lossless` codes; 0: most are something else."""
    found: Counter[DType] = Counter()
    for at in agreement.layers:
        segments = (agreement.mine if agreement.sends else agreement.theirs).layout(at.layer).segments
        for name, how in at.conversions.items():
            found[how.wire] += segments[name].channels * how.wire.itemsize
    return CODED_VALUES.get(max(found, key=lambda dtype: found[dtype]), 0) if found else 0


def coding(agreement: Agreement, codec: Codec, wanted: str) -> dict[str, Any]:
    """What the extension's `LinkConfig` learns of a link of that codec, on a side that asked for `wanted`."""
    if codec not in ("lossless", "int4"):
        return {}
    if not agreement.sends:
        return {"accept": sum(1 << kind for kind in (CODED_VALUES.values() if codec == "lossless" else (INT4_VALUES,)))}
    if codec == "int4":
        return {"coded_values": INT4_VALUES, "always_code": True}
    return {"coded_values": coded_values(agreement), "always_code": wanted == "lossless"}


def with_codec(agreement: Agreement, codec: Codec) -> Agreement:
    """The agreement with the conversions of a link of that codec."""
    if codec not in ("fp8", "int4"):
        return agreement
    make = fp8_conversion if codec == "fp8" else int4_conversion
    return agreement._replace(layers=tuple(_rounded(agreement, at, make) for at in agreement.layers))


def _rounded(agreement: Agreement, at: LayerRoute, make: Make) -> LayerRoute:
    mine, theirs = agreement.mine, agreement.theirs
    sender, receiver = (mine, theirs) if agreement.sends else (theirs, mine)
    heads, found = at.route.heads, dict(at.conversions)
    sides = sender.layout(at.layer).segments, receiver.layout(at.layer).segments
    held = sender.shard.heads[at.layer], receiver.shard.heads[at.layer]
    parts = len(found) + sum(how.scale_groups > 0 for how in found.values())
    for name in found:
        src, dst = (side[name] for side in sides)
        if parts < MAX_PARTS and _is_wide(src) and _is_wide(dst):
            found[name] = make(src, dst, heads, *held)
            parts += 1
    return at._replace(conversions=found)


def _is_wide(part: SegmentLayout) -> bool:
    return part.dtype in (DType.BFLOAT16, DType.FLOAT16, DType.FLOAT32) and part.channels >= LEAST_CHANNELS


def fp8_conversion(
    src: SegmentLayout, dst: SegmentLayout, heads: Interval, src_heads: Interval, dst_heads: Interval
) -> Conversion:
    """A wide segment as fp8 codes and scales on the wire, for the global `heads` of a route."""
    groups = _groups(src.channels, (GROUP_CHANNELS,))
    pack, unpack = _multipliers(src, dst, heads, src_heads, dst_heads)
    return Conversion(DType.FLOAT8_E4M3FN, pack, unpack, groups, "quantise", "apply")


def int4_conversion(
    src: SegmentLayout, dst: SegmentLayout, heads: Interval, src_heads: Interval, dst_heads: Interval
) -> Conversion:
    """The same as int8 codes from -7 to 7 and scales."""
    groups = _groups(src.channels, INT4_GROUPS)
    pack, unpack = _multipliers(src, dst, heads, src_heads, dst_heads)
    return Conversion(DType.INT8, pack, unpack, groups, "quantise", "apply", largest=INT4_LARGEST)


def _groups(channels: int, sizes: Sequence[int]) -> int:
    """By the first size that divides the channels; else all share a scale."""
    return next((channels // size for size in sizes if channels % size == 0), 1)


def _multipliers(
    src: SegmentLayout, dst: SegmentLayout, heads: Interval, src_heads: Interval, dst_heads: Interval
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    source, target = static_scales(src, heads, src_heads), static_scales(dst, heads, dst_heads)
    pack = None if set(source) == {1.0} else tuple(source)
    unpack = None if set(target) == {1.0} else tuple(1 / scale for scale in target)
    return pack, unpack
