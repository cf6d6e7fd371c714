"""What a request moves on every route, by the plans of the links that move it: `route_bytes`."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from hetkv.kv.reshard import Route
from hetkv.kv.spec import Interval
from hetkv.transport.link_plan import wanted
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
        if peer.instance != source:
            continue
        totals: dict[Route, int] = defaultdict(int)
        for at, plan in zip(peer.agreement.layers, peer.plans, strict=True):
            totals[at.route] += plan.payload_bytes(spans[mine.spec.group_of(at.layer)].size)
        me = f"{mine.instance}/{mine.rank}"
        found += [RouteBytes(peer.name, me, route.layers, route.heads, size) for route, size in totals.items()]
    return found
