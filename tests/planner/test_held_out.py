"""A plan holds on seeds that chose nothing, and the result says on which and how surely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetkv.planner.attainment import CONFIDENCE, attainment, expected
from hetkv.planner.columns import build_columns
from hetkv.planner.milp import optimise
from hetkv.planner.problem import Problem, load_problem, parse_problem
from hetkv.planner.result import ClassLatency, Plan
from hetkv.planner.seeds import choosing_seeds, held_out_seeds
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.solve import solve
from hetkv.planner.trials import Candidate, Judgement, Trials
from tests.planner.brute_force import random_problem
from tests.planner.cases import small

ROOT = Path(__file__).parents[2]
OTHERS = range(7_000_000, 7_000_008)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return solve(random_problem(3), alternatives=False)


def test_no_seed_both_chooses_and_judges() -> None:
    choose = set(choosing_seeds(11, 4))
    blocks = [set(held_out_seeds(11, attempt, 8)) for attempt in range(3)]
    assert all(not choose & block for block in blocks)
    assert len(set().union(*blocks)) == 24


def test_a_plan_says_what_held_out_seeds_say(plan: Plan) -> None:
    assert plan.meets
    assert len(plan.held_out_seeds) >= 3
    assert plan.attained.keys() == plan.simulated.keys()
    for targets in plan.attained.values():
        for one in targets.values():
            assert one.confidence == CONFIDENCE
            assert one.low <= one.share <= one.high
            assert one.holds


def test_a_plan_holds_under_other_seeds_too(plan: Plan) -> None:
    """On average over eight seeds that neither chose nor judged it, each target is met."""
    problem = random_problem(3)
    checker = SloChecker(problem, problem.models[0])
    verdicts = [checker(plan.instances, 1.0, seed=seed) for seed in OTHERS]
    for spec in problem.classes:
        for target, percentile in (("ttft", spec.ttft_percentile), ("tpot", spec.tpot_percentile)):
            assert np.mean([v.within[spec.name, target] for v in verdicts]) >= percentile / 100 - 0.002


def test_another_seed_stays_below_what_is_expected() -> None:
    """Of eight draws of one normal distribution, another one exceeds the bound one time in twenty."""
    random, over = np.random.default_rng(1), 0
    for _ in range(2000):
        draws = random.normal(100, 5, 5)
        rows = [{"c": ClassLatency(float(x), None, 120, 50, 99, 99)} for x in draws[:4]]
        bound = expected(rows)["c"].ttft_ms
        assert bound is not None
        over += draws[4] > bound
    assert over / 2000 == pytest.approx(1 - CONFIDENCE, abs=0.015)


@pytest.mark.parametrize(
    ("shares", "holds"),
    [([0.995] * 8, True), ([0.985] * 8, False), ([0.9901, 0.9899] * 4, False), ([0.999, 0.985] + [0.998] * 6, True)],
)
def test_an_interval_decides(shares: list[float], holds: bool) -> None:
    assert attainment(shares, 99.0).holds is holds


def test_different_aggregated_instances_are_one_pool() -> None:
    """One H100 carries 8 requests/s and one A10G 1: for 8.5 an H100 and an A10G are cheaper than two H100."""
    problem = mixed()
    columns = build_columns(problem).columns
    best = {g: max(float(c.rates[0]) for c in columns if c.gpu == g) for g in ("H100-SXM", "L4")}
    rate = best["H100-SXM"] + 0.4 * best["L4"]
    found = optimise(problem, columns, {"Llama-3.1-8B": rate}, {"Llama-3.1-8B": 1e8})
    assert found is not None
    assert {key[2] for key in found.counts} == {"H100-SXM", "L4"}
    alone = [c for c in columns if c.gpu == "H100-SXM"]
    dearer = optimise(problem, alone, {"Llama-3.1-8B": rate}, {"Llama-3.1-8B": 1e8})
    assert dearer is not None
    assert found.value < dearer.value


def mixed(**changes: Any) -> Problem:
    offers = [
        {"gpu": gpu, "usd_per_gpu_hour": usd, "basis": "on_demand", "as_of": "2026-05"}
        for gpu, usd in {"H100-SXM": 3.5, "L4": 0.7}.items()
    ]
    slow = {"ttft_ms": 6000, "tpot_ms": 150, "ttft_percentile": 90, "tpot_percentile": 90}
    spec = {"name": "chat", "rate": 1.0, "prompt_tokens": "lognormal:800:0.5", "output_tokens": "uniform:32:96", **slow}
    document = {
        "models": [{"name": "Llama-3.1-8B", "tp": [1], "pp": [1]}],
        "classes": [spec],
        "gpus": offers,
        "link": {"gb_s": 25},
        "roles": "aggregated",
    }
    return parse_problem({**document, **changes}, "mixed")


def test_a_mixed_aggregated_plan_shares_the_requests_by_what_each_carries() -> None:
    problem = mixed()
    columns = build_columns(problem).columns
    best = {g: max(float(c.rates[0]) for c in columns if c.gpu == g) for g in ("H100-SXM", "L4")}
    spec = {**{k: getattr(problem.classes[0], k) for k in problem.classes[0].__struct_fields__}}
    spec["rate"] = best["H100-SXM"] + 0.4 * best["L4"]
    plan = solve(mixed(classes=[spec]), alternatives=False)
    assert plan.meets
    (deployment,) = plan.deployments.values()
    if len(plan.instances) > 1:
        assert deployment.routing.prefill == "weighted"
        assert max(p.weight for p in deployment.pools) == 1.0 > min(p.weight for p in deployment.pools)


def test_a_small_problem_is_chosen_by_several_seeds() -> None:
    plan = solve(small(), alternatives=False)
    assert plan.meets
    assert min(one.worst for targets in plan.attained.values() for one in targets.values()) > 0.85


def test_a_plan_that_fails_on_every_block_of_held_out_seeds_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged with ten times the traffic, no plan that the choosing seeds pass holds, and the result says so."""
    judge = Trials.judge

    def harder(trials: Trials, candidate: Candidate, attempt: int) -> Judgement:
        return judge(trials, replace(candidate, scale=10 * candidate.scale), attempt)

    monkeypatch.setattr(Trials, "judge", harder)
    plan = solve(small(), alternatives=False)
    assert not plan.meets
    assert plan.simulated_slack is None
    assert plan.judged_before >= 1
    assert any("on held-out seeds" in note for note in plan.notes)


def test_no_plan_that_failed_on_held_out_seeds_is_said_to_meet() -> None:
    """Of this example cheaper plans held on the seeds that chose, and not on those that judged."""
    plan = solve(load_problem(ROOT / "docs" / "examples" / "llama-2-7b.yaml"))
    assert plan.meets
    assert plan.judged_before > 0
    options = [option for option in (*plan.baselines, *plan.runners_up) if option.feasible]
    assert options
    assert all(option.cost_per_hour >= plan.cost_per_hour - 1e-9 for option in options)
