"""Requests per second that one instance of a pool of `n` carries within the targets, from step times and queueing.

Each function returns a `Capacity`: a rate for each pool size in `queueing.COUNTS`, and the same with queueing relaxed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from hetkv.costmodel import StepModel
from hetkv.planner.queueing import COUNTS, Late, batched_rate, busy_batch, waiting_load
from hetkv.planner.traffic import Sample

Array = NDArray[np.float64]

KV_MARGIN = 2.33
"""Deviations of the number of sequences for which a decode instance keeps KV room: exceeded 1 % of the time."""


class Capacity(NamedTuple):
    """`rates[i]`: requests/s of one of `COUNTS[i]` instances. `relaxed`: the same without queueing, at best.

    `batch` is the mean of the decode batch at the largest pool's rate; 0 for prefill.
    """

    rates: Array
    relaxed: float
    batch: float


NONE = Capacity(np.zeros(len(COUNTS)), 0.0, 0.0)


@dataclass(frozen=True)
class Demand:
    """What requests of a mix ask of an instance, from samples of its classes."""

    samples: Sequence[Sample]

    def mean(self, values: Sequence[Array]) -> float:
        """The mean over all requests of one array per class."""
        return float(sum(s.share * v.mean() for s, v in zip(self.samples, values, strict=True)))

    @cached_property
    def prompt(self) -> float:
        return self.mean([s.prompts for s in self.samples])

    @cached_property
    def pairs(self) -> float:
        return self.mean([s.prompts * (s.prompts + 1) / 2 for s in self.samples])

    @cached_property
    def prompt_spread(self) -> float:
        """Coefficient of variation of prompt lengths, squared."""
        return self.mean([s.prompts**2 for s in self.samples]) / self.prompt**2 - 1

    @cached_property
    def bursts(self) -> float:
        """Of the gaps between arrivals, the coefficient of variation squared, by the classes' shares; 1 for Poisson.

        That of the merged stream over long times (Whitt, "Approximating a point process by a renewal process", 1982).
        """
        return 1 + sum(s.share * (s.spec.arrival_cv**2 - 1) for s in self.samples)

    @cached_property
    def steps(self) -> float:
        """Decode steps of a request: the first token comes from the prompt."""
        return self.mean([s.outputs - 1 for s in self.samples])

    @cached_property
    def context(self) -> float:
        """KV tokens of a decoding sequence, seen at a random moment: long outputs weigh more."""
        held = [(s.prompts + s.others / 2) * (s.others - 1) for s in self.samples]
        return self.mean(held) / self.steps if self.steps else self.prompt

    @cached_property
    def step_limits(self) -> list[float]:
        """`step_limit` of each class where no transfer shows."""
        return [step_limit(s, 0.0) for s in self.samples]


def step_times(
    steps: StepModel,
    batch: Array | float,
    context: Array | float,
    prompt: Array | float = 0.0,
    pairs: Array | float = 0.0,
) -> Array:
    """Step times for arrays of what `step_seconds` takes; fractions of sequences and tokens are means."""
    rows = np.broadcast_arrays(*np.atleast_1d(batch, context, prompt, pairs))
    at_once: Any = getattr(steps, "step_seconds_of", None)  # ours have it; any `StepModel` will do
    if at_once is not None:
        found: Array = at_once(*rows)
        return found
    seconds: Any = steps.step_seconds
    return np.array([seconds(*row) for row in zip(*(r.tolist() for r in rows), strict=True)])


class PromptTimes(NamedTuple):
    """Seconds for each prompt alone, by class: `latency` until it is computed, `service` until the next may start."""

    latency: list[Array]
    service: list[Array]


def prompt_times(steps: StepModel, lengths: Sequence[Array], budget: int) -> PromptTimes:
    """Prompts in steps of at most `budget` tokens, which follow each other by one pipeline stage; interpolated."""
    top = max(float(x.max()) for x in lengths)
    knots = np.unique(np.rint(np.geomspace(1, max(top, 2.0), 28)))
    service, latency = np.zeros(len(knots)), np.zeros(len(knots))
    for done in np.arange(0.0, knots[-1], budget):
        longer = knots > done
        n = np.minimum(knots[longer] - done, budget)
        step = step_times(steps, 0.0, 0.0, n, n * done + n * (n + 1) / 2)
        latency[longer] = np.maximum(service[longer] + step, latency[longer] + step / steps.stages)
        service[longer] += step / steps.stages
    return PromptTimes(*([np.interp(x, knots, times) for x in lengths] for times in (latency, service)))


def prefill(
    steps: StepModel, demand: Demand, budget: int, times: PromptTimes, after: Sequence[Array] | None = None
) -> Capacity:
    """Of a prefill instance: the better of prompts one by one (M/G/n) and of all waiting prompts in one step.

    `times` are the `prompt_times` of the demand's prompts, `after` the seconds from there to the first token.
    """
    mean = demand.mean(times.service)
    variance = demand.mean([(x - mean) ** 2 for x in times.service])
    late = [
        Late(x + y, s.spec.ttft_ms / 1e3, 1 - s.spec.ttft_percentile / 100)
        for s, x, y in zip(demand.samples, times.latency, after or [np.zeros(1)] * len(times.latency), strict=True)
    ]
    bound = prompt_bound(steps, demand, budget)
    if any(float((one.service > one.limit).mean()) > one.allowed for one in late):
        return Capacity(NONE.rates, bound, 0.0)
    single = waiting_load(late, mean, variance, demand.bursts) / mean
    tokens = np.geomspace(min(demand.prompt, budget), 0.9 * budget, 40) if demand.prompt < 0.9 * budget else None
    together = 0.0
    if tokens is not None:
        prompts = tokens / demand.prompt
        step = step_times(steps, 0.0, 0.0, tokens, prompts * demand.pairs)
        elasticity = np.clip(np.gradient(np.log(step), np.log(tokens)), 0.0, 0.97)
        spread = elasticity * np.sqrt((demand.bursts + demand.prompt_spread) / (1 - elasticity**2))
        alone = demand.mean([np.asarray(one.service) for one in late])
        together = batched_rate(late, steps.stages * prompts / step, step, alone, spread)
    return Capacity(np.maximum(single, together), bound, 0.0)


def prompt_bound(steps: StepModel, demand: Demand, budget: int) -> float:
    """Prompts per second at most: every step takes at least the best time per token, attention left out."""
    tokens = np.geomspace(1, budget, 40)
    return float(steps.stages / (demand.prompt * (step_times(steps, 0.0, 0.0, tokens) / tokens).min()))


def step_limit(sample: Sample, transfer: Array | float, joins: bool = True) -> float:
    """The decode step time at which the class's TPOT is at its limit at the percentile.

    TPOT of a request is its steps, the KV transfer that shows (`transfer` seconds for each of `prompts`) and, where it
    `joins` the batch after its first token, half a step until then, over its output tokens after the first.
    """
    after = sample.others - 1
    several = after > 0
    if not several.any():
        return float("inf")
    shown = np.broadcast_to(transfer, after.shape)[several]
    after = after[several]
    limits = (sample.spec.tpot_ms / 1e3 - shown / after) / (1 + (0.5 / after if joins else 0.0))
    return float(np.quantile(limits, 1 - sample.spec.tpot_percentile / 100, method="lower"))


def _mean_limit(demand: Demand) -> float:
    """TPOT that all output tokens may have on average, targets met: the limits weighted by tokens."""
    weights = np.array([s.share * (s.outputs - 1).sum() for s in demand.samples])
    limits = np.array([s.spec.tpot_ms / 1e3 for s in demand.samples])
    return float(weights @ limits / weights.sum()) if weights.sum() else float("inf")


def decode(
    steps: StepModel, demand: Demand, places: int, transfer: Sequence[Array | float], joins: bool = True
) -> Capacity:
    """Of a decode instance: the batch that keeps every TPOT limit at its percentile, and fits in memory.

    `transfer` and `joins` are those of `step_limit`.
    """
    each = demand.steps
    if not each:
        return Capacity(np.full(len(COUNTS), 1e9), 1e9, 1.0)
    context = demand.context + 8.0  # half a block
    limit, z = float("inf"), 0.0
    for sample, shown in zip(demand.samples, transfer, strict=True):
        own = step_limit(sample, shown, joins)
        if own < limit:
            limit, z = own, max(float(ndtri(sample.spec.tpot_percentile / 100)), 0.0)
    room = min(float(places), steps.kv_room / steps.kv.bytes(context))
    if room < 1 or not steps.step_seconds(1, context) <= limit:
        return NONE
    batches = np.geomspace(0.02, max(room, 1.0), 120)
    running = np.maximum(batches, 1.0)
    times = step_times(steps, running, running * context)
    elasticity = np.clip(np.gradient(np.log(times), np.log(batches)), 0.0, 0.95)
    met = busy_batch(batches, elasticity, z, demand.bursts)
    fits = (batches + KV_MARGIN * np.sqrt(batches) <= room) | (batches <= 0.5)
    good = (np.interp(met, batches, times) <= limit) & (met <= places) & fits
    best = good.shape[1] - 1 - good[:, ::-1].argmax(axis=1)
    rates = np.where(good.any(axis=1), batches[best] / (each * times[best]), 0.0)
    held = times <= _mean_limit(demand)
    relaxed = float((batches[held] / times[held]).max(initial=0.0)) / each
    return Capacity(np.maximum.accumulate(rates), max(relaxed, float(rates.max())), float(batches[best[-1]]))


def batch_at(steps: StepModel, demand: Demand, rate: float) -> float:
    """The mean decode batch of an instance that serves `rate` requests/s (Little)."""
    if not demand.steps:
        return 1.0
    batches = np.geomspace(0.02, 4096, 120)
    running = np.maximum(batches, 1.0)
    times = step_times(steps, running, running * (demand.context + 8.0))
    return max(float(np.interp(rate * demand.steps, batches / times, batches)), 1.0)


def aggregated(steps: StepModel, demand: Demand, places: int, budget: int) -> Capacity:
    """Of an instance that does both: prompt steps lengthen the decode steps, and prompts wait for the step's budget.

    With `m` sequences decoding, a share `q` of the steps holds prompt tokens, `chunk` of them. TPOT at the percentile
    has as many more of such steps as a binomial number of them has deviations.
    """
    each = max(demand.steps, 1.0)
    context = demand.context + 8.0
    chunk = min(demand.prompt, float(budget))
    free = steps.kv_room - steps.kv.layer * steps.kv.sliding * budget  # a step's prompts are held whole until its end
    room = min(float(places), free / steps.kv.bytes(context))
    if room < 1:
        return NONE
    budget *= steps.stages  # a round has one step for each stage
    batches = np.geomspace(0.02, max(room, 1.0), 40)
    pairs = chunk * demand.pairs / demand.prompt
    running = np.maximum(batches, 1.0)
    plain = step_times(steps, running, running * context)
    share = batches * demand.prompt / (each * chunk)
    tokens = np.minimum(chunk * np.maximum(share, 1.0), budget)  # several prompts in one step
    mixed = step_times(steps, running, running * context, tokens, tokens / chunk * pairs)
    mixed = mixed * steps.step_share(running, tokens)
    share = np.minimum(share, 1.0)
    step = plain + share * (mixed - plain)
    use = batches * demand.prompt / (each * budget)
    good = np.broadcast_to(
        (use < 0.95) & (batches + KV_MARGIN * np.sqrt(batches) <= room), (len(COUNTS), len(batches))
    ).copy()
    met = busy_batch(batches, np.clip(np.gradient(np.log(step), np.log(batches)), 0.0, 0.95), 0.0) / batches
    for sample, limit in zip(demand.samples, demand.step_limits, strict=True):
        after = np.maximum(sample.others - 1, 1)
        z = max(float(ndtri(sample.spec.tpot_percentile / 100)), 0.0)
        several = np.sqrt(share * (1 - share / 2))[:, None] / np.sqrt(after.mean())
        slow = step * np.minimum(met, 1.5) + z * several[:, 0] * (mixed - plain)
        good &= slow <= limit
        left = good.any(axis=0)
        good[:, left] &= _prompts_in_time(sample, demand, use[left], mixed[left], step[left], budget)
    best = good.shape[1] - 1 - good[:, ::-1].argmax(axis=1)
    rates = np.where(good.any(axis=1), batches[best] / (each * step[best]), 0.0)
    held = (step <= _mean_limit(demand)) & (use < 1)
    relaxed = float((batches[held] / step[held]).max(initial=0.0)) / each
    return Capacity(np.maximum.accumulate(rates), max(relaxed, float(rates.max())), float(batches[best[-1]]))


def _prompts_in_time(
    sample: Sample, demand: Demand, use: Array, mixed: Array, step: Array, budget: int
) -> NDArray[np.bool_]:
    """Where, `[COUNTS, batches]`, TTFT holds: the rest of a step, the prompts before in the budget, the own steps.

    The share that waits for the budget is Sakasegawa's `use ** (sqrt(2 (n + 1)) - 1)`, their wait exponential.
    """
    servers = np.array(COUNTS, dtype=np.float64)[:, None, None]
    load = np.clip(use, 1e-6, 0.95)[None, :, None]
    chunks, same = np.unique(np.ceil(sample.prompts[::8] / budget), return_counts=True)
    own = chunks * mixed[:, None] + 0.5 * step[:, None]
    left = sample.spec.ttft_ms / 1e3 - own[None]
    ahead = demand.prompt * (demand.bursts + demand.prompt_spread) / budget * step[None, :, None] / servers / (1 - load)
    waits = load ** (np.sqrt(2 * (servers + 1)) - 1)
    late = np.where(left < 0, 1.0, waits * np.exp(-np.maximum(left, 0.0) / np.maximum(ahead, 1e-9)))
    allowed = 1 - sample.spec.ttft_percentile / 100
    return np.asarray(late @ (same / same.sum()) <= allowed)
