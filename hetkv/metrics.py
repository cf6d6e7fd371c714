"""What `stats()` of a node counts, and the same for Prometheus.

    from prometheus_client import REGISTRY
    REGISTRY.register(NodeCollector(sender, receiver))     # the extra `metrics`

Nodes may be closed later: a closed one is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    from hetkv.control.description import Description

COUNTERS = {
    "frames": "Frames that were committed (sender) or unpacked (receiver).",
    "payload_bytes": "Payload bytes of those frames.",
    "direct_frames": "Of those, frames that were stored straight into the receiver's window (paths device and shm).",
    "device_frames": "Of those, frames that were stored into another GPU's memory (path device).",
    "bundles": "Sender: bundles in which frames were committed; the frames of a bundle share a slot and a commit.",
    "saturated": "Elements that did not fit the narrower dtype and were clamped.",
    "stale_frames": "Frames that arrived for a request which had ended; they were dropped.",
    "failed_requests": "Requests that ended in an error.",
    "wakeups": "Times that the progress thread woke from sleep.",
}
"""Keys of `stats()` that only rise."""

GAUGES = {
    "open_requests": "Requests in flight.",
    "slow_links": "Links to peers under the same kernel that go over TCP: a warning in the log says why.",
    "pending_tickets": "Sender: tickets that wait for their request.",
    "granted_slots": "Receiver: slots that are granted to senders.",
    "quarantined_slots": "Receiver: slots that a stopped sender may still write to.",
}
"""Keys of `stats()` that rise and fall."""


class _Node(Protocol):
    role: Literal["sender", "receiver"]
    description: Description

    def stats(self) -> dict[str, int]: ...


class NodeCollector:
    """Collects `hetkv_<name>` of some senders and receivers, with the labels `role`, `instance` and `rank`."""

    def __init__(self, *nodes: _Node) -> None:
        self._nodes = nodes

    def describe(self) -> list[Metric]:
        """What is collected, without values: a registry asks before it registers."""
        return list(self._families().values())

    def collect(self) -> Iterator[Metric]:
        """One family a name, one sample a node."""
        families = self._families()
        for node in self._nodes:
            labels = [node.role, node.description.instance, str(node.description.rank)]
            for name, value in node.stats().items():
                if name in families:
                    families[name].add_metric(labels, value)
        yield from families.values()

    @staticmethod
    def _families() -> dict[str, CounterMetricFamily | GaugeMetricFamily]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = ["role", "instance", "rank"]
        return {
            **{name: CounterMetricFamily(f"hetkv_{name}", text, labels=labels) for name, text in COUNTERS.items()},
            **{name: GaugeMetricFamily(f"hetkv_{name}", text, labels=labels) for name, text in GAUGES.items()},
        }
