"""The planner against brute force in the simulator, on random small fleets.

    python bench/planner/optimality.py --json bench/results/planner_optimality.json [--fleets 200] [--jobs 2]
        [--resume]

Exits 1 where a plan misses a target in the simulator, or fewer than 95 % cost at most 1.05 times the optimum.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

WITHIN, SHARE = 1.05, 0.95


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the fleets that have a plan at all."""
    solved = [r for r in rows if r["optimum"] is not None]
    ratios = sorted(r["ratio"] if r["ratio"] is not None else float("inf") for r in solved)
    near = sum(r <= WITHIN for r in ratios)
    return {
        "fleets": len(rows),
        "with_a_plan": len(solved),
        "binding_link": sum(r["link_binds"] for r in rows),
        "several_classes": sum(r["classes"] > 1 for r in rows),
        "meet_their_slo": sum(r["meets"] is True for r in solved),
        "at_the_optimum": sum(r <= 1 + 1e-9 for r in ratios),
        f"within_{WITHIN}": near,
        "share_within": near / max(len(solved), 1),
        "largest_ratio": ratios[-1] if ratios and ratios[-1] < float("inf") else None,
        "planner_seconds_mean": sum(r["planner_seconds"] for r in rows) / len(rows),
        "force_seconds_mean": sum(r["force_seconds"] for r in rows) / len(rows),
        "simulations_by_force": sum(r["simulations"] for r in rows),
    }


def main() -> int:
    from rows import measure

    from tests.planner.brute_force import compare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=-1)
    parser.add_argument("--json", metavar="FILE", required=True)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    args = parser.parse_args()
    tasks = [(seed,) for seed in range(args.fleets)]
    found = summary(measure(compare, tasks, args.json, jobs=args.jobs, resume=args.resume, summary=summary))
    for key, value in found.items():
        print(f"{key}: {value}")
    good = found["meet_their_slo"] == found["with_a_plan"] and found["share_within"] >= SHARE
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
