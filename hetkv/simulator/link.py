"""KV links: flows between instances share ports and fabric max-min fairly.

Every instance has one port; a port carries `port_bytes_per_second` out and as much in. A fabric may bound all flows
together. Layer-wise overlap is a rate: while a step of `P` seconds computes `L` layers, layer `i` is ready after
`(i + 1) P / L`, so a flow starts after `P / L` and may not outrun `bytes / P` until the step ends. Without contention
this gives the same end as sending layer by layer: the last layer's time after the step, or the link's own time where
the link is slower than the prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from hetkv.simulator.events import Events
from hetkv.simulator.series import Series

Done = Callable[["Flow"], None]


class Flow:
    """`size` bytes from instance `source` to `sink` (any hashable names) for `owner`; `rate` is bytes per second."""

    __slots__ = ("cap", "done", "epoch", "owner", "rate", "remaining", "since", "sink", "size", "source")

    def __init__(self, source: str, sink: str, size: float, cap: float, done: Done, owner: object) -> None:
        self.source = source
        self.sink = sink
        self.size = size
        self.cap = cap
        self.done = done
        self.owner = owner
        self.remaining = size
        self.rate = 0.0
        self.since = 0.0
        self.epoch = 0


class Links:
    """All flows in progress. Bandwidths are bytes per second, `latency` seconds (after the last byte)."""

    def __init__(self, events: Events, port: float, fabric: float = inf, latency: float = 0.0) -> None:
        self.events = events
        self.port = port
        self.fabric = fabric
        self.latency = latency
        self.sent = 0.0  # bytes delivered
        self.count = 0  # flows delivered
        self.flows = Series()  # in progress
        self.throughput = Series()  # bytes per second
        self._ports: dict[tuple[str, str], dict[Flow, None]] = {}
        self._all: dict[Flow, None] = {}

    def start(
        self,
        source: str,
        sink: str,
        size: float,
        done: Done,
        owner: object = None,
        produced_over: float = 0.0,
        layers: int = 1,
    ) -> Flow:
        """Send `size` bytes; `done(flow)` is called when the last one is visible at the sink.

        `produced_over`: the bytes are computed from now on, over that many seconds, in `layers` equal parts.
        """
        cap = size / produced_over if produced_over > 0 else inf
        flow = Flow(source, sink, size, cap, done, owner)
        self._start(flow, produced_over, layers)
        return flow

    def cancel(self, flow: Flow) -> None:
        """Stop a flow; its `done` will not be called."""
        flow.epoch = -1
        if flow in self._all:
            self._remove(flow)

    def _start(self, flow: Flow, produced_over: float, layers: int) -> None:
        now = self.events.now
        if produced_over > 0:
            self.events.at(now + produced_over / layers, self._begin, (flow, now + produced_over))
        else:
            self._begin((flow, now))

    def _begin(self, start: tuple[Flow, float]) -> None:
        flow, produced = start
        if flow.epoch < 0:
            return
        now = self.events.now
        flow.since = now
        self._all[flow] = None
        for port in (("out", flow.source), ("in", flow.sink)):
            self._ports.setdefault(port, {})[flow] = None
        self.flows.add(now, 1)
        if flow.cap < inf:
            self.events.at(max(produced, now), self._uncap, flow)
        self._share(flow)

    def _uncap(self, flow: Flow) -> None:
        """The step that produced the flow's bytes is over."""
        held_back = flow.rate >= flow.cap
        flow.cap = inf
        if held_back and flow in self._all:
            self._share(flow)

    def _complete(self, event: tuple[Flow, int]) -> None:
        flow, epoch = event
        if epoch != flow.epoch:
            return
        self._remove(flow)
        self.sent += flow.size
        self.count += 1
        if self.latency:
            self.events.at(self.events.now + self.latency, self._visible, flow)
        else:
            flow.done(flow)

    def _visible(self, flow: Flow) -> None:
        if flow.epoch >= 0:
            flow.done(flow)

    def _remove(self, flow: Flow) -> None:
        now = self.events.now
        del self._all[flow]
        beside = False
        for port in (("out", flow.source), ("in", flow.sink)):
            others = self._ports[port]
            del others[flow]
            beside = beside or bool(others)
        self.flows.add(now, -1)
        self.throughput.add(now, -flow.rate)
        if beside or (self.fabric < inf and self._all):
            self._share(flow)

    def _touched(self, flow: Flow) -> dict[Flow, None]:
        """Flows whose rate a change of `flow` can move: those connected to it by shared ports, all with a fabric."""
        if self.fabric < inf:
            return self._all
        found: dict[Flow, None] = {}
        ports = [("out", flow.source), ("in", flow.sink)]
        seen = set(ports)
        while ports:
            for other in self._ports[ports.pop()]:
                if other not in found:
                    found[other] = None
                    for port in (("out", other.source), ("in", other.sink)):
                        if port not in seen:
                            seen.add(port)
                            ports.append(port)
        return found

    def _share(self, changed: Flow) -> None:
        """Give every flow that `changed` touches its max-min fair rate from now on."""
        now = self.events.now
        alone = (
            changed in self._all
            and len(self._ports["out", changed.source]) == len(self._ports["in", changed.sink]) == 1
        )
        if alone and self.fabric == inf:
            self._set(changed, min(self.port, changed.cap), now)
            return
        for flow, rate in max_min(list(self._touched(changed)), self.port, self.fabric).items():
            self._set(flow, rate, now)

    def _set(self, flow: Flow, rate: float, now: float) -> None:
        if rate == flow.rate and flow.epoch:
            return
        flow.remaining = max(flow.remaining - flow.rate * (now - flow.since), 0.0)
        self.throughput.add(now, rate - flow.rate)
        flow.rate = rate
        flow.since = now
        flow.epoch += 1
        self.events.at(now + flow.remaining / rate, self._complete, (flow, flow.epoch))


def max_min(flows: list[Flow], port: float, fabric: float = inf) -> dict[Flow, float]:
    """Max-min fair rates: all rise together, and stop at their cap or when a port or the fabric is full."""
    left: dict[tuple[str, str], float] = {}
    users: dict[tuple[str, str], dict[Flow, None]] = {}
    whole = ("fabric", "")
    for flow in flows:
        for key, capacity in ((("out", flow.source), port), (("in", flow.sink), port), (whole, fabric)):
            left[key] = capacity
            users.setdefault(key, {})[flow] = None
    rates: dict[Flow, float] = {}
    open_flows = dict.fromkeys(flows)
    while open_flows:
        narrow = min(users, key=lambda key: left[key] / len(users[key]))
        level = max(left[narrow], 1e-9 * port) / len(users[narrow])  # rounding may leave a full port below zero
        lowest = min(open_flows, key=lambda flow: flow.cap)
        stopped = [lowest] if lowest.cap < level else list(users[narrow])
        for flow in stopped:
            rate = rates[flow] = min(flow.cap, level)
            del open_flows[flow]
            for key in (("out", flow.source), ("in", flow.sink), whole):
                left[key] -= rate
                del users[key][flow]
                if not users[key]:
                    del users[key]
    return rates
