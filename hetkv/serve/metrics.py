"""What the server counts: for Prometheus at `/metrics`, and the latest requests for the page."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from hetkv.serve.generation import Generation
from hetkv.serve.member import Member
from hetkv.serve.scheduler import Scheduler

TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
LATEST, WINDOW_S = 2000, 60.0
"""Requests that percentiles are of: the latest ones, and not older than this."""


class Times(NamedTuple):
    """Of one request that has ended, in milliseconds, by the simulator's names. None: it had no such time."""

    ended: float
    output_tokens: int
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    queue_ms: float | None
    transfer_ms: float | None


class Metrics:
    """Of one server. `ended` is what the scheduler calls."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("hetkv_requests", "Sequences that ended, by why", ["finish"], **made)
        self._prompt = Counter("hetkv_prompt_tokens", "Prompt tokens of sequences that ended", **made)
        self._output = Counter("hetkv_output_tokens", "Tokens that were generated", **made)
        self._restarts = Counter("hetkv_restarts", "Sequences that began again on other instances", **made)
        self._ttft = Histogram("hetkv_ttft_seconds", "Arrival to first token", buckets=TTFT_S, **made)
        self._tpot = Histogram("hetkv_tpot_seconds", "Time per further token", buckets=TPOT_S, **made)
        self._transfer = Histogram("hetkv_transfer_seconds", "Prompt computed to KV there", buckets=TPOT_S, **made)
        self.registry.register(_Fleet(scheduler))
        self.latest: deque[Times] = deque(maxlen=LATEST)

    def ended(self, generation: Generation) -> None:
        """Count a sequence that has ended, however it did."""
        g = generation
        self._requests.labels(g.finish).inc()
        self._prompt.inc(len(g.prompt))
        self._output.inc(len(g.generated))
        self._restarts.inc(g.restarts)
        if g.finish not in ("stop", "length") or g.first_token is None or g.last_token is None:
            return
        count = len(g.generated)
        ttft = g.first_token - g.arrival
        tpot = (g.last_token - g.first_token) / (count - 1) if count > 1 else None
        exposed = max(0.0, g.visible - g.prefilled) if g.visible and g.prefilled else None
        self._ttft.observe(ttft)
        if tpot is not None:
            self._tpot.observe(tpot)
        if exposed is not None:
            self._transfer.observe(exposed)
        queue = None if g.scheduled is None else g.scheduled - g.arrival
        times = (ttft, tpot, g.last_token - g.arrival, queue, exposed)
        in_ms = (None if seconds is None else 1e3 * seconds for seconds in times)
        self.latest.append(Times(time.monotonic(), count, *in_ms))

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)

    def summary(self) -> dict[str, Any]:
        """Percentiles and rates of the last minute, by the simulator's names."""
        since = time.monotonic() - WINDOW_S
        recent = [times for times in self.latest if times.ended >= since]
        span = max(recent[-1].ended - recent[0].ended, 1.0) if recent else 1.0
        found: dict[str, Any] = {
            key: _spread([getattr(times, key) for times in recent if getattr(times, key) is not None])
            for key in Times._fields[2:]
        }
        found["requests"] = len(recent)
        found["throughput_rps"] = len(recent) / span
        found["output_tokens_per_s"] = sum(times.output_tokens for times in recent) / span
        return found


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p90": None, "p99": None}
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}


class _Fleet(Collector):
    """Gauges of the instances, read when they are asked for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterable[GaugeMetricFamily]:
        members = list(self._scheduler.members.values())
        waiting = GaugeMetricFamily("hetkv_waiting_requests", "Sequences that no instance can take now")
        waiting.add_metric([], len(self._scheduler.waiting))
        yield waiting
        for name, text, value in (
            ("up", "Whether the instance gets requests", lambda m: m.up),
            ("requests", "Sequences there or bound for it", lambda m: m.requests),
            ("prompt_tokens_in_line", "Prompt tokens still to be computed there", lambda m: m.prompt_tokens),
            ("kv_blocks", "KV blocks", lambda m: m.kv.total),
            ("kv_blocks_free", "KV blocks that can be taken", lambda m: m.kv.available),
            ("preemptions", "Sequences that were preempted since it started", lambda m: m.load.preemptions),
            ("computed_prompt_tokens", "Prompt tokens since it started", lambda m: m.load.computed_tokens),
            ("steps", "Steps since it started", lambda m: m.load.steps),
            ("busy_seconds", "Time in steps since it started", lambda m: m.load.busy_s),
        ):
            read: Callable[[Member], float] = value
            family = GaugeMetricFamily(f"hetkv_instance_{name}", text, labels=["instance", "role"])
            for member in members:
                family.add_metric([member.name, member.role], float(read(member)))
            yield family

    def describe(self) -> Iterable[Any]:
        """Nothing: names are known only with the instances."""
        return []
