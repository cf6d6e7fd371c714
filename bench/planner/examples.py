"""Runs the examples of docs/planning.md again, and makes the page from what they say.

python bench/planner/examples.py                         # all, one after the other, on all cores
python bench/planner/examples.py llama-2-7b              # some
python bench/planner/examples.py --together --jobs 8     # all at once, 8 processes each
python bench/planner/examples.py --missing               # those without a result: to take up a run again
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from figures import EXAMPLES, RESULTS, ROOT

SWEEPS = {
    "llama-2-7b": ("H100-SXM:MI300X", "0.25,0.5,1,2", "0.75,1,1.5"),
    "llama-3-70b": ("H100-SXM:MI300X", "0.25,0.5,1,2", "0.75,1,1.5"),
    "llama-3-405b": ("H100-SXM:MI300X", "0.5,1,2", "0.75,1"),
    "deepseek-v3": ("H200-SXM:MI300X", "0.5,1,2", "0.75,1"),
}


def command(name: str, jobs: int) -> list[str]:
    """The page's command for one example. Its JSON is written last, so a run that was stopped leaves none."""
    split, rates, targets = SWEEPS[name]
    words = ["plan", "--problem", f"docs/examples/{name}.yaml", "--split", split, "--rates", rates]
    words += ["--targets", targets, "--plot", f"docs/pictures/plan-{name}.png"]
    return [sys.executable, "-m", "hetkv", *words, "--jobs", str(jobs), "--json", f"bench/results/plan-{name}.json"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="EXAMPLE", help=f"default: {', '.join(EXAMPLES)}")
    parser.add_argument("--jobs", type=int, default=-1, metavar="N", help="processes of each, -1: one for each core")
    parser.add_argument("--together", action="store_true", help="all at once")
    parser.add_argument("--missing", action="store_true", help="leave out those that have a result")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in SWEEPS]:
        parser.error(f"no such example: {', '.join(unknown)}")
    names = [n for n in args.names or EXAMPLES if not (args.missing and (RESULTS / f"plan-{n}.json").exists())]
    failed = []
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    for name in names:
        running.append((name, subprocess.Popen(command(name, args.jobs), cwd=ROOT)))
        if not args.together:
            failed += ended(running)
    failed += ended(running)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    made = subprocess.run([sys.executable, "bench/planner/figures.py"], cwd=ROOT, check=False).returncode
    return 1 if failed else made


def ended(running: list[tuple[str, subprocess.Popen[bytes]]]) -> list[str]:
    """Wait for all of `running` and empty it; the names of those that failed."""
    failed = [name for name, process in running if process.wait()]
    running.clear()
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
