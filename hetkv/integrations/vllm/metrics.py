"""What a worker counts, as vLLM's loggers and its Prometheus endpoint take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
OBSERVED = {
    "load_seconds": "From the ticket to the last verified layer of a request, on the consumer.",
    "exposed_seconds": "From the end of a prefill to the last layer verified by the consumer, on the producer.",
}
"""Histograms, in seconds; one observation a request and worker."""
COUNTED = {
    "loads": "Requests whose KV was loaded.",
    "loaded_tokens": "Prompt tokens whose KV was loaded.",
    "failed_loads": "Requests whose KV could not be loaded.",
    "repeated_loads": "Loads asked for again because the producer had to compute the request again.",
    "sends": "Requests whose KV was delivered.",
    "failed_sends": "Requests whose KV was not delivered.",
    "expired_sends": "Of those, the ones that no consumer asked for or finished in time.",
    "bytes": "Payload bytes that were sent or received.",
    "saturated_elements": "Elements that did not fit the narrower dtype.",
}
"""Counters; summed over workers."""


@dataclass
class HetKVStats(KVConnectorStats):
    """`data`: a list of observations for each histogram, a sum for each counter."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, Any] = {**{name: [] for name in OBSERVED}, **dict.fromkeys(COUNTED, 0)}

    def observe(self, name: str, seconds: float) -> None:
        """One observation of a histogram."""
        self.data[name].append(seconds)

    def add(self, name: str, count: int = 1) -> None:
        """Raise a counter."""
        self.data[name] += count

    def take(self) -> HetKVStats | None:
        """What was counted since the last call; `None` where that is nothing."""
        if self.is_empty():
            return None
        taken = HetKVStats(self.data)
        self.reset()
        return taken

    def aggregate(self, other: KVConnectorStats) -> HetKVStats:
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value
        return self

    def reduce(self) -> dict[str, int | float]:
        means = {f"mean {name}": sum(seen) / len(seen) for name in OBSERVED if (seen := self.data[name])}
        return {**{name: self.data[name] for name in COUNTED}, **means}

    def is_empty(self) -> bool:
        return not any(self.data.values())


class HetKVPromMetrics(KVConnectorPromMetrics):
    """`vllm:hetkv_<name>` for each of `OBSERVED` and `COUNTED`, next to vLLM's own metrics."""

    def __init__(self, config: Any, types: Any, labels: list[str], per_engine: dict[int, list[object]]) -> None:
        super().__init__(config, types, labels, per_engine)
        self._metrics: dict[str, Any] = {}
        for name, text in OBSERVED.items():
            histogram = types[Histogram](
                name=f"vllm:hetkv_{name}", documentation=text, buckets=SECONDS, labelnames=labels
            )
            self._metrics[name] = create_metric_per_engine(histogram, per_engine)
        for name, text in COUNTED.items():
            counter = types[Counter](name=f"vllm:hetkv_{name}", documentation=text, labelnames=labels)
            self._metrics[name] = create_metric_per_engine(counter, per_engine)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name in OBSERVED:
            for seconds in transfer_stats_data[name]:
                self._metrics[name][engine_idx].observe(seconds)
        for name in COUNTED:
            if transfer_stats_data[name]:
                self._metrics[name][engine_idx].inc(transfer_stats_data[name])
