"""The microbenchmarks of `bench/`, which `make test` does not measure: each still runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_microbenchmark_runs_once() -> None:
    if not (ROOT / "bench").is_dir():
        pytest.skip("a copy of the tests alone")
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
