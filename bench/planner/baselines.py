"""The field's methods compared with the planner, on the small random fleets of the optimality harness.

    python bench/planner/baselines.py --json bench/results/planner_baselines.json [--fleets 40] [--jobs N]
        [--resume] [--minutes M] [--aic-python PYTHON [--aic-fleets 6]]

Every plan is judged by the same simulator. A method's plan may miss a target there; then it is also asked for more rate
until its plan meets them (`repaired`). `--aic-python` names an interpreter that has the package `aiconfigurator`: the
tool itself then takes part on the first `--aic-fleets` fleets (20 to 60 s each), where it covers the GPUs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


def compare(seed: int, python: str | None) -> dict[str, Any]:
    """One fleet: the planner's plan and every method's."""
    from hetkv.errors import InputError, NotCoveredError
    from hetkv.planner import baselines
    from hetkv.planner.baselines.aic_tool import AicTool
    from hetkv.planner.solve import solve
    from tests.planner.brute_force import random_problem

    problem = random_problem(seed)
    row: dict[str, Any] = {
        "seed": seed,
        "model": problem.models[0].name,
        "gpus": [o.gpu for o in problem.gpus],
        "classes": len(problem.classes),
        "link_gb_s": problem.link.gb_s,
        "methods": {},
    }
    begin = time.perf_counter()
    try:
        plan = solve(problem, alternatives=False)
        ours = plan.cost_per_hour if plan.meets else None
        row["planner"] = {"cost": plan.cost_per_hour, "meets": plan.meets}
    except InputError as error:
        ours, row["planner"] = None, {"cost": None, "meets": False, "why": str(error)}
    row["planner"]["seconds"] = round(time.perf_counter() - begin, 3)
    profile = None
    for name, make in baselines.METHODS.items():
        begin = time.perf_counter()
        if name == "distserve-mixed":  # the same simulations as without mixing
            sizer, seconds = profile.also_mixed(), row["methods"]["distserve"]["seconds"]
        else:
            sizer, seconds = make(problem), 0.0
        if name == "distserve":
            profile = sizer
        row["methods"][name] = measure(name, problem, sizer, ours, begin, seconds)
    if python:
        begin = time.perf_counter()
        try:
            tool = AicTool(problem, python)
            row["methods"]["aiconfigurator-tool"] = measure("aiconfigurator-tool", problem, tool, ours, begin, 0.0)
            row["methods"]["aiconfigurator-tool"] |= {"version": tool.version, "uncovered": tool.uncovered}
        except NotCoveredError as error:
            row["methods"]["aiconfigurator-tool"] = {"not_covered": str(error)}
    return row


def measure(name: str, problem: Any, sizer: Any, ours: float | None, begin: float, more: float) -> dict[str, Any]:
    """A method's plan: its cost, whether it holds, the seconds of profile and sizing, and what repairing it costs."""
    from hetkv.planner import baselines

    instances = sizer(1.0)
    seconds = more + time.perf_counter() - begin
    option = baselines.judged(name, problem, instances, 1.0, seconds)
    found: dict[str, Any] = {
        "cost": option.cost_per_hour,
        "meets": option.feasible,
        "why": option.why,
        "seconds": round(seconds, 3),
        "instances": [f"{i.count} {i.role} {i.gpu} tp{i.tp}" for i in option.instances],
    }
    again = (1.0, option) if option.feasible else baselines.repaired(name, problem, sizer)
    if again:
        found |= {"repair_factor": again[0], "repaired_cost": again[1].cost_per_hour}
    if ours:
        found["ratio"] = round(option.cost_per_hour / ours, 4) if option.feasible and option.cost_per_hour else None
        found["repaired_ratio"] = round(again[1].cost_per_hour / ours, 4) if again and again[1].cost_per_hour else None
    return found


def main() -> int:
    from rows import add_arguments
    from rows import measure as measure_all

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, default=40)
    parser.add_argument("--aic-python", metavar="PYTHON")
    parser.add_argument("--aic-fleets", type=int, default=6)
    add_arguments(parser)
    args = parser.parse_args()
    tasks = [(seed, args.aic_python if seed < args.aic_fleets else None) for seed in range(args.fleets)]
    measure_all(compare, tasks, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
