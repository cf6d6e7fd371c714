"""KV links: flows between instances share ports and fabric max-min fairly.

Every instance has one port; a port carries `port_bytes_per_second` out and as much in. A fabric may bound all flows
together. Layer-wise overlap is a rate: while a step of `P` seconds computes `L` layers, layer `i` is ready after
`(i + 1) P / L`, so a flow starts after `P / L` and may not outrun `bytes / P` until the step ends. Without contention
this gives the same end as sending layer by layer: the last layer's time after the step, or the link's own time where
the link is slower than the prefill.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from hetkv.simulator.events import Events
from hetkv.simulator.series import Series

Done = Callable[["Flow"], None]

ROOM = 1 - 1e-9
"""A port whose flows want less than this share of it has room for all of them, whatever rounding does."""


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
        self._outs: dict[str, dict[Flow, None]] = {}  # the flows of each port
        self._ins: dict[str, dict[Flow, None]] = {}
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
        self._outs.setdefault(flow.source, {})[flow] = None
        self._ins.setdefault(flow.sink, {})[flow] = None
        self.flows.add(now, 1)
        if flow.cap < inf:
            self.events.at(max(produced, now), self._uncap, flow)
        self._share(flow)

    def _uncap(self, flow: Flow) -> None:
        """The step that produced the flow's bytes is over."""
        if flow not in self._all:
            return
        held_back, epoch = flow.rate >= flow.cap, flow.epoch
        flow.cap = inf
        if held_back:
            self._share(flow)
        if flow.epoch == epoch:
            self._end_at(flow)

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
        out, into = self._outs[flow.source], self._ins[flow.sink]
        del out[flow], into[flow]
        self.flows.add(now, -1)
        self.throughput.add(now, -flow.rate)
        if out or into or (self.fabric < inf and self._all):
            self._share(flow)

    def _touched(self, flow: Flow) -> dict[Flow, None]:
        """Flows whose rate a change of `flow` can move: those connected to it by shared ports, all with a fabric."""
        if self.fabric < inf:
            return self._all
        found: dict[Flow, None] = {}
        outs, ins = self._outs, self._ins
        sources, sinks = {flow.source}, {flow.sink}
        ports = [outs[flow.source], ins[flow.sink]]
        while ports:
            for other in ports.pop():
                if other not in found:
                    found[other] = None
                    if other.source not in sources:
                        sources.add(other.source)
                        ports.append(outs[other.source])
                    if other.sink not in sinks:
                        sinks.add(other.sink)
                        ports.append(ins[other.sink])
        return found

    def _share(self, changed: Flow) -> None:
        """Give every flow that `changed` touches its max-min fair rate from now on."""
        now = self.events.now
        if self.fabric == inf:
            out, into = self._outs[changed.source], self._ins[changed.sink]
            present = changed in self._all
            if present and len(out) == len(into) == 1:
                self._set(changed, min(self.port, changed.cap), now)
                return
            # Ports with room for the caps of all their flows, a flow that left included, hold none of them back.
            gone = 0.0 if present else changed.cap
            if all(gone + sum([f.cap for f in port]) < ROOM * self.port for port in (out, into)):
                if present:
                    self._set(changed, changed.cap, now)
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
        if flow.cap == inf:  # else its last bytes are not computed yet, and `_uncap` comes first
            self._end_at(flow)

    def _end_at(self, flow: Flow) -> None:
        """Unless its rate changes, the flow ends then."""
        self.events.at(flow.since + flow.remaining / flow.rate, self._complete, (flow, flow.epoch))


def max_min(flows: list[Flow], port: float, fabric: float = inf) -> dict[Flow, float]:
    """Max-min fair rates: all rise together, and stop at their cap or when a port or the fabric is full."""
    users, left, paths = _paths(flows, port, fabric)
    rising = [len(mine) for mine in users]
    shares = [room / n for room, n in zip(left, rising, strict=True)]
    rates: dict[Flow, float] = {}

    def stop(flow: Flow, rate: float) -> float:
        """Returns the least share that is left on its path."""
        rates[flow] = rate
        least = inf
        for i in paths[flow]:
            room = left[i] = left[i] - rate
            n = rising[i] = rising[i] - 1
            share = shares[i] = room / n if n else inf
            least = min(least, share)
        return least

    waiting = deque(sorted(flows, key=lambda flow: flow.cap))
    while len(rates) < len(flows):
        least = min(shares)
        narrow = shares.index(least)
        level = max(left[narrow], 1e-9 * port) / rising[narrow]  # rounding may leave a full port below zero
        while waiting[0] in rates:
            waiting.popleft()
        if waiting[0].cap >= level:
            for flow in users[narrow]:
                if flow not in rates:
                    stop(flow, level)
            continue
        least = min(least, stop(waiting[0], waiting[0].cap))
        # Shares rise as flows stop below them: caps below the least of all need no other look at the ports.
        while waiting and (waiting[0] in rates or waiting[0].cap < least):
            flow = waiting.popleft()
            if flow not in rates:
                least = min(least, stop(flow, flow.cap))
    return rates


def _paths(
    flows: list[Flow], port: float, fabric: float
) -> tuple[list[list[Flow]], list[float], dict[Flow, tuple[int, ...]]]:
    """The flows and the bandwidth of each port, and of a fabric that is a bound; and which of them each flow uses."""
    users: list[list[Flow]] = []
    room: list[float] = []
    paths: dict[Flow, tuple[int, ...]] = {}
    outs: dict[str, int] = {}
    ins: dict[str, int] = {}
    whole: tuple[int, ...] = ()
    for flow in flows:
        out = outs.setdefault(flow.source, len(users))
        if out == len(users):
            users.append([])
            room.append(port)
        into = ins.setdefault(flow.sink, len(users))
        if into == len(users):
            users.append([])
            room.append(port)
        if fabric < inf and not whole:
            whole = (len(users),)
            users.append([])
            room.append(fabric)
        paths[flow] = path = (out, into, *whole)
        for i in path:
            users[i].append(flow)
    return users, room, paths
