"""What profilers and monitors see: NVTX ranges, OpenTelemetry spans, and counters for Prometheus (`NodeCollector`).

Each library is used where the process has imported it, and costs nothing where not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

Finish = Callable[[BaseException | None], None]


def begin(name: str, request_id: object) -> Finish | None:
    """Begin a range and a span of a request; what is returned ends them. `None` where neither is on."""
    nvtx, tracing = sys.modules.get("nvtx"), sys.modules.get("opentelemetry.trace")
    if nvtx is None and tracing is None:
        return None
    ends: list[Finish] = []
    if nvtx is not None:
        started = nvtx.start_range(message=f"{name} {request_id}", domain="hetkv")
        ends.append(lambda _: nvtx.end_range(started))
    if tracing is not None:
        ends.append(_span(tracing, name, {"hetkv.request": str(request_id)}))

    def finish(error: BaseException | None) -> None:
        for end in ends:
            end(error)

    return finish


def _span(tracing: Any, name: str, attributes: dict[str, str | int]) -> Finish:
    span = tracing.get_tracer("hetkv").start_span(name, attributes=attributes)

    def end(error: BaseException | None) -> None:
        if error is not None:
            span.set_status(tracing.StatusCode.ERROR, str(error))
        span.end()

    return end


LEVELS = ("open_requests", "slow_links", "pending_tickets", "granted_slots", "quarantined_slots")
"""Counters of `Node.stats` that go down again."""


class NodeCollector:
    """Counters of nodes as Prometheus metrics: `prometheus_client.REGISTRY.register(NodeCollector([sender]))`."""

    def __init__(self, nodes: Iterable[Any]) -> None:
        self.nodes = list(nodes)

    def collect(self) -> Iterable[Any]:
        """Metrics `hetkv_<counter>`, labelled by role, instance and rank. Called by Prometheus' registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for node in self.nodes:
            labels = [node.role, node.instance, str(node.rank)]
            for name, value in node.stats().items():
                kind = GaugeMetricFamily if name in LEVELS else CounterMetricFamily
                if name not in families:
                    text = f"hetkv: {name.replace('_', ' ')}, see docs/integrate.md"
                    families[name] = kind(f"hetkv_{name}", text, labels=["role", "instance", "rank"])
                families[name].add_metric(labels, value)
        return families.values()
