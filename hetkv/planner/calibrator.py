"""What the simulator says a pool carries, and the correction of the columns' rates that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, inf
from typing import Any

import msgspec
import numpy as np

from hetkv.planner.capacity import batch_at, step_times
from hetkv.planner.columns import Column
from hetkv.planner.effort import Effort
from hetkv.planner.handover import Handover
from hetkv.planner.problem import Problem
from hetkv.planner.queueing import COUNTS
from hetkv.planner.result import Instances
from hetkv.planner.slo_checker import SloChecker, Verdict, latency_of

Key = tuple[Any, ...]
Counts = Mapping[Key, int]

CELL, CELL_FLIGHT = 24, 1200
"""Instances of a role, and sequences that decode at once, that are simulated together. A larger deployment is cells."""

PRECISION = 0.02
"""To which the largest scale of a pool is found."""


def rate_of(column: Column, count: int) -> float:
    """Requests/s of `count` instances."""
    if not count:
        return 0.0
    return count * float(column.rates[np.searchsorted(COUNTS, count, side="right") - 1])


def part_of(column: Column, count: int) -> float:
    """What `count` instances count for when a load is shared out: their rate, or half of the relaxed one if none."""
    return rate_of(column, count) or 0.5 * column.relaxed * count


@dataclass(frozen=True)
class Reach:
    """The largest scale that a pool was seen to carry, 0 where none was found; `cut` where the effort ended first."""

    scale: float
    cut: bool = False


@dataclass
class Calibrator:
    """Simulates the pools of a plan, large ones by a cell of them, and remembers what they carried.

    A cell has the pool's instances over a whole number, rounded down, and its share of the traffic. docs/planner.md
    says why a deployment of such cells does no worse.
    """

    problem: Problem
    columns: Sequence[Column]
    checkers: Mapping[str, SloChecker]
    effort: Effort | None = None  # no further measurement is begun once it is spent
    _factors: dict[Key, dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_key = {c.key: c for c in self.columns}

    def learn(self, other: Calibrator) -> None:
        """Take over what another calibrator measured."""
        for key, known in other._factors.items():
            if key in self._by_key:
                self._factors.setdefault(key, {}).update(known)

    def with_checker(self, model: str, checker: SloChecker) -> Calibrator:
        """The same with another checker for one model, and nothing measured."""
        return Calibrator(self.problem, self.columns, {**self.checkers, model: checker})

    def instances(self, counts: Counts) -> list[Instances]:
        """`counts` as the result lists them. In mixed decode pools KV room is cut in proportion to the batches."""
        found = []
        for key, count in counts.items():
            column = self._by_key[key]
            price = self.problem.offer(column.gpu).usd_per_gpu_hour
            found.append(
                Instances(
                    role=column.role,
                    gpu=column.gpu,
                    tp=column.tp,
                    pp=column.pp,
                    count=count,
                    model=column.model,
                    budget=column.budget,
                    kv_tokens=self._room(column, counts),
                    usd_per_hour=None if price is None else column.price,
                    dp=column.dp,
                    unstartable=column.unstartable,
                    weight=self._share(column, counts),
                )
            )
        order = {"prefill": 0, "decode": 1, "aggregated": 2}
        return sorted(
            found, key=lambda i: (i.model, order[i.role], -i.count * i.gpus, i.gpu, i.tp, i.pp, i.dp, i.budget)
        )

    def _share(self, column: Column, counts: Counts) -> float:
        """Requests of one aggregated instance, relative to the one that gets most, where they differ."""
        alike = [self._by_key[k] for k in counts if k[:2] == column.key[:2]]
        if column.role != "aggregated" or len(alike) == 1:
            return 1.0
        own = part_of(column, counts[column.key]) / counts[column.key]
        return round(own / max(part_of(c, counts[c.key]) / counts[c.key] for c in alike), 3) or 0.001

    def _room(self, column: Column, counts: Counts) -> int | None:
        """KV tokens to offer: routing by requests over room then gives each instance the batch that it can carry."""
        alike = [self._by_key[k] for k in counts if k[:2] == column.key[:2]]
        if column.role != "decode" or len(alike) == 1 or min(c.batch for c in alike) <= 0:
            return None
        per_sequence = min(c.kv_tokens / c.batch for c in alike)
        longest = max(float((s.prompts + s.outputs).max()) for s in self.checkers[column.model].samples)
        return int(min(max(per_sequence * column.batch, 4 * longest), column.kv_tokens))

    def verdict(self, model: str, counts: Counts, scale: float, seed: int | None = None) -> Verdict:
        """All of the plan for one model, at `scale`, with `seed` (None: the problem's)."""
        counts = {k: n for k, n in counts.items() if k[0] == model}
        roles = {k[1] for k in counts}
        if roles not in ({"aggregated"}, {"prefill", "decode"}):  # nothing is left to serve a request
            return Verdict({c.name: latency_of(c, inf, inf) for c in self.checkers[model].classes})
        if self.whole(model, counts, scale):
            return self.checkers[model](self.instances(counts), scale, seed=seed)
        if "aggregated" in roles:
            return self.role(model, counts, "aggregated", scale, seed=seed)
        first, later = (self.role(model, counts, role, scale, False, seed) for role in ("prefill", "decode"))
        latency = {
            name: msgspec.structs.replace(x, tpot_ms=later.latency[name].tpot_ms) for name, x in first.latency.items()
        }
        within = {k: v for k, v in first.within.items() if k[1] == "ttft"}
        within |= {k: v for k, v in later.within.items() if k[1] == "tpot"}
        return Verdict(latency, within)  # the wait for the first step is in `first`

    def whole(self, model: str, counts: Counts, scale: float) -> bool:
        """Whether a model's instances are few enough to be simulated together."""
        roles = {k[1] for k in counts if k[0] == model}
        return all(self._cells(model, counts, role, scale) == 1 for role in roles)

    def role(
        self, model: str, counts: Counts, role: str, scale: float, quick: bool = True, seed: int | None = None
    ) -> Verdict:
        """One pool, by a cell of it: prefill by its prompts alone, decode with enough prefill before it.

        `quick` simulates links without sharing.
        """
        cells = self._cells(model, counts, role, scale)
        cell = self._slice(counts, model, role, cells)
        whole = {k: n for k, n in counts.items() if k[:2] == (model, role)}
        share = self._weight(cell) / self._weight(whole) if cells > 1 else 1.0
        if role == "prefill":
            after = self._after(model, counts, scale)
            return self.checkers[model](self.instances(cell), scale * share, True, after=after, seed=seed)
        if role == "decode":
            before = {k: ceil(n * share) for k, n in counts.items() if k[:2] == (model, "prefill")}
            largest = max(before, key=lambda k: self._by_key[k].relaxed * before[k])
            if cells > 1:
                before = {largest: before[largest]}
                while self._weight(before) < 1.2 * scale * share * self.rate(model):
                    before[largest] += 1
            cell = {**before, **cell}
        return self.checkers[model](self.instances(cell), scale * share, quick=quick and role == "decode", seed=seed)

    def _after(self, model: str, counts: Counts, scale: float) -> Handover | None:
        """What follows a prefill until the first token: with the plan's decode pool, else the least of any column."""
        mine = [self._by_key[k] for k in counts if k[:2] == (model, "decode")]
        found = [c for c in mine or self.columns if (c.model, c.role) == (model, "decode") and c.handover is not None]
        if not mine:
            return min((c.handover for c in found if c.handover), key=lambda h: h.step_s, default=None)
        column = max(found, key=lambda c: part_of(c, counts[c.key]), default=None)
        if column is None or column.handover is None:
            return None
        demand = self.checkers[model].demand
        share = part_of(column, counts[column.key]) / sum(part_of(c, counts[c.key]) for c in mine)
        batch = batch_at(column.steps, demand, scale * self.rate(model) * share / counts[column.key])
        step = float(step_times(column.steps, batch, batch * demand.context)[0])
        return column.handover._replace(step_s=1.5 * step)

    def rate(self, model: str) -> float:
        """Requests/s of a model at scale 1."""
        return sum(c.rate for c in self.problem.classes_of(model))

    def _weight(self, counts: Counts) -> float:
        return sum(n * part_of(self._by_key[k], COUNTS[-1]) / COUNTS[-1] for k, n in counts.items())

    def _cells(self, model: str, counts: Counts, role: str, scale: float) -> int:
        total = sum(n for k, n in counts.items() if k[:2] == (model, role))
        cells = total / CELL
        if role != "prefill":
            cells = max(cells, min(scale * self.checkers[model].flight / CELL_FLIGHT, total / 4))
        return max(1, ceil(cells - 0.2))

    def _slice(self, counts: Counts, model: str, role: str, cells: int) -> dict[Key, int]:
        mine = {k: n for k, n in counts.items() if k[:2] == (model, role)}
        found = {k: floor(n / cells) for k, n in mine.items()}
        return {k: n for k, n in found.items() if n} or {max(mine, key=lambda k: mine[k]): 1}

    def largest(self, model: str, counts: Counts, role: str, start: float) -> Reach:
        """The largest scale at which the pool keeps its own target, to `PRECISION` unless it is many times `start`.

        Between a scale that holds and one that does not, the next one is where a line through what they use of their
        limits would meet it; TTFT rises too steeply for that, and its interval is halved.
        """
        low, high, scale, used = 0.0, 0.0, start, {}
        for _ in range(10):
            if low and self.effort is not None and self.effort.spent:
                return Reach(low, cut=True)
            found = self.role(model, counts, role, scale)
            used[scale] = found.used(role)
            if used[scale] <= 1:
                low = scale
            else:
                high = scale
            if low and high and high <= low * (1 + PRECISION):
                break
            if not high:
                scale = low * (1.3 if used[low] < 0.7 else 1.1)
            elif not low:
                scale = high * 0.85
            else:
                part = 0.5
                if role == "decode" and used[high] < 3:
                    part = min(max((1 - used[low]) / (used[high] - used[low]), 0.2), 0.8)
                scale = low + part * (high - low)
        return Reach(low)

    def measure(self, model: str, counts: Counts, scale: float, roles: Sequence[str]) -> dict[str, Reach]:
        """Role to the largest scale that its pool carries; the columns' rates are corrected by it from now on.

        Where the effort ended first, what the pool was seen to carry corrects them only if it is below `scale`: a pool
        that holds at `scale` may carry any amount more.
        """
        found = {}
        for role in sorted({k[1] for k in counts if k[0] == model and k[1] in roles}):
            mine = {k: n for k, n in counts.items() if k[:2] == (model, role)}
            reach = found[role] = self.largest(model, counts, role, scale)
            if reach.cut and reach.scale >= scale:
                continue
            factor = reach.scale * self.rate(model) / sum(part_of(self._by_key[k], n) for k, n in mine.items())
            for key, count in mine.items():  # sizes that share a rate share the last correction
                self._factors.setdefault(key, {})[min(count, COUNTS[-1])] = max(factor, 0.05)
        return found

    def corrected(self) -> list[Column]:
        """The columns with their rates corrected; between two measured pool sizes by the logarithm of the size."""
        found = []
        for column in self.columns:
            known = self._factors.get(column.key)
            if known:
                sizes = sorted(known)
                factors = np.interp(np.log(COUNTS), np.log(sizes), [known[s] for s in sizes])
                rates = np.minimum(np.maximum.accumulate(column.rates * factors), column.port_rate)
                column = replace(column, rates=rates, relaxed=max(column.relaxed, float(rates.max())))
            found.append(column)
        return found
