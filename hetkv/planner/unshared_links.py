"""KV links without sharing: each port sends one transfer after the other. For measuring pools, not for verdicts.

The simulator's `Links` shares ports max-min fairly, at a cost that grows with the square of the transfers in progress.
In turn, the bytes of a port leave no later, and the mean transfer ends sooner: a pool that misses a target here misses
it there.
"""

from __future__ import annotations

from math import inf

from hetkv.simulator.events import Events
from hetkv.simulator.kv_links import Flow, Links


class UnsharedLinks(Links):
    """`Links` whose ports serve transfers in the order in which they start. The fabric is not a bound."""

    def __init__(self, events: Events, port: float, fabric: float = inf, latency: float = 0.0) -> None:
        super().__init__(events, port, latency=latency)
        self._free: dict[tuple[str, str], float] = {}

    def _start(self, flow: Flow, produced_over: float, layers: int) -> None:
        """A transfer ends no sooner than its last layer's own time after the step that made it."""
        now = self.events.now
        out, into = ("out", flow.source), ("in", flow.sink)
        first = max(now + produced_over / layers, self._free.get(out, 0.0), self._free.get(into, 0.0))
        spent = flow.size / self.port
        self._free[out] = self._free[into] = first + spent
        end = max(first + spent, now + produced_over + spent / layers)
        self.events.at(end + self.latency, self._visible, flow)
        self.sent += flow.size
        self.count += 1

    def cancel(self, flow: Flow) -> None:
        """Stop a transfer; its time on the port is lost."""
        flow.epoch = -1
