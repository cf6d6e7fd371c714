"""Solve, simulate, correct, cut, repeat: from columns to a plan whose targets hold in the simulator."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import msgspec
import numpy as np

from hetkv.errors import UndecidedError
from hetkv.planner.calibrator import Calibrator, Reach
from hetkv.planner.columns import Column, Columns, kv_bytes
from hetkv.planner.effort import PLAN_EVENTS, UNMET, Effort
from hetkv.planner.milp import Cut, Solution, optimise
from hetkv.planner.neighbours import BURSTS, LARGEST, cheaper
from hetkv.planner.problem import Problem
from hetkv.planner.prune import prune
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.trials import NEAR, Candidate, Trials

ITERATIONS = 6
"""Rounds of solving and simulating, at most."""

RESERVE, GROWTH, MOST_RESERVE = 0.02, 1.25, 1.0
"""Extra rate that is asked of a pool where a measurement says that it holds and the seeds together say that it does
not, or where no more can be measured: the first part, how it grows from round to round, and the most."""

GROWTHS = 6
"""Times that a plan which came closest is given more instances, where none held."""

LOST_LATER = 0.8
"""Of TTFT, the share up to which prompts alone say that a miss is due to what follows them: the KV's link, and decode
instances without room."""


DEARER = 1.1
"""Where no plan met the targets, the neighbours are asked up to this multiple of the costliest plan that was tried."""

TOO_SLOW = {"prefill": NEAR, "decode": BURSTS, "aggregated": NEAR}
"""Of a target, the share that a pool uses that is out: what misses by less may hold with more of the other role."""

ROLE_OF = {"ttft": "prefill", "tpot": "decode"}
"""Which pool a target asks for more of."""


@dataclass
class Search:
    """One search over `columns`. After `run`, `best` is the plan, `seen` all that were simulated, and the times.

    `undecided` is set where the integer program's limit ended the rounds: `best` and `seen` are those until then.
    """

    problem: Problem
    found: Columns
    checkers: Mapping[str, SloChecker]
    events: int = PLAN_EVENTS
    deadline: float = inf
    neighbours: bool = True
    best: Candidate | None = None
    solution: Solution | None = None
    solve_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0
    iterations: int = 0
    undecided: UndecidedError | None = None
    slack: dict[tuple[str, str], Reach] = field(default_factory=dict)  # (model, role) to multiples of the plan's rates
    cut_off: list[Cut] = field(default_factory=list)  # pools of plans that failed on held-out seeds
    extended: bool = False  # the neighbours of a plan that misses a target have had events of their own
    slack_of: Candidate | None = None  # the plan that `slack` was measured for to the end
    more: dict[tuple[str, str], float] = field(default_factory=dict)  # (model, role) to extra rate that is asked of it
    _asked: tuple[Any, ...] = ()  # the program before, and its solution
    _answer: Solution | None = None

    def __post_init__(self) -> None:
        self.effort = Effort(self.checkers, self.events, self.deadline)
        self.calibrator = Calibrator(self.problem, self.found.columns, self.checkers, self.effort)
        self.trials = Trials(self.problem, self.found, self.checkers, self.calibrator, self.effort)
        self.seen = self.trials.seen
        self.for_cost = self.problem.objective.goal == "cost"
        self.by_key = {c.key: c for c in self.found.columns}

    def run(self) -> Search:
        """Search; `best` stays None where no plan was found that meets the targets."""
        begin = time.perf_counter()
        self._rounds()
        self._finish()
        self.seconds += time.perf_counter() - begin
        return self

    def again(self, failed: Candidate, late: set[str]) -> Search:
        """Search on without a plan that failed on held-out seeds, nor any that has no more instances of anything.

        `late` are the targets that it missed, "ttft" or "tpot".
        """
        begin = time.perf_counter()
        roles = {"aggregated", *(role for target, role in ROLE_OF.items() if target in late)}
        for model, role in {k[:2] for k in failed.counts if k[1] in roles} if self.for_cost else ():
            self.cut_off.append(Cut(model, role, {k: n for k, n in failed.counts.items() if k[:2] == (model, role)}))
        self.trials.barred.append(failed)
        left = [c for c in self.seen if c.meets and not self.trials.is_barred(c.counts, c.scale)]
        key = (lambda c: c.cost) if self.for_cost else (lambda c: -c.scale)
        self.best = min(left, key=key, default=None)
        if not self.for_cost:
            steps = 2 ** (len(self.trials.barred) - 1)  # the next attempt must not fail by as little
            self._rescale(failed, 0.98**steps * failed.scale)
        elif self.best is None:
            self.iterations = ITERATIONS
            self._rounds({key[:2] for key in failed.counts if key[1] in roles})
        self._finish()
        self.seconds += time.perf_counter() - begin
        return self

    def _finish(self) -> None:
        if self.neighbours and self.for_cost and not self.problem.pair_limits:
            self._improve()
        if self.for_cost and self.best is None and self.near() is None:
            self._grow()

    def _grow(self) -> None:
        """Where nothing held: what came closest, with more instances of the pools that miss, until it holds."""
        plan = min(self.left(), key=lambda c: c.used, default=None)
        for _ in range(GROWTHS):
            if plan is None or plan.near:
                break
            counts = dict(plan.counts)
            for model, role in {key[:2] for key in counts}:
                if plan.verdicts[model].used(role) > 1:
                    asked = "decode" if role == "prefill" and self._lost_later(model, plan) else role
                    largest = max((k for k in counts if k[:2] == (model, asked)), key=lambda k: counts[k])
                    counts[largest] += max(1, counts[largest] // 10)
            if not self.trials.allowed(counts):
                break
            plan = self.trials.simulate(counts, 1.0)
        if plan is not None and self._better(plan):
            self.best = plan

    def _rounds(self, short: set[tuple[str, str]] | None = None) -> None:
        """Solve, simulate and correct until nothing better comes, or a limit is met.

        `short` are the pools, by model and role, of which more is asked than what was measured says.
        """
        cuts = list(self.cut_off)
        before: list[dict[Any, int]] = []  # that tell nothing more where they come again
        short, new = short or set(), 0
        while new < 2 * ITERATIONS:
            late = self.iterations >= ITERATIONS or self.effort.spent
            found = self.best is not None or (not self.trials.barred and self.near() is not None)
            if late and (found or not self.for_cost):
                break
            for pool in short:
                self.more[pool] = GROWTH * self.more.get(pool, 0.0) + RESERVE
            if max(self.more.values(), default=0.0) > MOST_RESERVE + 1e-9:
                break
            try:
                solution = self._solve(self.calibrator.corrected(), cuts)
            except UndecidedError as error:
                self.undecided = error
                break
            if solution is None:
                break
            if short and any(solution.counts == c.counts for c in self.seen):
                continue  # nothing to learn from it again: more must be asked for
            new += 1
            self.iterations += 1
            candidate = self.trials.simulate(solution.counts, 1.0 if self.for_cost else solution.scale)
            if self._better(candidate):
                self.best, self.solution = candidate, solution
            if solution.counts in before or (self.best and self.for_cost and solution.value >= self.best.cost + 1e-9):
                break
            if candidate.meets and self._small(candidate):
                break  # the neighbours are asked one by one
            if self.for_cost:
                before = [solution.counts] if candidate.meets else []
            else:
                before.append(solution.counts)
            reached = self._measure(candidate)
            if self.for_cost:
                short = self._short(candidate, reached)
            else:
                self._rescale(candidate, min((reach.scale for reach in reached.values()), default=0.0))
            cuts += self._cuts(candidate)

    def _short(self, candidate: Candidate, reached: Mapping[tuple[str, str], Reach]) -> set[tuple[str, str]]:
        """Pools that miss a target with the seeds together, where measuring them, with one, corrected nothing."""
        found = set()
        for model, role in {key[:2] for key in candidate.counts}:
            reach = reached.get((model, role))
            known = reach is not None and reach.scale < candidate.scale
            if candidate.verdicts[model].used(role) > 1 and (not known or self.effort.spent):
                found.add((model, "decode" if role == "prefill" and self._lost_later(model, candidate) else role))
        return found

    def _lost_later(self, model: str, candidate: Candidate) -> bool:
        """Whether a TTFT is missed that the prefill pool by itself keeps with room to spare."""
        if not self.calibrator.whole(model, candidate.counts, candidate.scale):
            return False
        alone = self.calibrator.role(model, candidate.counts, "prefill", candidate.scale)
        return alone.used("prefill") <= LOST_LATER

    def adopt(self, other: Search) -> None:
        """Take over what a search of some of these columns simulated and measured, and its plan if it is better."""
        self.calibrator.learn(other.calibrator)
        self.seen += other.seen
        if other.best is not None and self._better(other.best):
            self.best, self.solution = other.best, other.solution

    def _solve(self, columns: Sequence[Column], cuts: Sequence[Cut]) -> Solution | None:
        begin = time.process_time()
        rates = {m.name: self.calibrator.rate(m.name) for m in self.problem.models}
        columns = [self._reserved(c) for c in columns]
        asked = (list(cuts), [c.rates.tolist() for c in columns])
        if asked != self._asked:  # a plan that failed by less than can be measured changes nothing
            kept = prune(columns, self.problem)
            self._answer = optimise(self.problem, kept, rates, kv_bytes(self.found, self.problem), cuts=cuts)
            self._asked = asked
        self.solve_seconds += time.process_time() - begin
        return self._answer

    def _reserved(self, column: Column) -> Column:
        """The column with less rate where more is asked of its pool."""
        part = 1 + self.more.get(column.key[:2], 0.0)
        return replace(column, rates=column.rates / part, relaxed=column.relaxed / part) if part > 1 else column

    def bound(self) -> float | None:
        """The objective of all columns with queueing relaxed, None where even that is infeasible or not decided."""
        rates = {m.name: self.calibrator.rate(m.name) for m in self.problem.models}
        loose = msgspec.structs.replace(self.problem, spare_instances=0)
        begin = time.process_time()
        columns = [replace(c, rates=np.full_like(c.rates, c.relaxed)) for c in self.calibrator.corrected()]
        try:
            solution = optimise(loose, prune(columns, loose), rates, kv_bytes(self.found, self.problem), relaxed=True)
        except UndecidedError:
            solution = None
        self.solve_seconds += time.process_time() - begin
        return None if solution is None else solution.bound

    def _better(self, candidate: Candidate) -> bool:
        if not candidate.meets:
            return False
        if self.best is None:
            return True
        return candidate.cost < self.best.cost - 1e-9 if self.for_cost else candidate.scale > self.best.scale

    def _measure(self, candidate: Candidate) -> dict[tuple[str, str], Reach]:
        """The largest scale of each pool that was measured; the next program uses it."""
        begin = time.perf_counter()
        found = {}
        for model in self.checkers:
            counts = {k: n for k, n in candidate.counts.items() if k[0] == model}
            if self.problem.spare_instances:
                counts = min(self.trials.with_one_down(model, counts), key=self.calibrator._weight)
            used = candidate.verdicts[model].used
            some = [
                r for r in ("prefill", "decode", "aggregated") if candidate.meets or not self.for_cost or used(r) > 1
            ]
            scales = self.calibrator.measure(model, counts, candidate.scale, some)
            found.update({(model, role): reach for role, reach in scales.items()})
        if candidate is self.best:
            self.slack = {pool: replace(r, scale=r.scale / candidate.scale) for pool, r in found.items()}
            self.slack_of = None if any(reach.cut for reach in found.values()) else candidate
        self.verify_seconds += time.perf_counter() - begin
        return found

    def measure_best(self) -> None:
        """Find the slack of `best`."""
        assert self.best is not None
        self.calibrator.effort = Effort(self.checkers, self.events // 2, self.deadline)
        self._measure(self.best)

    def _rescale(self, candidate: Candidate, scale: float) -> None:
        """The goals without a rate: the plan at the scale that the simulator allows."""
        for _ in range(8):
            if scale <= 0 or (self.best is not None and scale <= self.best.scale):
                return
            other = self.trials.simulate(candidate.counts, scale)
            if self._better(other):
                self.best = other
                return
            scale *= 0.98

    def _cuts(self, candidate: Candidate) -> list[Cut]:
        """Pools that missed a target by far at the full rate, whole in one simulation: they and any part of them are
        out."""
        if not self.for_cost or self.problem.spare_instances:
            return []
        found = []
        for model, verdict in candidate.verdicts.items():
            for role in ("prefill", "decode", "aggregated"):
                mine = {k: n for k, n in candidate.counts.items() if k[:2] == (model, role)}
                alike = len(mine) == 1 or role == "aggregated"
                if mine and verdict.used(role) > TOO_SLOW[role] and alike and sum(mine.values()) <= 24:
                    found.append(Cut(model, role, mine))
        return found

    def _small(self, candidate: Candidate) -> bool:
        """Whether `neighbours` has few enough plans to look at."""
        pools: dict[tuple[Any, ...], int] = {}
        for key, n in candidate.counts.items():
            pools[key[:2]] = pools.get(key[:2], 0) + n
        return self.neighbours and self.for_cost and max(pools.values()) <= LARGEST

    def _improve(self) -> None:
        """Ask the neighbours of the plan, or where none met the targets those of one that is near, or else closest."""
        start = time.perf_counter()
        plan = self.best or self.near() or min(self.left(), key=lambda c: c.used, default=None)
        if plan is None:
            return
        if self.best is None and not self.extended:
            self.effort.extend(UNMET * self.events)
            self.extended = True
        most = plan.cost if plan.near else DEARER * max(c.cost for c in self.seen)
        for model in self.checkers:
            plan = cheaper(self.trials, model, plan, plan.cost if plan.meets else most)
        if self._better(plan):
            self.best = plan
        self.verify_seconds += time.perf_counter() - start

    def left(self) -> list[Candidate]:
        """What was tried, without the plans that failed on held-out seeds since."""
        return [c for c in self.seen if c.held or not self.trials.is_barred(c.counts, c.scale)]

    def near(self) -> Candidate | None:
        """The best plan that misses by so little, or not at all, that held-out seeds may accept it."""
        left = [c for c in self.left() if c.near]
        return min(left, key=lambda c: (c.cost if self.for_cost else -c.scale, c.used), default=None)

    def to_judge(self) -> Candidate | None:
        """The plan; before the first judgement one that is cheaper and near, and where no plan is left any near one."""
        near = self.near()
        if self.best is None or near is None or self.trials.barred or not self.for_cost:
            return self.best or near
        return near if near.cost < self.best.cost - 1e-9 else self.best
