"""Why no plan exists: the constraint that stands nearest in the way, in one line."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from hetkv.errors import InfeasibleError, UndecidedError
from hetkv.planner.capacity import prompt_times
from hetkv.planner.columns import Column, Columns, build_columns, kv_bytes
from hetkv.planner.milp import optimise
from hetkv.planner.power import limits_of, paid_gpus
from hetkv.planner.problem import Limits, Problem
from hetkv.planner.result import Tightest

FREE = 1e12
"""A target, in ms, that never binds."""


def explain(problem: Problem, found: Columns) -> InfeasibleError:
    """The error to raise for a problem whose program has no solution."""
    for model in problem.models:
        mine = [c for c in found.columns if c.model == model.name and c.rates.max() > 0]
        roles = {c.role for c in mine}
        if not ({"prefill", "decode"} <= roles or "aggregated" in roles):
            return _no_columns(problem, model.name)
    return _shared(problem, found)


def _no_columns(problem: Problem, model: str) -> InfeasibleError:
    """No size of any GPU serves this model: memory, or a target below what the fastest one needs."""
    free = [msgspec.structs.replace(c, ttft_ms=FREE, tpot_ms=FREE) for c in problem.classes]
    loose = build_columns(msgspec.structs.replace(problem, classes=free, roles="disaggregated"))
    mine = [c for c in loose.columns if c.model == model]
    if not mine:
        return _nothing_tried(loose, model)
    worst: tuple[float, str, str, str] | None = None
    for i, sample in enumerate(loose.demands[model].samples):
        spec = problem.classes_of(model)[i]
        times = [
            (float(np.quantile(_service(c, loose, i), spec.ttft_percentile / 100)), c)
            for c in mine
            if c.role == "prefill"
        ]
        first, column = min(times, key=lambda t: t[0])
        context = float(np.mean(sample.prompts + sample.others / 2))
        steps = [(c.steps.step_seconds(1, context), c) for c in mine if c.role == "decode"]
        step, other = min(steps, key=lambda t: t[0])
        for name, need, limit, percentile, where in (
            ("TTFT", first, spec.ttft_ms / 1e3, spec.ttft_percentile, column),
            ("TPOT", step, spec.tpot_ms / 1e3, spec.tpot_percentile, other),
        ):
            text = (
                f"{name} of class {spec.name}: {limit * 1e3:g} ms at p{percentile:g} is asked, and the fastest "
                f"instance, {where}, takes {need * 1e3:.3g} ms for a request alone"
            )
            if worst is None or need / limit > worst[0]:
                worst = need / limit, f"{name}", f"class {spec.name}", text
    assert worst is not None
    used, constraint, where_text, text = worst
    return _error(constraint, where_text, used, text)


def _nothing_tried(loose: Columns, model: str) -> InfeasibleError:
    """No size was left to try: the reason of the one that came furthest."""
    reasons = [why for where, why in loose.rejected.items() if where.startswith(f"{model} on ")]
    for constraint, what in (
        ("memory: ", f"{model} fits on none of the offered GPUs"),
        ("cannot be started: ", f"{model} can be started on none of the offered GPUs"),
        ("", f"{model} has no size to try on the offered GPUs"),
    ):
        found = [why.removeprefix(constraint) for why in reasons if why.startswith(constraint)]
        if found:
            name = constraint.removesuffix(": ") or "sizes"
            return _error(name, f"model {model}", float("inf"), f"{what}: {found[-1]}")
    return _error("GPU cap", f"model {model}", float("inf"), "every offered GPU has the cap 0")


def _service(column: Column, found: Columns, index: int) -> NDArray[np.float64]:
    prompts = [s.prompts for s in found.demands[column.model].samples]
    return prompt_times(column.steps, prompts, column.budget * column.dp).latency[index]


def _shared(problem: Problem, found: Columns) -> InfeasibleError:
    """Every model could be served alone: caps, the fabric, pair limits or the budget are in the way. Lift each."""
    rates = {m.name: sum(c.rate for c in problem.classes_of(m.name)) for m in problem.models}
    sent = kv_bytes(found, problem)
    if problem.objective.budget_usd_per_hour is not None:
        found_error = _budget(problem, found, rates, sent)
        if found_error is not None:
            return found_error
    lifted = {
        "limits": msgspec.structs.replace(problem, limits=Limits()),
        "pair limits": msgspec.structs.replace(problem, pair_limits=[]),
        "KV fabric": msgspec.structs.replace(problem, link=msgspec.structs.replace(problem.link, fabric_gb_s=None)),
        "GPU caps": msgspec.structs.replace(
            problem, gpus=[msgspec.structs.replace(o, cap=None if o.cap else o.cap) for o in problem.gpus]
        ),
    }
    by_key = {c.key: c for c in found.columns}
    for name, other in lifted.items():
        if other == problem:
            continue
        try:
            solution = optimise(other, found.columns, rates, sent)
        except UndecidedError:
            continue
        if solution is None:
            continue
        if name == "limits":
            gpus: dict[str, int] = {}
            for key, n in solution.counts.items():
                gpus[by_key[key].gpu] = gpus.get(by_key[key].gpu, 0) + n * by_key[key].gpus
            paid = paid_gpus(problem, gpus)
            limit = max(limits_of(problem), key=lambda x: x.taken(paid) / x.most)
            text = f"{limit.name}: without the limit the plan takes {limit.taken(paid):.4g} {limit.unit}, "
            text += f"{limit.most:g} are allowed"
            return _error(f"{limit.name} limit", "limits", limit.taken(paid) / limit.most, text)
        if name == "GPU caps":
            need: dict[str, int] = {}
            for key, n in solution.counts.items():
                need[by_key[key].gpu] = need.get(by_key[key].gpu, 0) + n * by_key[key].gpus
            over = {g: n for g, n in need.items() if (problem.offer(g).cap or n) < n}
            gpu, n = max(over.items(), key=lambda item: item[1] / (problem.offer(item[0]).cap or 1))
            cap = problem.offer(gpu).cap or 0
            text = f"GPU caps: without them the plan takes {n} x {gpu}, {cap} are offered"
            return _error("GPU cap", gpu, n / cap if cap else float("inf"), text)
        if name == "KV fabric":
            rate = sum(rates[m] * sent[m] for m in rates) / 1e9
            room = problem.link.fabric_gb_s or 0.0
            text = f"KV fabric: prompts send about {rate:.3g} GB/s, `fabric_gb_s` is {room:g}"
            return _error("KV fabric", "link", rate / room, text)
        return _error("pair limits", "pair_limits", float("inf"), "pair limits: without them a plan exists")
    return _error(
        "several",
        "problem",
        float("inf"),
        "caps, fabric, pair limits and limits on power or carbon together leave no plan",
    )


def _budget(
    problem: Problem, found: Columns, rates: dict[str, float], sent: dict[str, float]
) -> InfeasibleError | None:
    """The budget does not buy one instance of everything that is needed: what the cheapest such plan costs."""
    budget = problem.objective.budget_usd_per_hour or 0.0
    little = {model: 1e-6 * rate for model, rate in rates.items()}
    free = msgspec.structs.replace(problem, objective=problem.objective.for_cost())
    try:
        solution = optimise(free, found.columns, little, sent)
    except UndecidedError:
        return None
    if solution is None or solution.value <= budget:
        return None
    text = f"budget: the cheapest plan for any traffic costs {solution.value:,.2f} USD/hour, {budget:,.2f} may be spent"
    return _error("budget", "objective", solution.value / budget, text)


def _error(constraint: str, where: str, used: float, text: str) -> InfeasibleError:
    return InfeasibleError(f"no plan: the tightest constraint is {text}", Tightest(constraint, where, used))
