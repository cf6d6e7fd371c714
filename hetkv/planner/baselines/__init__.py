"""Plans as the field makes them, from the papers' descriptions, judged by the same simulator as ours.

May import `hetkv.planner` and what that imports; only benchmarks and tests import it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

from hetkv.planner.baselines.aiconfigurator import AIConfigurator
from hetkv.planner.baselines.candidates import hourly
from hetkv.planner.baselines.distserve import DistServe
from hetkv.planner.baselines.melange import Melange
from hetkv.planner.problem import Problem
from hetkv.planner.result import ClassLatency, Instances, Option
from hetkv.planner.slo_checker import SloChecker

Sizer = Callable[[float], "list[Instances] | None"]
"""The instances for a multiple of the problem's rates; None where the method finds none."""

METHODS: dict[str, Callable[[Problem], Sizer]] = {
    "distserve": DistServe,
    "distserve-mixed": lambda problem: DistServe(problem, mixed=True),
    "melange": Melange,
    "aiconfigurator": AIConfigurator,
    "aiconfigurator-mixed": lambda problem: AIConfigurator(problem, mixed=True),
}
"""From a problem to a sizer. The `-mixed` ones may put the two phases on different GPU types, see their modules."""

RESOLUTION = 0.005
"""For the goals `goodput` and `split`: how near to the largest multiple of the rates the search ends, relative."""


def plan(name: str, problem: Problem) -> Option:
    """The plan of the method `name`, and what the simulator says of it. `seconds` is the method's own time.

    Goal `cost`: the cost for the problem's rates. Other goals: the largest multiple of them within budget and caps.
    """
    begin = time.perf_counter()
    sizer = METHODS[name](problem)
    scale = 1.0 if problem.objective.goal == "cost" else _largest(problem, sizer)
    instances = sizer(scale) if scale else None
    return judged(name, problem, instances, scale, time.perf_counter() - begin)


FACTORS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
"""Multiples of the rate that `repaired` asks a method for."""


def repaired(name: str, problem: Problem, sizer: Sizer) -> tuple[float, Option] | None:
    """The method's plan for the first of `FACTORS` times the rates that meets the targets at the rates themselves.

    What a user would do who trusts the simulator more than the method. None where no factor helps.
    """
    seen: list[list[Instances]] = []
    for factor in FACTORS:
        begin = time.perf_counter()
        instances = sizer(factor)
        if not instances or instances in seen:
            continue
        seen.append(instances)
        option = judged(name, problem, instances, 1.0, time.perf_counter() - begin)
        if option.feasible:
            return factor, option
    return None


def judged(name: str, problem: Problem, instances: list[Instances] | None, scale: float, seconds: float) -> Option:
    """`instances` as an option: feasible where the simulator says so of every class, within the caps."""
    rate = scale * sum(c.rate for c in problem.classes)
    if not instances:
        return Option(name, False, why="the method finds no deployment that meets the targets", seconds=seconds)
    found: dict[str, ClassLatency] = {}
    for model in problem.models:
        found |= SloChecker(problem, model)([i for i in instances if i.model == model.name], scale).latency
    missed = [
        f"{kind} of {name}: {value:.3g} ms, limit {limit:.3g}"
        for name, x in found.items()
        for kind, value, limit in (("TTFT", x.ttft_ms, x.ttft_limit_ms), ("TPOT", x.tpot_ms, x.tpot_limit_ms))
        if value is not None and value > limit
    ]
    cost = hourly(problem, instances)
    if cost == inf:
        missed.append("more GPUs than can be had")
    priced = bool(problem.prices) and cost < inf
    return Option(
        name=name,
        feasible=not missed,
        cost_per_hour=cost if priced else None,
        rate=rate,
        instances=instances,
        simulated=found,
        why="; ".join(missed),
        seconds=seconds,
    )


def _largest(problem: Problem, sizer: Sizer) -> float:
    """The largest multiple of the rates whose instances stay within the budget and the caps; 0 where none does."""
    budget = problem.objective.budget_usd_per_hour or inf

    def within(scale: float) -> bool:
        found = sizer(scale)
        return found is not None and hourly(problem, found) <= min(budget, 1e300)

    low, high = 0.0, 1.0
    while within(high) and high < 1e9:
        low, high = high, 2 * high
    while high - low > RESOLUTION * high and high > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
