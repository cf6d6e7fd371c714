"""What the plan hangs on: step times at the ends of their interval, and one vendor's slower or faster than assumed."""

from __future__ import annotations

from typing import Literal

from hetkv.costmodel import load_catalogue
from hetkv.errors import UndecidedError
from hetkv.planner.calibrator import Calibrator
from hetkv.planner.columns import build_columns, kv_bytes
from hetkv.planner.milp import Solution, optimise
from hetkv.planner.problem import Problem
from hetkv.planner.prune import prune
from hetkv.planner.result import Sensitivity, Shift
from hetkv.planner.search import Search
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.trials import Candidate
from hetkv.simulator.scaled import ScaledStepModel

SHIFT = 1.2
"""By how much one vendor's step times are longer, or shorter, than assumed."""


def at_end(problem: Problem, search: Search, best: Candidate, end: Literal["low", "high"]) -> Sensitivity:
    """The plan with step times at one end of the interval, and what the program would then buy."""
    verdicts = {}
    for model in problem.models:
        mine = {k: n for k, n in best.counts.items() if k[0] == model.name}
        steps = {
            (c.gpu, c.tp, c.pp, c.dp, c.budget): ScaledStepModel(c.steps, end) for c in (search.by_key[k] for k in mine)
        }
        calibrator = search.calibrator.with_checker(model.name, SloChecker(problem, model, dict(steps)))
        verdicts[model.name] = calibrator.verdict(model.name, mine, best.scale)
    columns = build_columns(problem, end)
    rates = {m.name: search.calibrator.rate(m.name) for m in problem.models}
    solution, why = None, ""
    try:
        solution = optimise(problem, columns.columns, rates, kv_bytes(columns, problem))
    except UndecidedError as error:
        why = str(error)
    total = sum(rates.values())
    found = {name: x for verdict in verdicts.values() for name, x in verdict.latency.items()}
    meets = all(v.meets for v in verdicts.values())
    if solution is None:
        return Sensitivity(end, found, meets, None, None, why)
    cost = search.trials.price(solution.counts) if problem.prices else None
    return Sensitivity(end, found, meets, cost, total * solution.scale)


def vendor_shifts(problem: Problem, search: Search, best: Candidate) -> list[Shift]:
    """For each vendor on offer: what the program would buy if its steps took `SHIFT` times as long, or as short.

    Rates are corrected by what the search measured. Empty where one vendor alone is offered.
    """
    catalogue = load_catalogue(problem.catalogue)
    vendors = {o.gpu: catalogue.gpu(o.gpu).vendor for o in problem.gpus if o.cap != 0}
    kinds = list(dict.fromkeys(vendors.values()))
    if len(kinds) < 2:
        return []
    chosen = {vendors[str(k[2])] for k in best.counts}
    found = []
    for vendor in kinds:
        for factor in (SHIFT, 1 / SHIFT):
            try:
                solution = _program(problem, search, {g: factor for g, v in vendors.items() if v == vendor})
            except UndecidedError:
                continue
            if solution is None:
                found.append(Shift(vendor, factor, [], True, None, None))
                continue
            bought = sorted({vendors[str(k[2])] for k in solution.counts})
            cost = search.trials.price(solution.counts) if problem.prices else None
            rate = solution.scale * sum(c.rate for c in problem.classes)
            found.append(Shift(vendor, factor, bought, set(bought) != chosen, cost, rate))
    # Where the program as it is buys of other vendors than the plan, every shift would: it says nothing then.
    same = {tuple(s.vendors) for s in found}
    return found if len(same) > 1 or not any(s.flips for s in found) else []


def _program(problem: Problem, search: Search, factors: dict[str, float]) -> Solution | None:
    columns = build_columns(problem, factors, every=True)
    calibrator = Calibrator(problem, columns.columns, search.checkers)
    calibrator.learn(search.calibrator)
    rates = {m.name: calibrator.rate(m.name) for m in problem.models}
    return optimise(problem, prune(calibrator.corrected(), problem), rates, kv_bytes(columns, problem))
