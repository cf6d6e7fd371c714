"""Whether the simulator finds each planted fault (mutants.py), and after how many seeds.

`python tests/sim/hunt.py build/sim/hetkv_sim_mutants --seeds 500` runs each fault until a seed shows it: an invariant
is broken, the process dies, or a seed does not end. Exit status 1 where one is not found.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mutants import MUTANTS
from results import record


@dataclass(frozen=True)
class Found:
    number: int
    name: str
    seeds: int | None
    """Seeds until the fault shows; None: it does not."""
    how: str


def hunt(program: Path, number: int, seeds: int) -> Found:
    """The first seed that shows the fault."""
    name = MUTANTS[number - 1].name
    command = [str(program), "--mutant", str(number), "--first", "1", "--seeds", str(seeds), "--progress"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode == 0:
        return Found(number, name, None, "not found")
    begun = max((int(seed) for seed in re.findall(rb"^begins seed (\d+)$", done.stdout, re.MULTILINE)), default=0)
    shown = re.findall(rb"^seed \d+: (.*)$", done.stdout, re.MULTILINE)
    if shown:
        how = shown[0].decode()
    elif done.returncode == -signal.SIGALRM:
        how = "a seed does not end"
    else:
        how = f"the process ends with {done.returncode}"
    return Found(number, name, begun, how)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path)
    parser.add_argument("--seeds", type=int, default=500, help="of each fault, at most")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults")
    parser.add_argument("--jobs", type=int, default=1, help="faults at once, each in a process")
    parser.add_argument("--out", type=Path, help="where the result goes, as `planted_faults` of that JSON file")
    options = parser.parse_args()
    numbers = options.only or range(1, len(MUTANTS) + 1)
    start = time.monotonic()
    found = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for one in pool.map(lambda number: hunt(options.program, number, options.seeds), numbers):
            found.append(one)
            print(f"{one.number:3} {one.name}: {one.seeds or '-'} ({one.how})", flush=True)
    missed = [fault.name for fault in found if fault.seeds is None]
    print(f"{len(found) - len(missed)} of {len(found)} found in {time.monotonic() - start:.0f} s; missed: {missed}")
    if options.out:
        counts = {"found": len(found) - len(missed), "of": len(found), "seeds_most": options.seeds}
        record(options.out, "planted_faults", {**counts, "faults": [asdict(fault) for fault in found]})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
