"""From two descriptions to the plan of a link: which layers and heads travel, and where they lie in this pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetkv.compat import segment_conversion
from hetkv.description import Description
from hetkv.pool import KVPool
from hetkv.reshard import Route, overlap, routes
from hetkv.spec import Interval

if TYPE_CHECKING:
    from hetkv import _core


def link_routes(mine: Description, theirs: Description) -> list[Route]:
    """Routes between exactly these two ranks, computed from all ranks of both instances."""
    sender, receiver = (mine, theirs) if mine.role == "sender" else (theirs, mine)
    between = routes(mine.spec, sender.shards, receiver.shards)
    return [route for route in between if (route.source, route.destination) == (sender.rank, receiver.rank)]


def linked_ranks(mine: Description, theirs: Description) -> list[int]:
    """Ranks of the peer's instance that hold something this rank holds too: a request involves a link to each."""
    return [rank for rank, shard in enumerate(theirs.shards) if any(overlap(mine.spec, mine.shard, shard))]


def link_plans(pool: KVPool, mine: Description, theirs: Description) -> list[_core.LayerPlan]:
    """Plans of this rank's side of a link, in rising layer order."""
    from hetkv.core import core

    sends = mine.role == "sender"
    plans = []
    for route in link_routes(mine, theirs):
        for layer in range(*route.layers):
            spec = mine.spec.layers[layer]
            segments = []
            for segment in spec.segments:
                here, there = mine.layout(layer).segments[segment.name], theirs.layout(layer).segments[segment.name]
                held = (mine.shard.heads[layer], theirs.shard.heads[layer])
                if sends:
                    conversion = segment_conversion(here, there, route.heads, *held)
                else:
                    conversion = segment_conversion(there, here, route.heads, *held[::-1])
                segments.append(
                    core.SegmentPlan(
                        pool=core.SegmentMap.of(here, mine.layout(layer).block_size, pool.base(layer, segment.name)),
                        first_head=route.heads.start - held[0].start,
                        channels=segment.channels,
                        wire_dtype=conversion.wire.code,
                        multipliers=list((conversion.pack if sends else conversion.unpack) or ()),
                    )
                )
            plans.append((layer, core.LayerPlan(layer, spec.group, *route.heads, segments)))
    return [plan for _, plan in sorted(plans, key=lambda item: item[0])]


def wanted(mine: Description, stops: list[int], held: list[int]) -> list[Interval]:
    """Tokens to ask for, per cache group: what is not held, and of a sliding-window group only the window's reach."""
    ranges = []
    for group, (stop, start) in enumerate(zip(stops, held, strict=True)):
        members = [layer for layer in mine.spec.layers if layer.group == group]
        windows = [layer.window for layer in members]
        first = start
        if windows and all(window is not None for window in windows):
            # The next token, number `stop`, sees keys from `stop - window + 1` on.
            first = max(start, stop + 1 - max(window for window in windows if window is not None))
        ranges.append(Interval(min(first, stop), stop))
    return ranges
