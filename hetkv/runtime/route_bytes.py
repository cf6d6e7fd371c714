"""What a request moves on every route, by the plans of the links that move it: `route_bytes`."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from hetkv.kv.reshard import Route
from hetkv.kv.spec import Interval
from hetkv.transport.link_plan import link_plans, link_routes, wanted
from hetkv.transport.receiver import Receiver


class RouteBytes(msgspec.Struct, frozen=True):
    """Payload from one rank to another: layers and heads are global and half-open."""

    source: str
    """`instance/rank`."""
    destination: str
    layers: Interval
    heads: Interval
    bytes: int


def route_bytes(receiver: Receiver, source: str, num_tokens: int) -> list[RouteBytes]:
    """Routes from the ranks of instance `source` to this rank, for a request of `num_tokens` tokens.

    Of a sliding-window group only the tokens that are asked for are counted.
    """
    mine = receiver.description
    groups = mine.spec.num_groups
    spans = wanted(mine, [num_tokens] * groups, [0] * groups)
    found = []
    for peer in sorted(receiver.peers, key=lambda peer: peer.description.rank):
        theirs = peer.description
        if theirs.instance != source:
            continue
        # Both lists are in rising layer order, and within a layer in the order of the routes.
        held = [(layer, route) for route in link_routes(mine, theirs) for layer in range(*route.layers)]
        held.sort(key=lambda item: item[0])
        totals: dict[Route, int] = defaultdict(int)
        for (layer, route), plan in zip(held, link_plans(receiver.pool, mine, theirs), strict=True):
            totals[route] += plan.payload_bytes(spans[mine.spec.group_of(layer)].size)
        me = f"{mine.instance}/{mine.rank}"
        found += [RouteBytes(peer.name, me, route.layers, route.heads, size) for route, size in totals.items()]
    return found
