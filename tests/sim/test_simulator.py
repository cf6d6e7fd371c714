"""The engines in a simulated world (main.cpp): seeds break no invariant, replay, and show faults planted in them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sim.mutants import main as plant_all

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sim"
SECONDS = 20
"""Of seeds in the ordinary tests; `make simulate-faults` runs as many as it is asked for."""
FIXED = {
    3: "a bundle used again counted as slow, and its staging buffer was counted twice",
    2672: "the ticket of a receiver that had everything stood for the next request under its id",
    5347: "a link on which a frame was forged wrote into a slot that another link had by then",
    7413: "a slot that was granted after a recall was not recalled, and its link kept it unused",
    9963: "the same",
}
"""Seeds that showed a fault of the engine, or of the simulator's account of it, with 100 transfers."""


def build(target: str) -> Path:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("the simulator is built with cmake and a C++ compiler")
    subprocess.run(["cmake", "-S", ROOT / "tests" / "sim", "-B", BUILD], check=True, capture_output=True)
    made = subprocess.run(
        ["cmake", "--build", BUILD, "-j", "2", "--target", target], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    return BUILD / target


@pytest.fixture(scope="module")
def simulator() -> Path:
    return build("hetkv_sim")


def run(program: Path, *options: object) -> dict[str, Any]:
    done = subprocess.run([program, *map(str, options)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    totals: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not totals["broken"]
    return totals


def test_seeds_break_no_invariant(simulator: Path) -> None:
    totals = run(simulator, "--first", 1, "--seeds", 10**6, "--seconds", SECONDS)
    assert totals["seeds"] >= 20
    assert totals["complete"] > totals["transfers"] / 2
    for fault in ("kills", "closes", "pauses", "jumps", "cuts", "losses", "forgeries", "again"):
        assert totals[fault] > 0


@pytest.mark.parametrize("seed", FIXED)
def test_a_seed_that_showed_a_fault_stays_clean(simulator: Path, seed: int) -> None:
    run(simulator, "--first", seed, "--seeds", 1)


def test_a_seed_replays_exactly(simulator: Path) -> None:
    run(simulator, "--first", 1, "--seeds", 10, "--twice")


def test_no_payload_error_is_accepted() -> None:
    program = build("hetkv_payload_errors")
    done = subprocess.run([program, "1000000", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert (found["errors"], found["accepted"]) == (10**6, 0)
    assert min(found["kinds"].values()) > 50_000


def test_what_a_cpu_sums_is_what_it_unpacks() -> None:
    """Also where a peer writes to its slot meanwhile, however the payload is read."""
    program = build("hetkv_slot_reads")
    done = subprocess.run([program, "300"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_fault_has_its_place_in_the_sources(tmp_path: Path) -> None:
    """Which need not be built for that."""
    plant_all(ROOT / "csrc", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_planted_faults_are_found() -> None:
    program = build("hetkv_sim_mutants")
    hunt = [sys.executable, ROOT / "tests" / "sim" / "hunt.py", program, "--seeds", "800"]
    done = subprocess.run(hunt, capture_output=True, text=True, check=False)
    assert re.search(r"^(\d+) of \1 found", done.stdout, re.MULTILINE), done.stdout
