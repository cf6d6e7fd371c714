"""Every figure a simulation reports, each defined once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hetkv.simulator.request import FINISHED, STATUS_NAMES

PERCENTILES = (50, 90, 99)
Columns = Mapping[str, NDArray[Any]]


class Metric(NamedTuple):
    """`key` is the name in JSON. Times of the definition: t_arr arrival, t_sch first step with a token of the prompt,
    t_1 first output token, t_n last one, t_pre prompt computed, t_kv KV complete at the decode instance, t_dec first
    decode step begins; n output tokens; T the simulated time from 0 to the end of the last request.
    """

    key: str
    symbol: str
    unit: str
    definition: str


METRICS = (
    Metric("ttft_ms", "TTFT", "ms", "time to first token: t_1 - t_arr, over finished requests"),
    Metric("tpot_ms", "TPOT", "ms/token", "time per output token: (t_n - t_1) / (n - 1), finished requests with n > 1"),
    Metric("e2e_ms", "E2E", "ms", "end to end: t_n - t_arr, over finished requests"),
    Metric("queue_ms", "Q", "ms", "wait for the first step: t_sch - t_arr"),
    Metric("transfer_ms", "X", "ms", "exposed KV transfer: t_kv - t_pre, waiting for room included; disaggregated"),
    Metric("decode_queue_ms", "Q_dec", "ms", "wait for a place in the decode batch: t_dec - t_kv; disaggregated"),
    Metric(
        "slo_attainment",
        "A",
        "1",
        "share of all requests, failed and rejected ones too, with TTFT and TPOT within the SLO",
    ),
    Metric("goodput_rps", "G", "requests/s", "requests within the SLO over T"),
    Metric("throughput_rps", "R", "requests/s", "finished requests over T"),
    Metric("output_tokens_per_s", "R_out", "tokens/s", "output tokens of finished requests over T"),
    Metric("utilisation", "U", "1", "per GPU type: GPU-seconds in engine steps over GPU-seconds not failed, within T"),
    Metric("usd_per_million_output_tokens", "C", "USD", "price of all GPUs over T, per million output tokens finished"),
    Metric(
        "prefix_hit_rate", "H", "1", "prompt tokens found in a prefix cache over prompt tokens, at the first prefill"
    ),
    Metric("simulated_seconds", "T", "s", "simulated time from 0 to the end of the last request"),
    Metric("seconds", "t_wall", "s", "time that the simulation itself took, without reading files"),
)
BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Slo:
    """Limits in milliseconds; infinite where there is none."""

    ttft_ms: float = inf
    tpot_ms: float = inf

    def as_json(self) -> dict[str, float | None]:
        return {k: None if v == inf else v for k, v in (("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms))}


def latencies(columns: Columns) -> dict[str, NDArray[np.float64]]:
    """Per-request times in ms of the finished requests, by metric key. Requests without the metric are left out."""
    done = {k: v[columns["status"] == FINISHED] for k, v in columns.items()}
    several = done["output"] > 1
    times = {
        "ttft_ms": done["first_token"] - done["arrival"],
        "tpot_ms": (done["last_token"] - done["first_token"])[several] / (done["output"][several] - 1),
        "e2e_ms": done["last_token"] - done["arrival"],
        "queue_ms": done["scheduled"] - done["arrival"],
        "transfer_ms": done["visible"] - done["prefilled"],
        "decode_queue_ms": done["decode_from"] - done["visible"],
    }
    return {key: 1e3 * values[np.isfinite(values)] for key, values in times.items()}


def good(columns: Columns, slo: Slo) -> NDArray[np.bool_]:
    """Which requests finished within the SLO. A single output token has no TPOT to miss."""
    ttft = 1e3 * (columns["first_token"] - columns["arrival"])
    tpot = 1e3 * (columns["last_token"] - columns["first_token"]) / np.maximum(columns["output"] - 1, 1)
    return np.asarray((columns["status"] == FINISHED) & (ttft <= slo.ttft_ms) & (tpot <= slo.tpot_ms))


def spread(values: NDArray[np.float64]) -> dict[str, float | None]:
    """Percentiles and mean, None where there are no values."""
    if not values.size:
        return {**{f"p{p}": None for p in PERCENTILES}, "mean": None}
    found = np.percentile(values, PERCENTILES)
    return {**{f"p{p}": float(x) for p, x in zip(PERCENTILES, found, strict=True)}, "mean": float(values.mean())}


def summarise(columns: Columns, slo: Slo, seconds: float) -> dict[str, Any]:
    """All metrics that requests alone determine. `seconds` is T, the simulated time until the last request ended."""
    count = len(columns["status"])
    finished = columns["status"] == FINISHED
    within = int(good(columns, slo).sum())
    per_second = 1 / seconds if seconds else 0.0
    found: dict[str, Any] = {"requests": count}
    for code, name in enumerate(STATUS_NAMES):
        found[name] = int((columns["status"] == code).sum())
    found.update({key: spread(values) for key, values in latencies(columns).items()})
    found["slo"] = slo.as_json()
    found["slo_attainment"] = within / count if count else None
    found["goodput_rps"] = within * per_second
    found["throughput_rps"] = int(finished.sum()) * per_second
    found["prompt_tokens"] = int(columns["prompt"][finished].sum())
    found["output_tokens"] = int(columns["output"][finished].sum())
    found["output_tokens_per_s"] = found["output_tokens"] * per_second
    found["prefix_hit_rate"] = float(columns["cached"].sum() / max(columns["prompt"].sum(), 1))
    found["preemptions"] = int(columns["preemptions"].sum())
    found["restarts"] = int(columns["restarts"].sum())
    found["simulated_seconds"] = seconds
    return found
