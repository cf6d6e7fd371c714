"""Reads pip's verbose output and prints what a person waits for: packages, and how much is compiled.

Where nothing was installed, the last lines of the output follow.
"""

from __future__ import annotations

import re
import sys
from collections import deque

STEP = re.compile(r"\[(\d+)/(\d+)\]")
SHOWN = re.compile(r"\s*(Collecting|Downloading|Building|Installing collected|Successfully installed)")


def main() -> int:
    """Exit status 1 where pip did not install anything."""
    last: deque[str] = deque(maxlen=40)
    installed, shown = False, -1
    for line in sys.stdin:
        last.append(line)
        if step := STEP.search(line):
            done = 10 * int(step[1]) // int(step[2])
            if done != shown:
                print(f"  compiling: {step[1]} of {step[2]}", flush=True)
            shown = done
        elif SHOWN.match(line):
            print(f"  {line.strip()[:110]}", flush=True)
        installed = installed or line.startswith("Successfully installed")
    if not installed:
        sys.stderr.writelines(last)
    return 0 if installed else 1


if __name__ == "__main__":
    raise SystemExit(main())
