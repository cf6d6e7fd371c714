"""Seeds of the simulator over many processes: `python tests/sim/spread.py build/sim/hetkv_sim --seeds 10000 --jobs 32`.

Prints the sum of what the processes report, as JSON, and what broke in which seed. Exit status 1 where a seed breaks an
invariant or a process dies.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from results import record

PART = 50
"""Seeds of one process."""


def run(program: Path, first: int, seeds: int) -> tuple[int, Counter[str], str]:
    """The first seed, the counts, and the text of what broke."""
    command = [str(program), "--first", str(first), "--seeds", str(seeds), "--progress"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("begins seed ")]
    if done.returncode == 0:
        counts = json.loads(lines[-1])
        return first, Counter({name: counts[name] for name in counts if name not in ("first", "broken")}), ""
    begun = [line for line in done.stdout.splitlines() if line.startswith("begins seed ")]
    text = "\n".join([f"exit status {done.returncode} after {begun[-1:]}", *lines, done.stderr])
    return first, Counter(), text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the sum goes, as `run` of that JSON file")
    options = parser.parse_args()
    start = time.monotonic()
    stop = options.first + options.seeds
    parts = [(first, min(PART, stop - first)) for first in range(options.first, stop, PART)]
    total: Counter[str] = Counter()
    broken: dict[int, str] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for first, counts, text in pool.map(lambda part: run(options.program, *part), parts):
            total.update(counts)
            if text:
                broken[first] = text
                print(text, file=sys.stderr, flush=True)
    seconds = {"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(total.pop("seconds", 0), 1)}
    result = {"first": options.first, **total, **seconds, "jobs": options.jobs, "broken": len(broken)}
    print(json.dumps(result))
    if options.out:
        record(options.out, "run", result)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
