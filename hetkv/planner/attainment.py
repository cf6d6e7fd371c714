"""Whether a target holds: over several seeds, with a stated confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, sqrt

import msgspec
import numpy as np
from scipy.stats import t as student

from hetkv.planner.result import Attainment, ClassLatency

CONFIDENCE = 0.95


def attainment(shares: Sequence[float], percentile: float) -> Attainment:
    """From the share within the limit of each seed."""
    values = np.array(shares)
    mean, half = float(values.mean()), 0.0
    if len(values) > 1:
        quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        half = quantile * float(values.std(ddof=1)) / sqrt(len(values))
    return Attainment(
        mean, max(mean - half, 0.0), min(mean + half, 1.0), float(values.min()), percentile / 100, CONFIDENCE
    )


def expected(latencies: Sequence[Mapping[str, ClassLatency]]) -> dict[str, ClassLatency]:
    """Latencies that another seed exceeds with a probability of 1 - `CONFIDENCE` (one-sided), by class.

    From what several seeds measured, taken as normal: the mean and a quantile of Student's t times the deviation.
    """
    found = {}
    for name, first in latencies[0].items():
        own = [seed[name] for seed in latencies]
        found[name] = msgspec.structs.replace(
            first, ttft_ms=_above([x.ttft_ms for x in own]), tpot_ms=_above([x.tpot_ms for x in own])
        )
    return found


def mean_of(latencies: Sequence[ClassLatency]) -> ClassLatency:
    """The means of one class's latencies over seeds."""
    means = []
    for values in ([x.ttft_ms for x in latencies], [x.tpot_ms for x in latencies]):
        known = [v for v in values if v is not None]
        means.append(float(np.mean(known)) if known else None)
    return msgspec.structs.replace(latencies[0], ttft_ms=means[0], tpot_ms=means[1])


def _above(values: Sequence[float | None]) -> float | None:
    known = np.array([v for v in values if v is not None])
    if not known.size:
        return None
    if known.size == 1 or not np.isfinite(known).all():
        return float(known.max())
    deviation = float(known.std(ddof=1)) * sqrt(1 + 1 / known.size)
    return min(float(known.mean()) + float(student.ppf(CONFIDENCE, known.size - 1)) * deviation, inf)
