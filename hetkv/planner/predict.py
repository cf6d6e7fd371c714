"""TTFT and TPOT that the formulas of the capacities expect of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from hetkv.planner.calibrator import Counts, part_of
from hetkv.planner.capacity import Demand, prompt_times, step_times
from hetkv.planner.columns import Column
from hetkv.planner.queueing import COUNTS, LOADS, busy_batch, erlang_c
from hetkv.planner.result import ClassLatency
from hetkv.planner.slo_checker import latency_of


def predict(demand: Demand, columns: Mapping[Any, Column], counts: Counts, rate: float) -> dict[str, ClassLatency]:
    """By class: latencies at `rate` requests/s on the column that carries most of each role."""
    shares = {}
    for role in ("prefill", "decode", "aggregated"):
        mine = {k: n for k, n in counts.items() if k[1] == role}
        if mine:
            total = sum(part_of(columns[k], n) for k, n in mine.items())
            key = max(mine, key=lambda k: part_of(columns[k], mine[k]))
            part = rate * part_of(columns[key], mine[key]) / total
            shares[role] = columns[key], mine[key], part / mine[key]
    if "aggregated" in shares:
        ttft, tpot = _aggregated(demand, *shares["aggregated"])
    else:
        ttft, tpot = _prefill(demand, *shares["prefill"]), _decode(demand, *shares["decode"])
    return {
        s.spec.name: latency_of(s.spec, 1e3 * first, 1e3 * later)
        for s, first, later in zip(demand.samples, ttft, tpot, strict=True)
    }


def _least(late: Callable[[float], float], allowed: float) -> float:
    """The least limit, s, that at most `allowed` of the requests exceed."""
    low, high = 0.0, 1e-3
    while late(high) > allowed and high < 1e6:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if late(middle) > allowed else (low, middle)
    return high


def _prefill(demand: Demand, column: Column, count: int, rate: float) -> list[float]:
    times = prompt_times(column.steps, [s.prompts for s in demand.samples], column.budget * column.dp)
    service = times.service
    mean = demand.mean(service)
    variance = demand.mean([(x - mean) ** 2 for x in service])
    load = min(rate * mean, float(LOADS[-1]))
    row = int(np.searchsorted(COUNTS, count, side="right")) - 1
    waits = float(np.interp(load, LOADS, erlang_c()[row]))
    decay = 2 * count * (1 - load) / (mean * (demand.bursts + variance / mean**2))
    step, deviation = _batched(demand, column, rate)
    found = []
    for sample, own in zip(demand.samples, service, strict=True):

        def one_by_one(limit: float, own: NDArray[np.float64] = own) -> float:
            left = limit - own
            return float(np.where(left < 0, 1.0, waits * np.exp(-decay * np.maximum(left, 0.0))).mean())

        allowed = 1 - sample.spec.ttft_percentile / 100
        excess = float(np.quantile(np.maximum(own - mean, 0.0), sample.spec.ttft_percentile / 100))
        together = 1.5 * step + excess + max(float(ndtri(1 - allowed)), 0.0) * deviation
        found.append(min(_least(one_by_one, allowed), together) if rate * mean < 1 else together)
    return found


def _batched(demand: Demand, column: Column, rate: float) -> tuple[float, float]:
    """The step that an instance settles to when it takes all waiting prompts at once, and its deviation."""
    tokens = np.geomspace(min(demand.prompt, column.budget), column.budget, 30)
    prompts = tokens / demand.prompt
    times = step_times(column.steps, 0.0, 0.0, tokens, prompts * demand.pairs)
    step = float(np.interp(rate, prompts / times, times))
    together = max(rate * step, 1.0)
    return step, float(np.sqrt(step**2 / 12 + 1.25 * step**2 * (demand.bursts + demand.prompt_spread) / together))


def _decode(demand: Demand, column: Column, count: int, rate: float) -> list[float]:
    context, each = demand.context + 8.0, demand.steps
    batches = np.geomspace(0.02, 4096, 120)
    running = np.maximum(batches, 1.0)
    times = step_times(column.steps, running, running * context)
    batch = float(np.interp(rate * each, batches / times, batches)) if each else 1.0
    elasticity = np.clip(np.interp(batch, batches, np.gradient(np.log(times), np.log(batches))), 0.0, 0.95)
    row = int(np.searchsorted(COUNTS, count, side="right")) - 1
    found = []
    for sample in demand.samples:
        z = max(float(ndtri(sample.spec.tpot_percentile / 100)), 0.0)
        met = float(busy_batch(np.array([batch]), np.array([elasticity]), z, demand.bursts)[row, 0])
        found.append(_per_token(sample.others, float(np.interp(met, batches, times)), sample.spec.tpot_percentile))
    return found


def _per_token(outputs: Sequence[float] | NDArray[np.float64], step: float, percentile: float) -> float:
    after = np.asarray(outputs) - 1
    after = after[after > 0]
    return float(np.quantile(step * (1 + 0.5 / after), percentile / 100)) if after.size else 0.0


def _aggregated(demand: Demand, column: Column, count: int, rate: float) -> tuple[list[float], list[float]]:
    each, context = max(demand.steps, 1.0), demand.context + 8.0
    chunk = min(demand.prompt, float(column.budget))
    pairs = chunk * demand.pairs / demand.prompt
    batches = np.geomspace(0.02, 4096, 60)
    running = np.maximum(batches, 1.0)
    plain = step_times(column.steps, running, running * context)
    mixed = step_times(column.steps, running, running * context, chunk, pairs)
    share = np.minimum(batches * demand.prompt / (each * chunk), 1.0)
    step = plain + share * (mixed - plain)
    batch = float(np.interp(rate * each, batches / step, batches))
    one, with_prompt, part = (float(np.interp(batch, batches, x)) for x in (step, mixed, share))
    load = min(batch * demand.prompt / (each * column.budget), 0.95)
    waits = load ** (float(np.sqrt(2 * (count + 1))) - 1)
    ahead = demand.prompt * (demand.bursts + demand.prompt_spread) / column.budget * one / count / (1 - load)
    ttft, tpot = [], []
    for sample in demand.samples:
        z = max(float(ndtri(sample.spec.tpot_percentile / 100)), 0.0)
        after = float(np.maximum(sample.others - 1, 1).mean())
        slow = one + z * float(np.sqrt(part * (1 - part / 2) / after)) * (with_prompt - one)
        tpot.append(_per_token(sample.others, slow, sample.spec.tpot_percentile))
        own = np.ceil(sample.prompts / column.budget) * with_prompt + 0.5 * one

        def late(limit: float, own: NDArray[np.float64] = own) -> float:
            left = limit - own
            return float(np.where(left < 0, 1.0, waits * np.exp(-np.maximum(left, 0.0) / ahead)).mean())

        ttft.append(_least(late, 1 - sample.spec.ttft_percentile / 100))
    return ttft, tpot
