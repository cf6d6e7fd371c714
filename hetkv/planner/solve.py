"""From a problem to a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

import msgspec

from hetkv.costmodel import load_catalogue
from hetkv.planner.calibrator import part_of
from hetkv.planner.columns import Columns, build_columns
from hetkv.planner.effort import ALTERNATIVE_EVENTS, PLAN_EVENTS, SAFETY_SECONDS
from hetkv.planner.infeasible import explain
from hetkv.planner.power import limits_of, paid_gpus
from hetkv.planner.power import total as total_of
from hetkv.planner.predict import predict
from hetkv.planner.problem import Problem, check_problem
from hetkv.planner.result import Attainment, ClassLatency, Option, Plan, Tightest
from hetkv.planner.search import Search
from hetkv.planner.sensitivity import at_end, vendor_shifts
from hetkv.planner.slo_checker import SloChecker, deployment
from hetkv.planner.trials import Candidate, Judgement, gpus_of, runners_up


def solve(
    problem: Problem,
    *,
    alternatives: bool = True,
    events: int = PLAN_EVENTS,
    seconds: float = SAFETY_SECONDS,
    checkers: Mapping[str, SloChecker] | None = None,
) -> Plan:
    """The best plan for `problem` (see `Objective`), verified in the simulator.

    `alternatives`: also plan for each vendor alone, disaggregated only and aggregated only, take one of these plans
    where it is better, and plan at the ends of the cost model's interval. After `events` of the simulator the search
    for the plan begins no further measurement, neighbour or round. While no plan meets the targets, rounds that ask for
    more rate go on, and neighbours may take `UNMET` times as many events again. The alternatives and the slack have
    limits of their own. So one problem and seed give one plan (effort.py); `seconds` is an outer limit. `Plan.cut` has
    each limit that was met. `checkers` (by model) remember what they simulated.

    `InfeasibleError` where there is no plan, `UndecidedError` where the integer program's limit left that open;
    `meets` is false where none was found whose targets hold in the simulator.
    """
    problem = check_problem(problem)
    begin, cpu = time.perf_counter(), time.process_time()
    found = build_columns(problem, every=True)
    columns_seconds = time.process_time() - cpu
    checkers = checkers or {m.name: SloChecker(problem, m) for m in problem.models}
    search = Search(problem, found, checkers, events, begin + seconds).run()
    if not search.seen:
        raise search.undecided or explain(problem, found)
    parts = _parts(problem, found) if alternatives else {}
    others = {name: _search_part(search, *part) for name, part in parts.items()}
    best, judged, before = _judge(search)
    bound = search.bound()
    meets = best.meets and judged.holds
    slack = _slack(search, best) if meets else None
    notes = [] if meets else [_closest_note(best, judged)]
    cut = _limits(search, seconds)
    for name, other in others.items():
        cut += [f"{name}: {text}" for text in _limits(other, seconds)]
    notes += cut
    if bound is None:
        notes.append("no bound with queueing left out was found")
    if meets and slack is None:
        least = min(reach.scale for reach in search.slack.values()) - 1
        notes.append(f"the slack was not measured to the end: at least {max(0.0, least):.0%} more traffic fits")
    notes += _unstartable(search, best)
    notes += _fallbacks(search, best)
    options = [_alternative(name, *part, search, best, others[name]) for name, part in parts.items()]
    sensitivity = [at_end(problem, search, best, end) for end in ("low", "high")] if alternatives else []
    total = sum(c.rate for c in problem.classes)
    simulated = judged.latency
    return Plan(
        goal=problem.objective.goal,
        instances=search.calibrator.instances(best.counts),
        cost_per_hour=_cost(problem, best),
        rate=total * best.scale,
        scale=best.scale,
        gap=search.solution.gap if search.solution else 0.0,
        lower_bound=_bound(bound, search, best, total),
        simulated_slack=slack,
        predicted=_predicted(found, search, best),
        simulated=simulated,
        meets=meets,
        tightest=_tightest(problem, search, best, simulated),
        baselines=options,
        runners_up=[_option(search, c, f"runner-up {i + 1}") for i, c in enumerate(runners_up(search.left(), best))],
        sensitivity=sensitivity,
        shifts=vendor_shifts(problem, search, best) if alternatives else [],
        columns_seconds=columns_seconds,
        solve_seconds=search.solve_seconds,
        verify_seconds=search.verify_seconds,
        iterations=search.iterations,
        held_out_seeds=judged.seeds,
        attained=_attained(judged),
        judged_before=before,
        events=sum(checker.events for checker in checkers.values()),
        deployments={
            m.name: deployment(problem, m, [i for i in search.calibrator.instances(best.counts) if i.model == m.name])
            for m in problem.models
        },
        notes=notes,
        cut=cut,
        kw=total_of(problem, paid_gpus(problem, gpus_of(best.counts)), "power"),
        co2_kg_per_hour=total_of(problem, paid_gpus(problem, gpus_of(best.counts)), "carbon"),
    )


ATTEMPTS = 3
"""Plans that are judged on held-out seeds, each on its own, before one that fails is taken as the closest."""


def _judge(search: Search) -> tuple[Candidate, Judgement, int]:
    """The plan, what held-out seeds say of it, and how many plans failed there before it."""
    failed: list[tuple[Candidate, Judgement]] = []
    while len(failed) < ATTEMPTS and (best := search.to_judge()) is not None:
        judged = search.trials.judge(best, len(failed))
        if judged.holds:
            if not best.meets:
                best = search.best = replace(best, held=True)
            return best, judged, len(failed)
        failed.append((best, judged))
        search.again(best, {target for (_, target), a in judged.attained.items() if not a.holds})
    if failed:
        best, judged = max(failed, key=lambda f: min(a.share - a.asked for a in f[1].attained.values()))
        return best, judged, len(failed) - 1
    best = _closest(search.seen)
    return best, search.trials.judge(best, 0), 0


def _closest_note(best: Candidate, judged: Judgement) -> str:
    """Why the plan is not one that holds."""
    missed = [
        f"{target.upper()} of class {name}: {a.share:.2%} of the requests in time (interval {a.low:.2%} to "
        f"{a.high:.2%}), {a.asked:.1%} asked"
        for (name, target), a in judged.attained.items()
        if not a.holds
    ]
    text = "no plan was found whose targets hold in the simulator: this one comes closest"
    return f"{text} ({'; '.join(missed)} on held-out seeds)" if missed and best.meets else text


def _attained(judged: Judgement) -> dict[str, dict[str, Attainment]]:
    found: dict[str, dict[str, Attainment]] = {}
    for (name, target), a in judged.attained.items():
        found.setdefault(name, {})[target] = a
    return found


def _limits(search: Search, seconds: float) -> list[str]:
    """What ended the search early, each in a sentence."""
    found = []
    if search.effort.short == "events":
        found.append(
            f"the search ended at its limit of {search.events:,} simulated events: more may find a better plan"
        )
    if search.effort.short == "clock":
        found.append(f"the clock stopped the search after {seconds:g} s: on another machine the plan may differ")
    if search.undecided is not None:
        found.append(f"{search.undecided}: the search ended there")
    if search.solution is not None and search.solution.gap > 1e-9:
        found.append(f"the integer program ended {search.solution.gap:.2%} from its bound: cheaper counts may exist")
    return found


def _closest(seen: Sequence[Candidate]) -> Candidate:
    """Of plans that all miss a target, the one that misses least."""
    return min(seen, key=lambda c: max(x.used for v in c.verdicts.values() for x in v.latency.values()))


def _latency(candidate: Candidate) -> dict[str, ClassLatency]:
    return {name: x for verdict in candidate.verdicts.values() for name, x in verdict.latency.items()}


def _cost(problem: Problem, candidate: Candidate) -> float | None:
    used = {key[2] for key in candidate.counts}
    return candidate.cost if all(problem.offer(str(g)).usd_per_gpu_hour is not None for g in used) else None


def _bound(bound: float | None, search: Search, best: Candidate, total: float) -> float:
    """USD/hour no plan goes below, or requests/s none exceeds; never beyond the plan itself, which exists. 0 or
    infinite where `bound` is not known.
    """
    if search.for_cost:
        return min(best.cost, bound if bound is not None else 0.0)
    return max(best.scale, bound if bound is not None else inf) * total


def _slack(search: Search, best: Candidate) -> float | None:
    """The least over models and roles of how much the traffic may still grow, measured in the simulator.

    None where `best` misses a target, or where a limit ended the measurement of the role that is least.
    """
    if not best.meets:
        return None
    begin = time.perf_counter()
    if not search.slack or search.slack_of is not best:
        search.measure_best()
    search.verify_seconds += time.perf_counter() - begin
    least = min(search.slack.values(), key=lambda reach: (reach.scale, reach.cut))
    return None if least.cut else max(0.0, least.scale - 1)


def _predicted(found: Columns, search: Search, best: Candidate) -> dict[str, ClassLatency]:
    result: dict[str, ClassLatency] = {}
    for model, demand in found.demands.items():
        counts = {k: n for k, n in best.counts.items() if k[0] == model}
        result.update(predict(demand, search.by_key, counts, best.scale * search.calibrator.rate(model)))
    return result


def _unstartable(search: Search, best: Candidate) -> list[str]:
    """What the plan has that its engine cannot start."""
    mine = [search.by_key[key] for key in best.counts]
    return [f"{c} cannot be started: {c.unstartable}" for c in mine if c.unstartable]


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
            load = best.scale * search.calibrator.rate(column.model) * share / n / column.port_rate
            found.append(Tightest("KV port", str(column), load))
    found += [Tightest("GPU cap", g, n / cap) for g, n in gpus.items() if (cap := problem.offer(g).cap)]
    paid = paid_gpus(problem, gpus)
    found += [Tightest(f"{x.name} limit", "limits", x.taken(paid) / x.most) for x in limits_of(problem)]
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
        instances=search.calibrator.instances(candidate.counts),
        simulated=_latency(candidate),
        why="" if candidate.meets else f"misses a target of {', '.join(missed)} in the simulator",
        seconds=seconds,
    )


def _parts(problem: Problem, found: Columns) -> dict[str, tuple[Problem, Columns]]:
    """The problem and its columns with each vendor alone, and with disaggregated and aggregated instances alone."""
    catalogue = load_catalogue(problem.catalogue)
    vendors = {o.gpu: catalogue.gpu(o.gpu).vendor for o in problem.gpus}
    parts: dict[str, Problem] = {}
    for vendor in dict.fromkeys(vendors.values()):
        own = [o for o in problem.gpus if vendors[o.gpu] == vendor]
        parts[f"{vendor} only"] = msgspec.structs.replace(problem, gpus=own)
    if problem.roles == "any":
        parts["disaggregated only"] = msgspec.structs.replace(problem, roles="disaggregated")
        parts["aggregated only"] = msgspec.structs.replace(problem, roles="aggregated")
    return {name: (part, _columns_of(part, found)) for name, part in parts.items()}


def _columns_of(part: Problem, found: Columns) -> Columns:
    gpus = {o.gpu for o in part.gpus}
    left = [
        c
        for c in found.columns
        if c.gpu in gpus and (part.roles == "any" or (c.role == "aggregated") is (part.roles == "aggregated"))
    ]
    return Columns(left, found.rejected, found.demands)


def _search_part(search: Search, problem: Problem, part: Columns) -> Search:
    """Search some of the columns alone and let `search` adopt what is found."""
    other = Search(problem, part, search.checkers, ALTERNATIVE_EVENTS, search.deadline)
    if search.best is None or not set(search.best.counts) <= {c.key for c in part.columns}:
        other.calibrator.learn(search.calibrator)
        search.adopt(other.run())
    return other  # not run where the best of all is the best of these


def _alternative(name: str, problem: Problem, part: Columns, search: Search, best: Candidate, other: Search) -> Option:
    """The best of all plans that were simulated and use these columns only."""
    keys = {c.key for c in part.columns}
    seen = [c for c in (best, *search.left()) if set(c.counts) <= keys]
    if not seen:
        text = str(other.undecided or explain(problem, part))
        return Option(name, False, why=text.removeprefix("no plan: "), seconds=other.seconds)
    met = [c for c in seen if c.meets]
    chosen = min(met, key=lambda c: c.cost if search.for_cost else -c.scale) if met else _closest(seen)
    return _option(search, chosen, name, other.seconds)
