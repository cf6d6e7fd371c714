"""Solve, simulate, correct, cut, repeat: from columns to a plan whose targets hold in the simulator."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import msgspec
import numpy as np

from hetkv.planner.calibrator import Counts, Gauge, Key, Reach
from hetkv.planner.columns import Column, Columns
from hetkv.planner.effort import PLAN_EVENTS, Effort
from hetkv.planner.milp import Cut, Solution, UndecidedError, optimise
from hetkv.planner.neighbours import LARGEST, cheaper
from hetkv.planner.problem import Problem
from hetkv.planner.prune import prune
from hetkv.planner.slo_checker import SloChecker, Verdict

ITERATIONS = 6
"""Rounds of solving and simulating, at most."""

RESERVE = 0.02
"""Extra rate that is asked of the programme, added up, in each round after the last one until the targets hold."""


@dataclass(frozen=True)
class Candidate:
    """A plan that was simulated: at `scale` it `meets` all targets or not. `cost` is USD/hour, 0 without prices."""

    counts: dict[Key, int]
    scale: float
    cost: float
    verdicts: dict[str, Verdict]

    @property
    def meets(self) -> bool:
        return all(v.meets for v in self.verdicts.values())


@dataclass
class Search:
    """One search over `columns`. After `run`, `best` is the plan, `seen` all that were simulated, and the times.

    `undecided` is set where the integer programme's limit ended the rounds: `best` and `seen` are those until then.
    """

    problem: Problem
    found: Columns
    judges: Mapping[str, SloChecker]
    events: int = PLAN_EVENTS
    deadline: float = inf
    neighbours: bool = True
    best: Candidate | None = None
    solution: Solution | None = None
    seen: list[Candidate] = field(default_factory=list)
    solve_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0
    iterations: int = 0
    undecided: UndecidedError | None = None
    slack: dict[tuple[str, str], Reach] = field(default_factory=dict)  # (model, role) to multiples of the plan's rates
    slack_of: Candidate | None = None  # the plan that `slack` was measured for to the end
    _asked: tuple[Any, ...] = ()  # the programme before, and its solution
    _answer: Solution | None = None

    def __post_init__(self) -> None:
        self.effort = Effort(self.judges, self.events, self.deadline)
        self.gauge = Gauge(self.problem, self.found.columns, self.judges, self.effort)
        self.for_cost = self.problem.objective.goal == "cost"
        self.by_key = {c.key: c for c in self.found.columns}

    def run(self) -> Search:
        """Search; `best` stays None where no plan was found that meets the targets."""
        begin = time.perf_counter()
        self._rounds()
        if self.neighbours and self.for_cost and self.best is not None and not self.problem.pair_limits:
            self._improve()
        self.seconds += time.perf_counter() - begin
        return self

    def _rounds(self) -> None:
        """Solve, simulate and correct until nothing better comes, or a limit is met."""
        cuts: list[Cut] = []
        reserve, before = 1.0, None
        for _ in range(2 * ITERATIONS):
            late = self.iterations >= ITERATIONS or self.effort.spent
            if late and (self.best is not None or not self.for_cost or reserve > 1.2):
                break
            if late:
                reserve += RESERVE
            try:
                solution = self._solve(self.gauge.corrected(), cuts, reserve)
            except UndecidedError as error:
                self.undecided = error
                break
            if solution is None:
                break
            self.iterations += 1
            candidate = self._simulate(solution.counts, 1.0 if self.for_cost else solution.scale)
            if self._better(candidate):
                self.best, self.solution = candidate, solution
            if solution.counts == before or (self.best and self.for_cost and solution.value >= self.best.cost + 1e-9):
                break
            if candidate.meets and self._small(candidate):
                break  # the neighbours are asked one by one
            before = solution.counts if candidate.meets or not self.for_cost else None
            scales = self._measure(candidate)
            if not self.for_cost:
                self._rescale(candidate, scales)
            cuts += self._cuts(candidate)

    def adopt(self, other: Search) -> None:
        """Take over what a search of some of these columns simulated and measured, and its plan if it is better."""
        self.gauge.learn(other.gauge)
        self.seen += other.seen
        if other.best is not None and self._better(other.best):
            self.best, self.solution = other.best, other.solution

    def price(self, counts: Counts) -> float:
        """USD/hour, whole nodes where the offer is by node."""
        total = 0.0
        for name, n in gpus_of(counts).items():
            offer = self.problem.offer(name)
            if offer.rent == "node":
                n = -(-n // (offer.gpus_per_node or 1)) * (offer.gpus_per_node or 1)
            total += n * (offer.usd_per_gpu_hour or 0.0)
        return total

    def allowed(self, counts: Counts) -> bool:
        """Whether the caps hold."""
        return all(n <= cap for g, n in gpus_of(counts).items() if (cap := self.problem.offer(g).cap) is not None)

    def _solve(self, columns: Sequence[Column], cuts: Sequence[Cut], reserve: float) -> Solution | None:
        begin = time.perf_counter()
        rates = {m.name: reserve * self.gauge.rate(m.name) for m in self.problem.models}
        asked = (rates, list(cuts), [c.rates.tolist() for c in columns])
        if asked != self._asked:  # a plan that failed by less than can be measured changes nothing
            kept = prune(columns, self.problem)
            self._answer = optimise(self.problem, kept, rates, kv_bytes(self.found, self.problem), cuts=cuts)
            self._asked = asked
        self.solve_seconds += time.perf_counter() - begin
        return self._answer

    def bound(self) -> float | None:
        """The objective of all columns with queueing relaxed, None where even that is infeasible or not decided."""
        rates = {m.name: self.gauge.rate(m.name) for m in self.problem.models}
        loose = msgspec.structs.replace(self.problem, spare_instances=0)
        begin = time.perf_counter()
        columns = [replace(c, rates=np.full_like(c.rates, c.relaxed)) for c in self.gauge.corrected()]
        try:
            solution = optimise(loose, prune(columns, loose), rates, kv_bytes(self.found, self.problem), relaxed=True)
        except UndecidedError:
            solution = None
        self.solve_seconds += time.perf_counter() - begin
        return None if solution is None else solution.bound

    def _simulate(self, counts: dict[Key, int], scale: float) -> Candidate:
        begin = time.perf_counter()
        verdicts = {}
        for model in self.judges:
            verdicts[model] = self.gauge.verdict(model, counts, scale)
            for less in self._with_one_down(model, counts):
                other = self.gauge.verdict(model, less, scale)
                if not other.meets:
                    verdicts[model] = other
        candidate = Candidate(dict(counts), scale, self.price(counts), verdicts)
        self.verify_seconds += time.perf_counter() - begin
        self.seen.append(candidate)
        return candidate

    def _with_one_down(self, model: str, counts: Counts) -> list[dict[Key, int]]:
        """The plan with one instance of each of its columns down, where N+1 is asked for."""
        if not self.problem.spare_instances:
            return []
        return [
            {k: n - (k == down) for k, n in counts.items() if n - (k == down)} for down in counts if down[0] == model
        ]

    def _better(self, candidate: Candidate) -> bool:
        if not candidate.meets:
            return False
        if self.best is None:
            return True
        return candidate.cost < self.best.cost - 1e-9 if self.for_cost else candidate.scale > self.best.scale

    def _measure(self, candidate: Candidate) -> dict[str, float]:
        """The least scale over the roles, by model; the next programme uses what was measured."""
        begin = time.perf_counter()
        found, reached = {}, {}
        for model in self.judges:
            counts = {k: n for k, n in candidate.counts.items() if k[0] == model}
            if self.problem.spare_instances:
                counts = min(self._with_one_down(model, counts), key=self.gauge._weight)
            used = candidate.verdicts[model].used
            some = [
                r for r in ("prefill", "decode", "aggregated") if candidate.meets or not self.for_cost or used(r) > 1
            ]
            scales = self.gauge.measure(model, counts, candidate.scale, some)
            found[model] = min((reach.scale for reach in scales.values()), default=0.0)
            for role, reach in scales.items():
                reached[model, role] = replace(reach, scale=reach.scale / candidate.scale)
        if candidate is self.best:
            self.slack = reached
            self.slack_of = None if any(reach.cut for reach in reached.values()) else candidate
        self.verify_seconds += time.perf_counter() - begin
        return found

    def measure_best(self) -> None:
        """Find the slack of `best`."""
        assert self.best is not None
        self.gauge.effort = Effort(self.judges, self.events // 2, self.deadline)
        self._measure(self.best)

    def _rescale(self, candidate: Candidate, scales: Mapping[str, float]) -> None:
        """The goals without a rate: the plan at the scale that the simulator allows."""
        scale = min(scales.values())
        for _ in range(4):
            if scale <= 0 or (self.best is not None and scale <= self.best.scale):
                return
            other = self._simulate(candidate.counts, scale)
            if self._better(other):
                self.best = other
                return
            scale *= 0.98

    def _cuts(self, candidate: Candidate) -> list[Cut]:
        """Pools that missed a target at the full rate, whole in one simulation: they and any part of them are out."""
        if not self.for_cost or self.problem.spare_instances:
            return []
        found = []
        for model, verdict in candidate.verdicts.items():
            for role in ("prefill", "decode"):
                mine = {k: n for k, n in candidate.counts.items() if k[:2] == (model, role)}
                if mine and verdict.used(role) > 1 and len(mine) == 1 and sum(mine.values()) <= 24:
                    found.append(Cut(model, role, mine))
        return found

    def _small(self, candidate: Candidate) -> bool:
        """Whether `neighbours` has few enough plans to look at."""
        pools: dict[tuple[Any, ...], int] = {}
        for key, n in candidate.counts.items():
            pools[key[:2]] = pools.get(key[:2], 0) + n
        return self.neighbours and self.for_cost and max(pools.values()) <= LARGEST

    def _improve(self) -> None:
        assert self.best is not None
        start = time.perf_counter()
        for model in self.judges:
            self.best = cheaper(self, model, self.best)
        self.verify_seconds += time.perf_counter() - start


def gpus_of(counts: Counts) -> dict[str, int]:
    """GPUs of each type that `counts` take."""
    gpus: dict[str, int] = {}
    for (_, _, gpu, tp, pp, dp, _), n in counts.items():
        gpus[gpu] = gpus.get(gpu, 0) + n * tp * pp * dp
    return gpus


def kv_bytes(found: Columns, problem: Problem) -> dict[str, float]:
    """KV bytes that one request sends, by model: the narrowest column's."""
    result: dict[str, float] = {}
    for model in problem.models:
        prompt, mine = found.demands[model.name].prompt, [c.steps for c in found.columns if c.model == model.name]
        result[model.name] = max(min((s.kv_bytes_per_token * prompt + s.state_bytes for s in mine), default=0.0), 1.0)
    return result


def runners_up(seen: Sequence[Candidate], best: Candidate, count: int = 3) -> list[Candidate]:
    """The next best plans that met the targets, each with other columns than those before it."""
    found: list[Candidate] = []
    columns: list[Any] = [set(best.counts)]
    for candidate in sorted(seen, key=lambda c: (-c.scale, c.cost)):
        if candidate.meets and set(candidate.counts) not in columns:
            found.append(candidate)
            columns.append(set(candidate.counts))
    return found[:count]
