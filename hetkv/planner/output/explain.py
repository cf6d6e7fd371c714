"""A plan in sentences: why it won, what disaggregation and mixing are worth, what bounds it, how far to trust it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isinf

import msgspec

from hetkv.costmodel import load_catalogue, model_shape
from hetkv.costmodel.catalogue import VENDORS
from hetkv.costmodel.memory import request_bytes
from hetkv.planner.capacity import Demand
from hetkv.planner.columns import Columns, build_columns, sent
from hetkv.planner.problem import Problem
from hetkv.planner.result import Instances, Option, Plan, Sensitivity, split
from hetkv.planner.traffic import samples
from hetkv.simulator.deployment import build_pools, port_bytes_per_second

NOTHING = 0.005
"""A difference below this share counts as none."""


class PhaseValue(msgspec.Struct, frozen=True):
    """The best a GPU type does in a role: requests/s of one instance in a large pool, and per USD/hour (or per GPU)."""

    model: str
    role: str
    gpu: str
    tp: int
    pp: int
    dp: int
    rate: float
    rate_per_usd: float
    chosen: bool


class LinkUse(msgspec.Struct, frozen=True):
    """KV over the link of one model's deployment: GB/s altogether, and of the busiest sending and receiving port."""

    model: str
    total_gb_s: float
    send_share: float
    receive_share: float
    port_gb_s: float


def vendors(problem: Problem, instances: Iterable[Instances]) -> set[str]:
    """Vendors of the instances' GPUs."""
    catalogue = load_catalogue(problem.catalogue)
    return {catalogue.gpu(i.gpu).vendor for i in instances}


def aggregated(instances: Sequence[Instances]) -> bool:
    """Whether no model is disaggregated."""
    return all(i.role == "aggregated" for i in instances)


def own_option(plan: Plan) -> Option:
    """The plan as one option among the others."""
    return Option("this plan", plan.meets, plan.cost_per_hour, plan.rate, plan.instances, plan.simulated)


def others(plan: Plan) -> list[Option]:
    """Baselines and runners-up, the same deployment only once; the runners-up that are left are numbered from 1."""
    found: dict[tuple[Instances, ...] | str, Option] = {}
    for option in plan.baselines:
        found.setdefault(tuple(option.instances) or option.name, option)
    left = [o for o in plan.runners_up if tuple(o.instances) not in found]
    return [*found.values()] + [msgspec.structs.replace(o, name=f"runner-up {i}") for i, o in enumerate(left, 1)]


def worse_by(plan: Plan, option: Option) -> float | None:
    """How much worse the option is, as a share of the plan: cost above it, or rate below it. None where unknown."""
    if plan.goal == "cost":
        if not plan.cost_per_hour or option.cost_per_hour is None:
            return None
        return option.cost_per_hour / plan.cost_per_hour - 1
    return None if option.rate is None or not plan.rate else 1 - option.rate / plan.rate


def figure(plan: Plan, option: Option) -> str:
    """The figure that the goal is about."""
    if plan.goal == "cost":
        return "no price" if option.cost_per_hour is None else f"{option.cost_per_hour:,.2f} USD/hour"
    return "no rate" if option.rate is None else f"{option.rate:,.3g} requests/s"


def worth(problem: Problem, plan: Plan) -> dict[str, str]:
    """What `disaggregation` and `mixing` are worth, each in a sentence, also where that is nothing."""
    is_split, found = not aggregated(plan.instances), {}
    noun = "disaggregated" if not is_split else "aggregated"
    if problem.roles != "any":
        found["disaggregation"] = f"Only {problem.roles} deployments were asked for."
    else:
        best = _best(plan, lambda o: aggregated(o.instances) == is_split)
        found["disaggregation"] = _sentence(plan, "Disaggregation", is_split, best, noun)
    catalogue = load_catalogue(problem.catalogue)
    offered = {catalogue.gpu(o.gpu).vendor for o in problem.gpus}
    bought = vendors(problem, plan.instances)
    what, kinds = ("vendors", offered) if len(offered) > 1 else ("GPU types", {o.gpu for o in problem.gpus})
    if len(kinds) < 2:
        found["mixing"] = "Only one GPU type is offered: there is nothing to mix."
        return found
    names = (lambda i: vendors(problem, i)) if what == "vendors" else _types
    mixed = len(bought if what == "vendors" else _types(plan.instances)) > 1
    if mixed:
        best = _best(plan, lambda o: len(names(o.instances)) == 1)
        found["mixing"] = _sentence(
            plan, f"Mixing {what}", True, best, "single-vendor" if what == "vendors" else "single-type"
        )
    else:
        (one,) = names(plan.instances)
        text = f"Mixing {what} is worth nothing here: the best plan buys {VENDORS.get(one, one)} alone"
        rest = _best(plan, lambda o: len(names(o.instances)) > 1)
        if rest is not None and (more := worse_by(plan, rest)) is not None:
            text += f"; the best mix found ({split(rest.instances)}) {_comparison(plan, rest, more)}"
        found["mixing"] = text + "."
    return found


def _types(instances: Iterable[Instances]) -> set[str]:
    return {i.gpu for i in instances}


def _best(plan: Plan, of: Callable[[Option], bool]) -> Option | None:
    fit = [o for o in others(plan) if o.feasible and o.instances and of(o)]
    if plan.goal == "cost":
        return min(fit, key=lambda o: o.cost_per_hour or 0.0, default=None)
    return max(fit, key=lambda o: o.rate or 0.0, default=None)


def _sentence(plan: Plan, thing: str, used: bool, rival: Option | None, noun: str) -> str:
    if rival is None:
        if used:
            return f"{thing} makes the plan possible: no {noun} deployment was found that meets the targets."
        return f"{thing} is worth nothing here: no {noun} deployment was found that meets the targets."
    more = worse_by(plan, rival) or 0.0
    text = f"the best {noun} plan ({split(rival.instances)}) {_comparison(plan, rival, more)}"
    if not used or more < NOTHING:
        return f"{thing} is worth nothing here: {text}."
    kind = "less cost" if plan.goal == "cost" else "more requests"
    share = 1 - 1 / (1 + more) if plan.goal == "cost" else 1 / (1 - more) - 1
    return f"{thing} is worth {share:.0%} {kind}: {text}."


def _comparison(plan: Plan, option: Option, more: float) -> str:
    if abs(more) < NOTHING:
        return f"is as good, at {figure(plan, option)}"
    if plan.goal == "cost":
        return f"costs {figure(plan, option)}, {more:.0%} more" if more > 0 else f"costs {figure(plan, option)}"
    return f"serves {figure(plan, option)}, {more:.0%} less" if more > 0 else f"serves {figure(plan, option)}"


def phase_values(problem: Problem, plan: Plan, columns: Columns | None = None) -> list[PhaseValue]:
    """For every model, role and GPU type the instance with the most requests/s for its money, the best first."""
    columns = columns or build_columns(problem)
    best: dict[tuple[str, str, str], PhaseValue] = {}
    for c in columns.columns:
        rate = float(c.rates[-1])
        if rate <= 0:
            continue
        chosen = any((i.model, i.role, i.gpu) == (c.model, c.role, c.gpu) and i.count for i in plan.instances)
        value = PhaseValue(c.model, c.role, c.gpu, c.tp, c.pp, c.dp, rate, rate / (c.price or c.gpus), chosen)
        key = (c.model, c.role, c.gpu)
        if key not in best or value.rate_per_usd > best[key].rate_per_usd:
            best[key] = value
    order = {"prefill": 0, "decode": 1, "aggregated": 2}
    return sorted(best.values(), key=lambda v: (v.model, order[v.role], -v.rate_per_usd))


def link_use(problem: Problem, plan: Plan) -> list[LinkUse]:
    """How much of the KV link each disaggregated deployment needs on average, instances equally loaded per GPU."""
    found = []
    for name, deployment in plan.deployments.items():
        if not deployment.disaggregated:
            continue
        classes = problem.classes_of(name)
        rate = plan.scale * sum(c.rate for c in classes)
        demand = Demand(samples(classes))
        pools = build_pools(deployment)
        total = rate * min(sent(pool.model, demand) for pool in pools)
        port = port_bytes_per_second(deployment)
        ports = {role: sum(p.count for p in pools if p.role == role) for role in ("prefill", "decode")}
        found.append(
            LinkUse(
                name,
                total / 1e9,
                total / ports["prefill"] / port,
                total / ports["decode"] / port,
                port / 1e9,
            )
        )
    return found


class KVSize(msgspec.Struct, frozen=True):
    """KV of a model in bytes, held once: a token in all layers, and by class what a request keeps at its end, on
    average, with windows and states counted as they are.
    """

    model: str
    dtype: str
    bytes_per_token: float
    bytes_per_request: dict[str, float]


def kv_sizes(problem: Problem) -> list[KVSize]:
    """One for each model of the problem."""
    found = []
    for model in problem.models:
        dtype = problem.engine_for(model).kv_dtype
        kv = request_bytes(model_shape(model.name), 1, dtype)
        each = {
            s.spec.name: float(kv.bytes(s.prompts + s.others - 1).mean())
            for s in samples(problem.classes_of(model.name))
        }
        found.append(KVSize(model.name, dtype, kv.token, each))
    return found


def reasons(problem: Problem, plan: Plan) -> list[str]:
    """Why the plan won and what bounds it, one sentence each."""
    found = []
    rivals = [o for o in others(plan) if o.feasible and o.instances and tuple(o.instances) != tuple(plan.instances)]
    ranked = sorted(rivals, key=lambda o: worse_by(plan, o) or 0.0)
    if ranked and (more := worse_by(plan, ranked[0])) is not None:
        best = ranked[0]
        found.append(
            f"Next best of the {len(rivals)} other plans that meet the targets in the simulator: "
            f"{split(best.instances)}, which {_comparison(plan, best, more)}."
        )
    limit = plan.tightest
    found.append(f"Nearest to its limit: {limit.constraint} ({limit.where}), {limit.used:.0%} of it used.")
    for use in link_use(problem, plan):
        verdict = "carries it" if max(use.send_share, use.receive_share) < 1 else "does not carry it"
        found.append(
            f"The KV link {verdict}: {use.total_gb_s:.3g} GB/s altogether, on average {use.send_share:.0%} of a "
            f"sending and {use.receive_share:.0%} of a receiving port of {use.port_gb_s:.3g} GB/s."
        )
    found.append(_bound(plan))
    if plan.simulated_slack is not None:
        found.append(
            f"In the simulator the traffic could grow by {plan.simulated_slack:.0%} before a target is missed."
        )
    found += [_sensitivity(plan, s) for s in plan.sensitivity]
    found += _shifts(plan)
    return found


def _bound(plan: Plan) -> str:
    gap = f"Solver gap {plan.gap:.2%}"
    if not plan.lower_bound or isinf(plan.lower_bound):
        return f"{gap}; with queueing left out no bound is known."
    if plan.goal == "cost" and plan.cost_per_hour:
        above = plan.cost_per_hour / plan.lower_bound - 1
        rest = f", this plan is {above:.0%} above that"
        return f"{gap}; with queueing left out no plan costs less than {plan.lower_bound:,.2f} USD/hour{rest}."
    return f"{gap}; with queueing left out no plan serves more than {plan.lower_bound:,.3g} requests/s."


def _shifts(plan: Plan) -> list[str]:
    """What would flip the choice of vendors, each in a sentence."""
    texts = []
    for shift in plan.shifts:
        slower = shift.factor > 1
        share = (shift.factor if slower else 1 / shift.factor) - 1
        case = f"Were {VENDORS.get(shift.vendor, shift.vendor)} {share:.0%} {'slower' if slower else 'faster'}"
        if shift.flips and shift.vendors:
            option = Option("", True, shift.cost_per_hour, shift.rate)
            bought = " and ".join(VENDORS.get(v, v) for v in shift.vendors)
            texts.append(f"{case}, the choice would flip to {bought}, at {figure(plan, option)}.")
        elif shift.flips:
            texts.append(f"{case}, nothing on offer would meet the targets.")
    if plan.shifts and not texts:
        share = max(s.factor for s in plan.shifts) - 1
        texts = [f"The choice of vendors stands with any one vendor {share:.0%} slower or faster than assumed."]
    return texts


def _sensitivity(plan: Plan, said: Sensitivity) -> str:
    cost, rate = said.cost_per_hour, said.rate
    what = "fast" if said.end == "low" else "slow"
    text = f"Were every step as {what} as the cost model's 90 % interval allows, this plan would "
    text += "meet" if said.meets else "miss"
    text += " its targets"
    if said.why:
        return f"{text}; which plan would be made for that is not known."
    if plan.goal == "cost":
        return text + (
            f", and the plan made for that would cost {cost:,.2f} USD/hour."
            if cost is not None
            else ", and none would meet them."
        )
    return text + (f", and the plan made for that would serve {rate:,.3g} requests/s." if rate is not None else ".")
