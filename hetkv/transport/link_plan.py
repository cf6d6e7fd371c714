"""From what two ranks agreed on to the plans of their link: where in this pool the transferred parts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hetkv.control.agreement import Agreement
from hetkv.control.conversion import Conversion
from hetkv.control.description import Description
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Interval, KVSpec

if TYPE_CHECKING:
    import hetkv._core as _core


def link_plans(pool: KVPool, agreement: Agreement) -> list[_core.LayerPlan]:
    """Plans of this rank's side of a link, one for each of the agreement's layers."""
    return [
        layer_plan(pool, at.layer, at.route.heads, at.conversions, sends=agreement.sends) for at in agreement.layers
    ]


def layer_plan(
    pool: KVPool, layer: int, heads: Interval, found: Mapping[str, Conversion], *, sends: bool
) -> _core.LayerPlan:
    """One layer's global `heads`, packed or unpacked: the spec's segments, then the scales of those whose scales
    travel, in the same order."""
    from hetkv.core import core

    layout = pool.layers[layer].layout
    first_head = heads.start - pool.shard.heads[layer].start
    segments: list[_core.SegmentPlan] = []
    scales: list[_core.SegmentPlan] = []
    fills: list[_core.ScaleFill] = []
    encoding = 0
    for index, (name, how) in enumerate(found.items()):
        part, base = layout.segments[name], pool.base(layer, name)
        step = how.pack_scales if sends else how.unpack_scales
        place = None
        if part.scale_groups:
            place = core.SegmentMap.of(part.scales, layout.block_size, pool.scale_base(layer, name))
        found_here = step in ("apply", "quantise")
        segments.append(
            core.SegmentPlan(
                pool=core.SegmentMap.of(part, layout.block_size, base),
                first_head=first_head,
                channels=part.channels,
                wire_dtype=how.wire.code,
                multipliers=list((how.pack if sends else how.unpack) or ()),
                pool_scales=place if step == "quantise" else None,
                channels_per_scale=part.channels // max(part.scale_groups, 1),
                wire_scales=len(found) + len(scales) if found_here and how.scale_groups else -1,
                joint=how.joint,
                largest=how.largest if sends else 0.0,
            )
        )
        if step == "fill":
            assert place is not None
            fills.append(core.ScaleFill(place, first_head, part.scale_groups, list(how.fill)))
        if not how.scale_groups:
            continue
        encoding |= 1 << index
        factor = [how.factor] * heads.size if not sends and step == "keep" and how.factor != 1.0 else []
        constant = core.SegmentMap.canonical(base, 1, how.scale_groups, DType.FLOAT32.code)
        scales.append(
            core.SegmentPlan(
                pool=place if place is not None and not found_here else constant,
                first_head=first_head,
                channels=how.scale_groups,
                wire_dtype=DType.FLOAT32.code,
                multipliers=factor,
                carried=found_here,
            )
        )
    group = pool.spec.group_of(layer)
    return core.LayerPlan(layer, group, *heads, [*segments, *scales], fills, encoding)


def wanted(mine: Description, stops: list[int], cached: list[int]) -> list[Interval]:
    """Tokens to ask for, per cache group: what is not cached, and of a sliding-window group only the window's reach."""
    return wanted_tokens(mine.spec, stops, cached)


def wanted_tokens(spec: KVSpec, stops: list[int], cached: list[int]) -> list[Interval]:
    """`wanted` of a model's spec."""
    ranges = []
    for stop, start, window in zip(stops, cached, spec.sliding_windows, strict=True):
        # The next token, number `stop`, sees keys from `stop - window + 1` on.
        first = start if window is None else max(start, stop + 1 - window)
        ranges.append(Interval(min(first, stop), stop))
    return ranges
