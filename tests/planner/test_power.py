"""Power and carbon: the user's figures, limits that hold, and words for those that cannot."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from hetkv.errors import InfeasibleError, InputError
from hetkv.planner.columns import build_columns
from hetkv.planner.frontier import frontier
from hetkv.planner.output import terminal
from hetkv.planner.power import limits_of, paid_gpus, total
from hetkv.planner.prune import dominates
from hetkv.planner.solve import solve
from tests.planner.cases import PRICES, small

WATTS = {"H100-SXM": 1000, "MI300X": 2000}
CO2 = {"H100-SXM": 100, "MI300X": 400}


def powered(figures=("watts_per_gpu", "co2_g_per_kwh"), **changes):
    gpus = [
        {"gpu": gpu, "usd_per_gpu_hour": usd, "basis": "on_demand", "as_of": "2026-05"} for gpu, usd in PRICES.items()
    ]
    for name, values in (("watts_per_gpu", WATTS), ("co2_g_per_kwh", CO2)):
        for offer in gpus if name in figures else ():
            offer[name] = values[offer["gpu"]]
    return small(gpus=gpus, **changes)


def kinds(plan):
    return {i.gpu for i in plan.instances}


def test_a_plan_says_what_it_draws():
    problem = powered()
    plan = solve(problem, alternatives=False)
    gpus = {gpu: sum(i.count * i.gpus for i in plan.instances if i.gpu == gpu) for gpu in kinds(plan)}
    assert plan.kw == pytest.approx(sum(n * WATTS[g] / 1e3 for g, n in gpus.items()))
    assert plan.co2_kg_per_hour == pytest.approx(sum(n * WATTS[g] * CO2[g] / 1e6 for g, n in gpus.items()))
    console = Console(file=StringIO(), width=200)
    terminal.show(console, problem, plan)
    assert f"{plan.kw:.3g} kW, {plan.co2_kg_per_hour:.3g} kg CO2/hour" in " ".join(console.file.getvalue().split())


@pytest.mark.parametrize(("limit", "unit"), [("kw", "kw"), ("co2_kg_per_hour", "co2_kg_per_hour")])
def test_a_limit_buys_the_dearer_plan_that_keeps_it(limit, unit):
    free = solve(powered(), alternatives=False)
    assert kinds(free) == {"MI300X"}  # the cheapest, and the one that draws most
    most = 0.75 * getattr(free, unit)
    plan = solve(powered(limits={limit: most}), alternatives=False)
    assert plan.meets
    assert getattr(plan, unit) <= most
    assert plan.cost_per_hour > free.cost_per_hour
    assert kinds(plan) == {"H100-SXM"}


@pytest.mark.parametrize("objective", [{"usd_per_kwh": 5.0}, {"usd_per_kg_co2": 10.0}])
def test_a_price_of_power_or_carbon_moves_the_choice(objective):
    problem = powered(objective=objective)
    plan = solve(problem, alternatives=False)
    assert plan.meets
    assert kinds(plan) == {"H100-SXM"}  # MI300X is the cheapest without that price
    count = sum(i.count * i.gpus for i in plan.instances)
    each = PRICES["H100-SXM"] + objective.get("usd_per_kwh", 0) * 1.0 + objective.get("usd_per_kg_co2", 0) * 0.1
    assert plan.cost_per_hour == pytest.approx(count * each)
    assert plan.cost_per_hour == pytest.approx(sum(i.count * i.usd_per_hour for i in plan.instances))
    assert plan.lower_bound <= plan.cost_per_hour


def test_the_frontier_keeps_the_prices_of_power():
    found = frontier(powered(objective={"usd_per_kwh": 5.0}), [1.0], [1.0], jobs=1)
    costs = {p.fleet: p.cost_per_hour for p in found.rates}
    assert costs["NVIDIA only"] == costs["mixed"] < costs["AMD only"]


def test_the_goal_goodput_keeps_a_limit():
    objective = {"goal": "goodput", "budget_usd_per_hour": 20.0}
    plan = solve(powered(objective=objective, limits={"kw": 2.5}), alternatives=False)
    assert plan.kw is not None
    assert plan.kw <= 2.5


def test_a_limit_that_leaves_no_plan_is_named():
    with pytest.raises(InfeasibleError, match=r"power: without the limit the plan takes .* kW, 0.5 are allowed"):
        solve(powered(limits={"kw": 0.5}), alternatives=False)
    with pytest.raises(InfeasibleError, match=r"carbon: .* kg CO2/hour, 0.01 are allowed"):
        solve(powered(limits={"co2_kg_per_hour": 0.01}), alternatives=False)


def test_figures_that_a_limit_needs_are_asked_for():
    with pytest.raises(InputError, match=r"gpus\[0\] \(H100-SXM\): missing `watts_per_gpu` for the limit `kw`"):
        powered(figures=(), limits={"kw": 5})
    with pytest.raises(InputError, match=r"missing `co2_g_per_kwh` for the limit `co2_kg_per_hour`"):
        powered(figures=("watts_per_gpu",), limits={"co2_kg_per_hour": 5})
    with pytest.raises(InputError, match="missing `co2_g_per_kwh` for `usd_per_kg_co2`"):
        powered(figures=("watts_per_gpu",), objective={"usd_per_kg_co2": 1})
    with pytest.raises(InputError, match="`usd_per_kwh` must be 0 or more"):
        powered(objective={"usd_per_kwh": -1})
    with pytest.raises(InputError, match="limits: `kw`"):
        powered(limits={"kw": 0})


def test_without_figures_nothing_is_said():
    problem = powered(figures=())
    assert total(problem, {"H100-SXM": 2}, "power") is None
    assert total(powered(figures=("watts_per_gpu",)), {"H100-SXM": 2}, "power") == 2.0
    assert total(powered(figures=("watts_per_gpu",)), {"H100-SXM": 2}, "carbon") is None


def test_rented_nodes_count_whole():
    gpus = [
        {"gpu": "H100-SXM", "usd_per_gpu_hour": 3.5, "basis": "on_demand", "as_of": "2026-05"},
    ]
    gpus[0] |= {"rent": "node", "watts_per_gpu": 1000}
    problem = small(gpus=gpus, limits={"kw": 7.9})
    assert paid_gpus(problem, {"H100-SXM": 3}) == {"H100-SXM": 8}
    (limit,) = limits_of(problem)
    assert not limit.keeps({"H100-SXM": 8})
    with pytest.raises(InfeasibleError, match=r"the plan takes 8 kW, 7.9 are allowed"):
        solve(problem, alternatives=False)


def test_a_cheaper_type_that_draws_more_does_not_rule_another_out():
    problem = powered()
    columns = build_columns(problem, every=True).columns
    pairs = [(a, b) for a in columns for b in columns if (a.gpu, b.gpu) == ("MI300X", "H100-SXM")]
    pairs = [(a, b) for a, b in pairs if dominates(a, b, problem)]
    assert pairs
    limited = powered(limits={"kw": 100})
    assert not any(dominates(a, b, limited) for a, b in pairs)
