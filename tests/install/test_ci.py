"""What `.ci/run` starts next to its steps ends with it, and fails it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

RUN = (Path(__file__).parents[2] / ".ci/run").read_text(encoding="utf-8")
PART = RUN[RUN.index("declare -A pids") : RUN.index("\nstep ", RUN.index("trap "))]
CHILD = "python3 -c \"import subprocess, sys; subprocess.run(['bash', '-c', 'sleep 86.5; echo'])\"; true"


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    (folder / "build").mkdir()
    text = f"set -euo pipefail\n{PART}\n{script}"
    return subprocess.run(["bash", "-c", text], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def sleeping() -> list[str]:
    """Processes that the script has started at the third hand."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"sleep", b"86.5"]:
            found.append(file.parent.name)
    return found


@pytest.mark.parametrize("end", ["false", "exit 3", "kill -TERM $$; sleep 5"])
def test_a_step_that_fails_leaves_nothing_running(tmp_path: Path, end: str) -> None:
    started = f"until pgrep -f '^sleep 86.5' >/dev/null; do sleep 0.05; done; echo started; {end}"
    found = run(tmp_path, f"work() {{ {CHILD}; }}; aside work work; {started}")
    assert found.returncode != 0
    assert found.stdout == "started\n"
    deadline = time.monotonic() + 10
    while sleeping() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sleeping() == []


def test_what_fails_aside_fails_the_run(tmp_path: Path) -> None:
    found = run(tmp_path, "work() { echo why; return 7; }; aside work work; joined work; echo not here")
    assert found.returncode == 1
    assert found.stdout == "why\nwork: exit status 7, see build/work.log\n"
    other = tmp_path / "other"
    other.mkdir()
    found = run(other, "aside work true; joined work; echo here")
    assert (found.returncode, found.stdout) == (0, "here\n")
