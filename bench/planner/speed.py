"""Seconds to plan 5 GPU types of 10,000 GPUs each for 4 classes, over random rates and targets.

    python bench/planner/speed.py --json bench/results/planner_speed.json [--problems 20] [--jobs 1] [--resume]
        [--model DeepSeek-V3]

Seconds of columns and program are of CPU time, those of verification of the clock: with several at once (`--jobs`) the
latter mean something only where each process has a core to itself. DeepSeek-V3 has columns of attention replicas.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from hetkv.planner.problem import Problem, parse_problem
from hetkv.planner.solve import solve

GPUS = {"H100-SXM": 2.5, "MI300X": 2.0, "A100-80-SXM": 1.3, "B200-SXM": 4.9, "L40S": 0.9}
CAP = 10_000
MODELS: dict[str, dict[str, Any]] = {"Llama-3.1-70B": {}, "DeepSeek-V3": {"name": "sglang", "weight_dtype": "fp8"}}
"""The engine settings of each model. SGLang starts attention replicas that are disaggregated; an A100 has no FP8."""
CLASSES = (
    ("chat", "lognormal:1024:0.8", "geometric:256"),
    ("code", "lognormal:2048:0.8", "geometric:64"),
    ("documents", "lognormal:6000:0.5", "geometric:300"),
    ("agents", "uniform:500:3000", "geometric:500"),
)


def random_problem(seed: int, model: str = "Llama-3.1-70B") -> Problem:
    """Rates of 500 to 8000 requests/s a class; TTFT 1 to 4 s, documents 4 to 8 s; TPOT 40 to 120 ms; p90 to p99."""
    random = np.random.default_rng([10_000, seed])
    classes = []
    for name, prompts, outputs in CLASSES:
        low, high = (4000, 8000) if name == "documents" else (1000, 4000)
        classes.append(
            {
                "name": name,
                "rate": round(float(np.exp(random.uniform(np.log(500), np.log(8000)))), 1),
                "prompt_tokens": prompts,
                "output_tokens": outputs,
                "ttft_ms": round(float(random.uniform(low, high))),
                "tpot_ms": round(float(random.uniform(40, 120))),
                "ttft_percentile": float(random.choice([90, 95, 99])),
                "tpot_percentile": float(random.choice([90, 95, 99])),
            }
        )
    gpus = [
        {
            "gpu": name,
            "usd_per_gpu_hour": round(price * float(random.uniform(0.7, 1.4)), 2),
            "basis": "on_demand",
            "as_of": "2026-05",
            "cap": CAP,
            "engine": {"weight_dtype": "int8"} if name.startswith("A100") and MODELS[model] else {},
        }
        for name, price in GPUS.items()
    ]
    document = {"models": [{"name": model}], "classes": classes, "gpus": gpus, "engine": MODELS[model]}
    return parse_problem(document, f"seed {seed}")


def measure(seed: int, model: str = "Llama-3.1-70B") -> dict[str, Any]:
    """One problem's times, and what came out."""
    plan = solve(random_problem(seed, model), alternatives=False)
    return {
        "seed": seed,
        "model": model,
        "program_seconds_of": "cpu",
        "columns_seconds": plan.columns_seconds,
        "solve_seconds": plan.solve_seconds,
        "verify_seconds": plan.verify_seconds,
        "iterations": plan.iterations,
        "events": plan.events,
        "notes": [n for n in plan.notes if "search" in n],
        "gap": plan.gap,
        "meets": plan.meets,
        "rate": plan.rate,
        "cost_per_hour": plan.cost_per_hour,
        "lower_bound": plan.lower_bound,
        "simulated_slack": plan.simulated_slack,
        "gpus": sum(i.count * i.gpus for i in plan.instances),
        "plan": [f"{i.count} {i.role} {i.gpu} tp{i.tp} pp{i.pp} dp{i.dp}" for i in plan.instances],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of the rows."""
    worst = {key: max(r[key] for r in rows) for key in ("columns_seconds", "solve_seconds", "verify_seconds", "gap")}
    worst["columns_and_solve_seconds"] = max(r["columns_seconds"] + r["solve_seconds"] for r in rows)
    worst["all_meet"] = all(r["meets"] for r in rows)
    return worst


def main() -> int:
    from rows import add_arguments
    from rows import measure as measure_all

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-70B")
    add_arguments(parser, jobs=1)
    args = parser.parse_args()
    rows = measure_all(measure, [(seed, args.model) for seed in range(args.problems)], args, summary, name="problems")
    for key, value in (found := summary(rows)).items():
        print(f"{key}: {value}")
    return 0 if found["all_meet"] and len(rows) == args.problems else 1


if __name__ == "__main__":
    sys.exit(main())
