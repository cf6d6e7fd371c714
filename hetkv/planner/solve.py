"""From a problem to a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal

from hetkv.costmodel import load_catalogue
from hetkv.planner.columns import Column, Columns, build_columns
from hetkv.planner.gauge import part_of
from hetkv.planner.infeasible import InfeasibleError, explain
from hetkv.planner.predict import predict
from hetkv.planner.problem import Problem, check_problem
from hetkv.planner.programme import optimise
from hetkv.planner.result import ClassLatency, Option, Plan, Sensitivity, Tightest
from hetkv.planner.search import Candidate, Search, kv_bytes, runners_up
from hetkv.planner.verify import Judge, deployment
from hetkv.simulator.scaled import ScaledStepModel

VERIFY_SECONDS = 45.0
"""Time after which no further round of simulation is begun for the plan itself."""

ALTERNATIVE_SECONDS = 15.0
"""The same for each plan that is computed beside it."""


def solve(problem: Problem, *, beside: bool = True, seconds: float = VERIFY_SECONDS) -> Plan:
    """The best plan for `problem` (see `Objective`), verified in the simulator.

    `beside` also plans for each vendor alone, disaggregated only and aggregated only, and at the ends of the cost
    model's interval. `seconds` bounds the simulation of the plan itself. `InfeasibleError` where there is no plan;
    `meets` is false where none was found whose targets hold in the simulator.
    """
    problem = check_problem(problem)
    begin = time.perf_counter()
    found = build_columns(problem, every=True)
    columns_seconds = time.perf_counter() - begin
    judges = {m.name: Judge(problem, m) for m in problem.models}
    search = Search(problem, found, judges, seconds).run()
    best = search.best or _closest(search.seen)
    if best is None:
        raise explain(problem, found)
    bound = search.bound()
    slack = _slack(search, best)
    notes = [] if best.meets else ["no plan was found whose targets hold in the simulator: this one comes closest"]
    notes += _fallbacks(search, best)
    sensitivity, options = [], []
    if beside:
        sensitivity = [_sensitivity(problem, search, best, end) for end in ("low", "high")]
        options = _alternatives(problem, found, judges, search, best)
    total = sum(c.rate for c in problem.classes)
    simulated = _latency(best)
    return Plan(
        goal=problem.objective.goal,
        instances=search.gauge.instances(best.counts),
        cost_per_hour=_cost(problem, best),
        rate=total * best.scale,
        scale=best.scale,
        gap=search.solution.gap if search.solution else 0.0,
        lower_bound=_bound(bound, search, best, total),
        simulated_slack=slack,
        predicted=_predicted(found, search, best),
        simulated=simulated,
        meets=best.meets,
        tightest=_tightest(problem, search, best, simulated),
        baselines=options,
        runners_up=[_option(search, c, f"runner-up {i + 1}") for i, c in enumerate(runners_up(search.seen, best))],
        sensitivity=sensitivity,
        columns_seconds=columns_seconds,
        solve_seconds=search.solve_seconds,
        verify_seconds=search.verify_seconds,
        iterations=search.iterations,
        deployments={
            m.name: deployment(problem, m, [i for i in search.gauge.instances(best.counts) if i.model == m.name])
            for m in problem.models
        },
        notes=notes,
    )


def _closest(seen: Sequence[Candidate]) -> Candidate | None:
    """Of plans that all miss a target, the one that misses least."""
    return min(seen, key=lambda c: max(x.used for v in c.verdicts.values() for x in v.latency.values()), default=None)


def _latency(candidate: Candidate) -> dict[str, ClassLatency]:
    return {name: x for verdict in candidate.verdicts.values() for name, x in verdict.latency.items()}


def _cost(problem: Problem, candidate: Candidate) -> float | None:
    used = {key[2] for key in candidate.counts}
    return candidate.cost if all(problem.offer(str(g)).usd_per_gpu_hour is not None for g in used) else None


def _bound(bound: float | None, search: Search, best: Candidate, total: float) -> float:
    """USD/hour no plan goes below, or requests/s none exceeds; never beyond the plan itself, which exists."""
    if search.for_cost:
        return min(best.cost, bound if bound is not None else 0.0)
    return max(best.scale, bound if bound is not None else best.scale) * total


def _slack(search: Search, best: Candidate) -> float | None:
    """The least over models and roles of how much the traffic may still grow, measured in the simulator."""
    if not best.meets:
        return None
    begin = time.perf_counter()
    if not search.slack or search.slack_of is not best:
        search.measure_best()
    search.verify_seconds += time.perf_counter() - begin
    return max(0.0, min(search.slack.values()))


def _predicted(found: Columns, search: Search, best: Candidate) -> dict[str, ClassLatency]:
    result: dict[str, ClassLatency] = {}
    for model, demand in found.demands.items():
        counts = {k: n for k, n in best.counts.items() if k[0] == model}
        result.update(predict(demand, search.by_key, counts, best.scale * search.gauge.rate(model)))
    return result


def _fallbacks(search: Search, best: Candidate) -> list[str]:
    """What the cost model did not measure for the columns in the plan."""
    notes = []
    for key in best.counts:
        efficiency = getattr(search.by_key[key].steps, "efficiency", None)
        text = getattr(efficiency, "fallback", "")
        note = f"{search.by_key[key]}: {text}"
        if text and note not in notes:
            notes.append(note)
    return notes


def _tightest(problem: Problem, search: Search, best: Candidate, simulated: Mapping[str, ClassLatency]) -> Tightest:
    """The target, cap, budget or port that is nearest to its limit."""
    found = []
    for name, x in simulated.items():
        found.append(Tightest(f"TTFT p{x.ttft_percentile:g}", f"class {name}", (x.ttft_ms or 0.0) / x.ttft_limit_ms))
        found.append(Tightest(f"TPOT p{x.tpot_percentile:g}", f"class {name}", (x.tpot_ms or 0.0) / x.tpot_limit_ms))
    gpus: dict[str, int] = {}
    for key, n in best.counts.items():
        column = search.by_key[key]
        gpus[column.gpu] = gpus.get(column.gpu, 0) + n * column.gpus
        if column.role != "aggregated":
            mine = [k for k in best.counts if k[:2] == key[:2]]
            share = part_of(column, best.counts[key])
            share /= sum(part_of(search.by_key[k], best.counts[k]) for k in mine)
            load = best.scale * search.gauge.rate(column.model) * share / n / column.port_rate
            found.append(Tightest("KV port", str(column), load))
    found += [Tightest("GPU cap", g, n / cap) for g, n in gpus.items() if (cap := problem.offer(g).cap)]
    budget = problem.objective.budget_usd_per_hour
    if budget:
        found.append(Tightest("budget", "objective", best.cost / budget))
    return max(found, key=lambda t: t.used)


def _option(search: Search, candidate: Candidate, name: str, seconds: float = 0.0) -> Option:
    missed = [n for n, x in _latency(candidate).items() if x.used > 1]
    return Option(
        name=name,
        feasible=candidate.meets,
        cost_per_hour=_cost(search.problem, candidate),
        rate=candidate.scale * sum(c.rate for c in search.problem.classes),
        instances=search.gauge.instances(candidate.counts),
        simulated=_latency(candidate),
        why="" if candidate.meets else f"misses a target of {', '.join(missed)} in the simulator",
        seconds=seconds,
    )


def _alternatives(
    problem: Problem, found: Columns, judges: Mapping[str, Judge], search: Search, best: Candidate
) -> list[Option]:
    """The plan of each vendor alone, of disaggregated and of aggregated instances alone."""
    catalogue = load_catalogue(problem.catalogue)
    vendors = {o.gpu: catalogue.gpu(o.gpu).vendor for o in problem.gpus}
    filters = {f"{v} only": {g for g, x in vendors.items() if x == v} for v in dict.fromkeys(vendors.values())}
    result = []
    for name, gpus in filters.items():
        part = [c for c in found.columns if c.gpu in gpus]
        result.append(_alternative(name, problem, found, part, judges, search, best))
    if problem.roles == "any":
        for name, both in (("disaggregated only", False), ("aggregated only", True)):
            part = [c for c in found.columns if (c.role == "aggregated") is both]
            result.append(_alternative(name, problem, found, part, judges, search, best))
    return result


def _alternative(
    name: str,
    problem: Problem,
    found: Columns,
    part: list[Column],
    judges: Mapping[str, Judge],
    search: Search,
    best: Candidate,
) -> Option:
    begin = time.perf_counter()
    if set(best.counts) <= {c.key for c in part}:
        return _option(search, best, name)  # the best of all is the best of these
    other = Search(problem, Columns(part, {}, found.demands), judges, ALTERNATIVE_SECONDS)
    other.gauge.learn(search.gauge)
    other.run()
    candidate = other.best or _closest(other.seen)
    seconds = time.perf_counter() - begin
    if candidate is None:
        text = str(explain(problem, Columns(part, found.refused, found.demands)))
        return Option(name, False, why=text.removeprefix("no plan: "), seconds=seconds)
    return _option(other, candidate, name, seconds)


def _sensitivity(problem: Problem, search: Search, best: Candidate, end: Literal["low", "high"]) -> Sensitivity:
    """The plan with step times at one end of the interval, and what the programme would then buy."""
    verdicts = {}
    for model in problem.models:
        mine = {k: n for k, n in best.counts.items() if k[0] == model.name}
        steps = {(c.gpu, c.tp, c.pp, c.budget): ScaledStepModel(c.steps, end) for c in (search.by_key[k] for k in mine)}
        gauge = search.gauge.with_judge(model.name, Judge(problem, model, dict(steps)))
        verdicts[model.name] = gauge.verdict(model.name, mine, best.scale)
    columns = build_columns(problem, end)
    rates = {m.name: search.gauge.rate(m.name) for m in problem.models}
    solution = optimise(problem, columns.columns, rates, kv_bytes(columns, problem))
    total = sum(rates.values())
    found = {name: x for verdict in verdicts.values() for name, x in verdict.latency.items()}
    meets = all(v.meets for v in verdicts.values())
    if solution is None:
        return Sensitivity(end, found, meets, None, None)
    cost = search.price(solution.counts) if problem.prices else None
    return Sensitivity(end, found, meets, cost, total * solution.scale)


__all__ = ["InfeasibleError", "solve"]
