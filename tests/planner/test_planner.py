"""Whole plans: against brute force, the three goals, N+1, caps, pairs, what is said of a plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from hetkv.errors import InfeasibleError
from hetkv.planner.problem import parse_problem
from hetkv.planner.result import Plan, gpus
from hetkv.planner.search import Search
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.solve import solve
from hetkv.simulator.deployment import dump_plan, load_plan
from tests.planner.brute_force import compare
from tests.planner.cases import small

SUBSET = (1000, 1001)
"""Fleets of `bench/planner/optimality.py` that take seconds; others, as fleet 1, take minutes on a busy machine."""
NEAR = 1.05


def problem(**changes: Any) -> Any:
    """One class of short requests for a small model on two GPU types."""
    document: dict[str, Any] = {
        "models": [{"name": "Llama-3.1-8B", "tp": [1, 2], "pp": [1]}],
        "classes": [
            {
                "name": "chat",
                "rate": 12.0,
                "prompt_tokens": "lognormal:800:0.4",
                "output_tokens": "uniform:20:60",
                "ttft_ms": 250,
                "tpot_ms": 25,
            }
        ],
        "gpus": [
            {"gpu": "H100", "usd_per_gpu_hour": 2.5, "basis": "on_demand", "as_of": "2026-05"},
            {"gpu": "MI300X", "usd_per_gpu_hour": 2.0, "basis": "on_demand", "as_of": "2026-05"},
        ],
        "link": {"gb_s": 25},
    }
    return parse_problem({**document, **changes}, "test")


def cost(plan: Plan) -> float:
    assert plan.cost_per_hour is not None
    return plan.cost_per_hour


def check(plan: Plan) -> None:
    """What holds for every plan that meets its targets."""
    assert plan.meets
    assert plan.gap == 0
    assert plan.simulated_slack is not None
    assert plan.simulated_slack >= 0
    assert all(x.used <= 1 for x in plan.simulated.values())
    assert plan.simulated.keys() == plan.predicted.keys()
    if plan.goal == "cost":
        assert plan.lower_bound <= cost(plan) + 1e-9
        assert cost(plan) == pytest.approx(sum(i.count * (i.usd_per_hour or 0) for i in plan.instances))
    else:
        assert plan.lower_bound >= plan.rate - 1e-9


@pytest.fixture(scope="module")
def base() -> Plan:
    return solve(problem())


def test_a_plan_meets_its_targets_and_is_no_dearer_than_its_alternatives(base: Plan) -> None:
    check(base)
    assert {b.name for b in base.baselines} == {"nvidia only", "amd only", "disaggregated only", "aggregated only"}
    for other in [*base.baselines, *base.runners_up]:
        if other.feasible:
            assert other.cost_per_hour is not None
            assert other.cost_per_hour >= cost(base) - 1e-9
        else:
            assert other.why
    low, high = base.sensitivity
    assert (low.end, high.end) == ("low", "high")
    assert low.simulated["chat"].tpot_ms < base.simulated["chat"].tpot_ms < high.simulated["chat"].tpot_ms  # type: ignore[operator]
    assert low.meets
    assert low.cost_per_hour is not None
    assert low.cost_per_hour <= cost(base)
    assert {s.vendor for s in base.shifts} <= {"nvidia", "amd"}
    assert all(s.flips == (set(s.vendors) != base_vendors(base)) for s in base.shifts)


def base_vendors(plan: Plan) -> set[str]:
    return {"amd" if i.gpu.startswith("MI") else "nvidia" for i in plan.instances}


def test_the_best_of_all_plans_that_were_simulated_is_taken(monkeypatch: Any) -> None:
    """A search over all columns that stops at a dear plan gives way to a search over some of them."""
    dear: list[float] = []
    run = Search.run

    def hasty(search: Search) -> Search:
        if dear:
            return run(search)
        found = Search(search.problem, search.found, search.checkers, 200_000, neighbours=False)
        some = run(found).best
        assert some is not None
        search.best = search.trials.simulate({k: 4 * n for k, n in some.counts.items()}, 1.0)
        dear.append(search.best.cost)
        return search

    monkeypatch.setattr(Search, "run", hasty)
    plan = solve(small())
    check(plan)
    assert cost(plan) < dear[0]
    assert cost(plan) == min(b.cost_per_hour for b in plan.baselines if b.feasible and b.cost_per_hour is not None)
    for vendor, gpu in (("nvidia only", "H100-SXM"), ("amd only", "MI300X")):
        (option,) = (b for b in plan.baselines if b.name == vendor)
        assert {i.gpu for i in option.instances} == {gpu}


def test_a_search_that_a_limit_ended_says_which() -> None:
    plan = solve(small(), alternatives=False, events=0)
    assert plan.meets
    assert any("limit of 0 simulated events" in note for note in plan.notes)
    plan = solve(small(), alternatives=False, seconds=0.0)
    assert plan.meets
    assert any("clock stopped the search after 0 s" in note for note in plan.notes)


def test_one_seed_gives_one_plan_on_a_slow_machine_too(base: Plan, monkeypatch: Any) -> None:
    """Where everything takes ten thousand times as long."""
    now = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 10_000 * now())
    slow = solve(problem(), alternatives=False, seconds=1e12)
    assert slow.verify_seconds > 1000
    assert slow.instances == base.instances
    assert slow.simulated == base.simulated
    assert slow.simulated_slack == base.simulated_slack
    assert not any("clock" in note or "limit" in note for note in slow.notes)


def test_why_a_vendor_has_no_plan_is_said_of_its_own_gpus() -> None:
    (chat,) = small().classes
    plan = solve(msgspec.structs.replace(small(), classes=[msgspec.structs.replace(chat, tpot_ms=9.0)]))
    assert {i.gpu for i in plan.instances} == {"H100-SXM"}
    (option,) = (b for b in plan.baselines if b.name == "amd only")
    assert not option.feasible
    assert "9 ms" in option.why
    assert "MI300X" in option.why
    assert "H100" not in option.why


def test_json_is_whole_and_the_deployment_is_one_that_the_simulator_reads(base: Plan, tmp_path: Any) -> None:
    document = base.as_json()
    for key in (
        *("instances", "cost_per_hour", "gap", "lower_bound", "simulated_slack", "predicted", "simulated", "baselines"),
        *("columns_seconds", "solve_seconds", "verify_seconds", "iterations"),
    ):
        assert key in document
    assert {"role", "gpu", "tp", "pp", "count"} <= document["instances"][0].keys()
    deployment = base.deployments["Llama-3.1-8B"]
    (tmp_path / "plan.yaml").write_text(dump_plan(deployment))
    again = load_plan(tmp_path / "plan.yaml")
    assert again == deployment
    assert sum(p.count for p in again.pools) == sum(i.count for i in base.instances)


def test_more_rate_and_tighter_targets_cost_more() -> None:
    def at(rate: float, tpot: float) -> float:
        asked = problem()
        asked = msgspec.structs.replace(
            asked, classes=[msgspec.structs.replace(asked.classes[0], rate=rate, tpot_ms=tpot)]
        )
        plan = solve(asked, alternatives=False)
        check(plan)
        return cost(plan)

    assert at(6.0, 25.0) <= at(24.0, 25.0) <= at(24.0, 15.0)


def test_goodput_spends_the_budget_and_split_the_fleet() -> None:
    goal = {"goal": "goodput", "budget_usd_per_hour": 7.5}
    models = [{"name": "Llama-3.1-8B", "tp": [1], "pp": [1]}]
    plan = solve(problem(objective=goal, models=models), alternatives=False)
    check(plan)
    assert 0 < cost(plan) <= 7.5
    gpus = [{"gpu": "H100", "cap": 3}, {"gpu": "MI300X", "cap": 0}]
    split = solve(problem(objective={"goal": "split"}, gpus=gpus, models=models), alternatives=False)
    check(split)
    assert split.cost_per_hour is None
    assert sum(i.count * i.gpus for i in split.instances) <= 3
    assert {i.gpu for i in split.instances} == {"H100-SXM"}
    assert split.rate == pytest.approx(plan.rate, rel=0.25)  # 7.5 USD are three H100


def test_one_spare_instance_keeps_the_targets_when_any_is_down(base: Plan) -> None:
    asked = problem(spare_instances=1)
    plan = solve(asked, alternatives=False)
    check(plan)
    assert cost(plan) > cost(base)
    checker = SloChecker(asked, asked.models[0])
    for down in range(len(plan.instances)):
        left = [msgspec.structs.replace(i, count=i.count - (n == down)) for n, i in enumerate(plan.instances)]
        assert checker([i for i in left if i.count], 1.0).meets


def test_caps_and_nodes_are_kept() -> None:
    gpus = [
        {"gpu": "H100", "usd_per_gpu_hour": 2.5, "basis": "on_demand", "as_of": "2026-05", "rent": "node"},
        {"gpu": "MI300X", "usd_per_gpu_hour": 2.0, "basis": "on_demand", "as_of": "2026-05", "cap": 1},
    ]
    plan = solve(problem(gpus=gpus), alternatives=False)
    assert plan.meets
    used = {g: sum(i.count * i.gpus for i in plan.instances if i.gpu == g) for g in ("H100-SXM", "MI300X")}
    assert used["MI300X"] <= 1
    assert cost(plan) == pytest.approx(20.0 * -(-used["H100-SXM"] // 8) + 2.0 * used["MI300X"])


def test_two_models_share_a_cap() -> None:
    classes = [
        msgspec.structs.replace(problem().classes[0], name=n, model=m, rate=4.0)
        for n, m in (("a", "Llama-3.1-8B"), ("b", "Qwen3-8B"))
    ]
    asked = problem(
        models=[{"name": "Llama-3.1-8B", "tp": [1], "pp": [1]}, {"name": "Qwen3-8B", "tp": [1], "pp": [1]}],
        classes=msgspec.to_builtins(classes),
    )
    plan = solve(asked, alternatives=False)
    check(plan)
    assert plan.deployments.keys() == {"Llama-3.1-8B", "Qwen3-8B"}
    assert {i.model for i in plan.instances} == plan.deployments.keys()
    one = [msgspec.structs.replace(o, cap=1 if o.gpu == "H100-SXM" else 0) for o in asked.gpus]
    with pytest.raises(InfeasibleError, match="GPU caps"):
        solve(msgspec.structs.replace(asked, gpus=one))


def test_small_fleets_are_as_cheap_as_brute_force_finds() -> None:
    near(SUBSET)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_small_fleets_200() -> None:
    near(range(200))


def test_a_decode_pool_that_holds_after_its_own_prefill_alone_is_found():
    # After the strongest prefill pool it uses 1.005 of its TPOT, after the plan's own 0.996.
    found = compare(22)
    assert found["meets"]
    assert found["ratio"] <= NEAR


def test_a_load_of_four_h100_asks_for_one_node_of_mi300x() -> None:
    """It was said to ask for 14 of them, 20 before that: prompts were charged at the rate of few rows."""
    asked = problem(
        models=[{"name": "Llama-3-70B", "tp": [2, 4, 8], "pp": [1]}],
        classes=[{"name": "chat", "rate": 1.5, "prompt_tokens": "lognormal:1024:0.8",
                  "output_tokens": "geometric:256", "ttft_ms": 1000, "tpot_ms": 50}],
        gpus=[{"gpu": "MI300X", "usd_per_gpu_hour": 1.99, "basis": "on_demand", "as_of": "2026-05"}],
        link={"gb_s": "nic"},
    )  # fmt: skip
    plan = solve(asked, alternatives=False)
    assert plan.meets
    assert gpus(plan.instances) <= 8


def near(seeds: Sequence[int]) -> None:
    """Every plan meets its targets in the simulator; 95 % cost at most 1.05 times the optimum."""
    from joblib import Parallel, delayed

    rows = [r for r in Parallel(n_jobs=2)(delayed(compare)(s) for s in seeds) if r["optimum"] is not None]
    assert len(rows) >= 0.8 * len(seeds)
    assert [r for r in rows if not r["meets"]] == []
    assert sum(r["ratio"] <= NEAR for r in rows) >= 0.95 * len(rows)
