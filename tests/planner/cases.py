"""A small problem that plans in about a second, and plans made by hand for what is said about them."""

from __future__ import annotations

from typing import Any

from hetkv.planner.problem import Problem, parse_problem
from hetkv.planner.result import ClassLatency, Instances, Option, Plan, Tightest
from hetkv.planner.slo_checker import deployment

PRICES = {"H100-SXM": 3.5, "MI300X": 1.99}


def small(**changes: Any) -> Problem:
    """One class on one or two GPU types; two instances or so."""
    document = {
        "models": [{"name": "Llama-3.1-8B", "tp": [1], "pp": [1]}],
        "classes": [
            {
                "name": "chat",
                "rate": 4.0,
                "prompt_tokens": "lognormal:800:0.5",
                "output_tokens": "uniform:32:96",
                "ttft_ms": 600,
                "tpot_ms": 40,
                "ttft_percentile": 90,
                "tpot_percentile": 90,
            }
        ],
        "gpus": [
            {"gpu": gpu, "usd_per_gpu_hour": usd, "basis": "on_demand", "as_of": "2026-05"}
            for gpu, usd in PRICES.items()
        ],
        "link": {"gb_s": 25},
    }
    return parse_problem({**document, **changes}, "small")


def some(role: Any, gpu: str, count: int, model: str = "Llama-3.1-8B") -> Instances:
    """`count` instances of one GPU each."""
    return Instances(role, gpu, 1, 1, count, model, 8192, None, PRICES[gpu])


def option(name: str, *instances: Instances, feasible: bool = True) -> Option:
    """An option that costs what its instances do."""
    return Option(name, feasible, sum(i.count * (i.usd_per_hour or 0) for i in instances), 4.0, list(instances))


def plan_of(problem: Problem, *instances: Instances, baselines: tuple[Option, ...] = ()) -> Plan:
    """A plan of these instances that meets its targets."""
    latency = ClassLatency(100.0, 20.0, 600.0, 40.0, 90.0, 90.0)
    cost = sum(i.count * (i.usd_per_hour or 0) for i in instances)
    (model,) = problem.models
    return Plan(
        goal="cost",
        instances=list(instances),
        cost_per_hour=cost,
        rate=4.0,
        scale=1.0,
        gap=0.0,
        lower_bound=0.9 * cost,
        simulated_slack=0.1,
        predicted={"chat": latency},
        simulated={"chat": latency},
        meets=True,
        tightest=Tightest("TPOT p90", "class chat", 0.5),
        baselines=list(baselines),
        runners_up=[],
        sensitivity=[],
        columns_seconds=0.1,
        solve_seconds=0.1,
        verify_seconds=0.1,
        iterations=1,
        deployments={model.name: deployment(problem, model, list(instances))},
    )
