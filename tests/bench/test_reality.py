"""`bench/reality.py` from end to end: a small system is started, loaded and simulated, and its files agree."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetkv.costmodel.calibration.reality import table
from hetkv.simulator.traffic.sources import Traffic

ROOT = Path(__file__).parents[2]
PROMPTS, OUTPUTS = "uniform:20:60", "uniform:4:8"
SHARES = (0.3, 0.6, 0.9)
SECONDS = 2.0
PROBES = [20, 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one deployment left."""
    if not (ROOT / "bench" / "reality.py").is_file():
        pytest.skip("no bench/ here: this is not a checkout")
    out = tmp_path_factory.mktemp("reality")
    command = [
        sys.executable, str(ROOT / "bench" / "reality.py"), "--out", str(out), "--deployments", "disaggregated",
        "--seconds", f"{SECONDS:g}", "--in-flight", "4", "--max-num-seqs", "8", "--kv-tokens", "4096",
        "--prompt-tokens", PROMPTS, "--output-tokens", OUTPUTS, "--probe-tokens", *map(str, PROBES),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "capacity" in done.stdout
    return out


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "reality.json").read_text())
    return found


def rows_of(folder: Path, label: str) -> list[dict[str, str]]:
    with (folder / "disaggregated" / f"{label}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_result_says_what_ran(document: dict[str, Any]) -> None:
    assert document["model"] == "hetkv/runtime/data/demo"
    assert document["traffic"] == {"prompt_tokens": PROMPTS, "output_tokens": OUTPUTS}
    assert document["engine"]["max_num_seqs"] == 8
    assert {"device", "cpus", "versions", "commit", "time", "load_average_before"} <= set(document)
    assert list(document["deployments"]) == ["disaggregated"]
    found = document["deployments"]["disaggregated"]
    assert sorted(each["role"] for each in found["instances"]) == ["decode", "prefill"]
    assert all(0 < each["kv_tokens"] <= 4096 for each in found["instances"])
    assert found["capacity_rps"] > 0
    assert found["front_ms"] >= 0
    assert [run["share"] for run in found["runs"]] == list(SHARES)


def test_every_request_of_a_judged_load_is_answered_and_simulated(folder: Path, document: dict[str, Any]) -> None:
    """Both sides have the same requests, which are those of the traffic with the run's seed."""
    found = document["deployments"]["disaggregated"]
    for run in found["runs"]:
        assert run["rate"] == pytest.approx(run["share"] * found["capacity_rps"])
        assert run["duration"] == SECONDS
        assert not run["cut"]
        assert run["errors"] == {}
        workload = Traffic(rate=run["rate"], duration=SECONDS, prompt_tokens=PROMPTS, output_tokens=OUTPUTS).build()
        wanted = [(each.prompt, each.output) for each in workload.requests(run["seed"])]
        rows = rows_of(folder, run["label"])
        assert sorted((int(row["prompt"]), int(row["generated"])) for row in rows) == sorted(wanted)
        for side in ("measured", "simulated"):
            assert (run[side]["requests"], run[side]["finished"]) == (len(wanted), len(wanted))


def test_figures_are_those_of_the_requests(folder: Path, document: dict[str, Any]) -> None:
    for run in document["deployments"]["disaggregated"]["runs"]:
        rows = rows_of(folder, run["label"])
        if not rows:
            continue
        first, last, start = (
            np.array([float(row[key]) for row in rows]) for key in ("first_token", "last_token", "arrival")
        )
        later = np.array([int(row["generated"]) - 1 for row in rows])
        assert (first > start).all()
        assert (last > first).all()
        measured = run["measured"]
        assert measured["ttft_ms"]["p50"] == pytest.approx(1e3 * np.median(first - start))
        assert measured["tpot_ms"]["p50"] == pytest.approx(1e3 * np.median((last - first) / later))
        tokens = float(sum(later + 1))
        assert tokens / measured["output_tokens_per_s"] == pytest.approx(len(rows) / measured["throughput_rps"])
        for title, key in (("TTFT p50", "ttft_ms"), ("TPOT p50", "tpot_ms")):
            pair = run["compared"][title]
            assert pair["measured"] == measured[key]["p50"]
            assert pair["simulated"] == run["simulated"][key]["p50"]
            assert pair["ratio"] == pytest.approx(pair["simulated"] / pair["measured"])
            assert 1 / 50 < pair["ratio"] < 50  # of another unit, or nothing, even where the machine is busy
        assert set(run["own_steps"]) == set(run["compared"]) == {"TTFT p50", "TPOT p50", "throughput"}


def test_steps_of_a_judged_load_are_not_its_own(folder: Path, document: dict[str, Any]) -> None:
    """Each run is simulated with those of all other loads, but for the warming ones."""
    source = json.loads((folder / "calibration_input.json").read_text())
    loads = json.loads((folder / "measured.json").read_text())["deployments"]["disaggregated"]["loads"]
    names = {f"{role} for rate_{share:g}" for role in ("prefill", "decode") for share in SHARES}
    assert {entry["name"] for entry in source["steps"]} == names
    labels = {f"probe_{length}" for length in PROBES} | {"full", "calibrate_0.2", "rate_0.3", "warm"}
    assert labels <= set(loads)
    assert loads["full"]["finished"] == 16
    for entry in source["steps"]:
        own = loads[entry["name"].removeprefix("prefill for ").removeprefix("decode for ")]
        assert entry["rows"]
        assert not any(own["start"] < row["end"] < own["end"] for row in entry["rows"])
        assert not any(loads["warm"]["start"] < row["end"] < loads["warm"]["end"] for row in entry["rows"])
    assert len(source["results"]) == len(PROBES)
    assert all(result["seconds"] > 0 for result in source["results"])


def test_the_table_is_that_of_the_result(folder: Path, document: dict[str, Any]) -> None:
    text = (folder / "table.md").read_text()
    assert text == table(document)
    assert [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| disaggregated | ")][:3] == [
        "30%",
        "60%",
        "90%",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "reality_predict.py"), str(folder / "reality.json")],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == text


def test_a_system_that_does_not_start(tmp_path: Path) -> None:
    """Its log's end is shown, and nothing is simulated."""
    command = [sys.executable, str(ROOT / "bench" / "reality.py"), "--out", str(tmp_path), "--deployments",
               "aggregated", "--model", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "aggregated did not start" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "reality.json").exists()
