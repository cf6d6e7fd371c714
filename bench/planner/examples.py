"""Runs the examples of docs/planning.md again, one after the other, and makes the page from what they say.

python bench/planner/examples.py                  # all
python bench/planner/examples.py llama-2-7b       # some
"""

from __future__ import annotations

import subprocess
import sys

from figures import EXAMPLES, RESULTS, ROOT

SWEEPS = {
    "llama-2-7b": ("H100-SXM:MI300X", "0.25,0.5,1,2", "0.75,1,1.5"),
    "llama-3-70b": ("H100-SXM:MI300X", "0.25,0.5,1,2", "0.75,1,1.5"),
    "llama-3-405b": ("H100-SXM:MI300X", "0.5,1,2", "0.75,1"),
    "deepseek-v3": ("H200-SXM:MI300X", "0.5,1,2", "0.75,1"),
}


def main(names: list[str]) -> int:
    for name in names or EXAMPLES:
        split, rates, targets = SWEEPS[name]
        words = ["plan", "--problem", f"docs/examples/{name}.yaml", "--split", split, "--rates", rates]
        words += ["--targets", targets, "--plot", f"docs/pictures/plan-{name}.png"]
        words += ["--json", str(RESULTS / f"plan-{name}.json")]
        subprocess.run([sys.executable, "-m", "hetkv", *words], cwd=ROOT, check=True)
    return subprocess.run([sys.executable, "bench/planner/figures.py"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
