"""Plans that are tried in the simulator: on the seeds that choose, and then on seeds that chose nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hetkv.planner.attainment import attainment, expected, mean_of
from hetkv.planner.calibrator import Calibrator, Counts, Key
from hetkv.planner.columns import Columns
from hetkv.planner.effort import Effort
from hetkv.planner.power import limits_of, paid_gpus
from hetkv.planner.problem import Problem
from hetkv.planner.result import Attainment, ClassLatency
from hetkv.planner.seeds import choosing_seeds, held_out_seeds
from hetkv.planner.slo_checker import SloChecker, Verdict

NEAR = 1.03
"""Share of a target that a plan may use with the first seed and still be tried with the others."""

CHOOSING_REQUESTS, JUDGING_REQUESTS = 12_000, 40_000
"""Requests over all seeds that choose, and over all that judge; at least `FEWEST` and at most `MOST` seeds each."""

FEWEST, MOST = (3, 3), (4, 8)


@dataclass(frozen=True)
class Candidate:
    """A plan that was simulated: at `scale` it `meets` all targets or not. `cost` is USD/hour, 0 without prices.

    Where it was near enough with the first seed, `verdicts` are what another seed is expected not to exceed.
    `each_holds`: it held with each of the seeds, which were too few to expect much of another one.
    `barred`: it failed on held-out seeds. `held`: it held on them, which counts for more than what chose it.
    """

    counts: dict[Key, int]
    scale: float
    cost: float
    verdicts: dict[str, Verdict]
    each_holds: bool = False
    barred: bool = False
    held: bool = False

    @property
    def meets(self) -> bool:
        return self.held or (not self.barred and all(v.meets for v in self.verdicts.values()))

    @property
    def used(self) -> float:
        """Of the target that is nearest to its limit, or furthest beyond it, the share that is used."""
        return max(v.used() for v in self.verdicts.values())

    @property
    def near(self) -> bool:
        """Whether held-out seeds may accept it."""
        return self.each_holds or self.used <= NEAR


@dataclass(frozen=True)
class Judgement:
    """A plan on held-out seeds: latencies over all their requests, and the attainment of (class, "ttft" or "tpot")."""

    seeds: list[int]
    latency: dict[str, ClassLatency]
    attained: dict[tuple[str, str], Attainment]

    @property
    def holds(self) -> bool:
        return all(a.holds for a in self.attained.values())


@dataclass
class Trials:
    """The plans tried so far (`seen`), what measures them, and what they cost. `barred` failed on held-out seeds."""

    problem: Problem
    found: Columns
    checkers: Mapping[str, SloChecker]
    calibrator: Calibrator
    effort: Effort
    seen: list[Candidate] = field(default_factory=list)
    barred: list[Candidate] = field(default_factory=list)
    seconds: float = 0.0

    def price(self, counts: Counts) -> float:
        """USD/hour, whole nodes where the offer is by node."""
        paid = paid_gpus(self.problem, gpus_of(counts))
        return sum(n * (self.problem.usd_per_gpu_hour(self.problem.offer(name))) for name, n in paid.items())

    def allowed(self, counts: Counts) -> bool:
        """Whether the caps and the limits on power and carbon hold."""
        gpus = gpus_of(counts)
        within = all(n <= cap for g, n in gpus.items() if (cap := self.problem.offer(g).cap) is not None)
        return within and all(limit.keeps(paid_gpus(self.problem, gpus)) for limit in limits_of(self.problem))

    def is_barred(self, counts: Counts, scale: float) -> bool:
        """Whether a plan that failed on held-out seeds had as many instances of everything, for no more traffic."""
        return any(
            scale >= bad.scale and all(n <= bad.counts.get(k, 0) for k, n in counts.items()) for bad in self.barred
        )

    def simulate(self, counts: dict[Key, int], scale: float) -> Candidate:
        """Try a plan with the seeds that choose: the first, and where it is near enough the others."""
        begin = time.perf_counter()
        candidate = Candidate(dict(counts), scale, self.price(counts), self._verdicts(counts, scale, None))
        if candidate.used <= NEAR:
            several = {model: [v] for model, v in candidate.verdicts.items()}
            seeds = choosing_seeds(self.problem.seed, self._seeds(scale, CHOOSING_REQUESTS, 0))
            for seed in seeds[1:]:
                for model, verdict in self._verdicts(counts, scale, seed).items():
                    several[model].append(verdict)
                if any(v[-1].used() > 1.1 for v in several.values()):
                    break
            verdicts = {model: Verdict(expected([v.latency for v in each])) for model, each in several.items()}
            each = len(seeds) < MOST[0] and all(v.used() <= 1 for seen in several.values() for v in seen)
            candidate = replace(candidate, verdicts=verdicts, each_holds=each)
        candidate = replace(candidate, barred=self.is_barred(counts, scale))
        self.seconds += time.perf_counter() - begin
        self.seen.append(candidate)
        return candidate

    def judge(self, candidate: Candidate, attempt: int) -> Judgement:
        """Simulate a plan with seeds that chose nothing so far; no more of them than it takes to see that it fails."""
        begin = time.perf_counter()
        count = self._seeds(candidate.scale, JUDGING_REQUESTS, 1)
        seeds = held_out_seeds(self.problem.seed, attempt, count)
        each: list[dict[str, Verdict]] = []
        for seed in seeds:
            each.append(self._verdicts(candidate.counts, candidate.scale, seed))
            if len(each) > 1 and self._lost(each, count):
                break
        attained, latency = {}, {}
        for model in self.checkers:
            verdicts = [v[model] for v in each]
            for spec in self.checkers[model].classes:
                for target, percentile in (("ttft", spec.ttft_percentile), ("tpot", spec.tpot_percentile)):
                    shares = [v.within[spec.name, target] for v in verdicts if (spec.name, target) in v.within]
                    if shares:
                        attained[spec.name, target] = attainment(shares, percentile)
                latency[spec.name] = mean_of([v.latency[spec.name] for v in verdicts])
        self.seconds += time.perf_counter() - begin
        return Judgement(seeds[: len(each)], latency, attained)

    def _lost(self, each: Sequence[Mapping[str, Verdict]], count: int) -> bool:
        """Whether a target's mean over `count` seeds is missed even if the seeds to come have no late request."""
        for model, checker in self.checkers.items():
            for spec in checker.classes:
                for target, percentile in (("ttft", spec.ttft_percentile), ("tpot", spec.tpot_percentile)):
                    late = sum(1 - v[model].within.get((spec.name, target), 1.0) for v in each)
                    if late > (1 - percentile / 100) * count + 1e-9:
                        return True
        return False

    def with_one_down(self, model: str, counts: Counts) -> list[dict[Key, int]]:
        """The plan with one instance of each of its columns down, where N+1 is asked for."""
        if not self.problem.spare_instances:
            return []
        return [
            {k: n - (k == down) for k, n in counts.items() if n - (k == down)} for down in counts if down[0] == model
        ]

    def _verdicts(self, counts: Counts, scale: float, seed: int | None) -> dict[str, Verdict]:
        """By model; with one instance down, the worst of the plan's."""
        found = {}
        for model in self.checkers:
            found[model] = self.calibrator.verdict(model, counts, scale, seed)
            for less in self.with_one_down(model, counts):
                other = self.calibrator.verdict(model, less, scale, seed)
                if other.used() > found[model].used():
                    found[model] = other
        return found

    def _seeds(self, scale: float, requests: int, kind: int) -> int:
        each = max(checker.requests(scale) for checker in self.checkers.values())
        return min(max(requests // each, FEWEST[kind]), MOST[kind])


def gpus_of(counts: Counts) -> dict[str, int]:
    """GPUs of each type that `counts` take."""
    gpus: dict[str, int] = {}
    for (_, _, gpu, tp, pp, dp, _), n in counts.items():
        gpus[gpu] = gpus.get(gpu, 0) + n * tp * pp * dp
    return gpus


def runners_up(seen: Sequence[Candidate], best: Candidate, count: int = 3) -> list[Candidate]:
    """The next best plans that met the targets, each with other columns than those before it."""
    found: list[Candidate] = []
    columns: list[Any] = [set(best.counts)]
    for candidate in sorted(seen, key=lambda c: (-c.scale, c.cost)):
        if candidate.meets and set(candidate.counts) not in columns:
            found.append(candidate)
            columns.append(set(candidate.counts))
    return found[:count]
