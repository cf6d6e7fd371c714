"""`hetkv bench traffic`: its rows, its order of requests, its picture; on a case small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetkv.bench import traffic, traffic_pair
from hetkv.bench.traffic_cases import CPU, DEVICE, KINDS, Case
from hetkv.bench.traffic_plot import draw, lines
from hetkv.cli import main

SMALL = (
    Case("2 layers", 2, 1, 5, 3, reps=2, kinds=("ready", "layers", "latency")),
    Case("a short one last", 2, 1, 40, 2, "fp8", reps=2, kinds=("order",), last_tokens=3),
    Case("latent", 2, 0, 5, reps=1, kinds=("ready",)),
)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(traffic, "CPU", SMALL)
    file = tmp_path / "traffic.json"
    assert main(["bench", "traffic", "--peers", "none", "--json", str(file), "--plot", str(tmp_path / "it.png")]) == 0
    assert (tmp_path / "it.png").stat().st_size > 1000
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_rows(results: dict[str, Any]) -> None:
    rows = results["results"]
    assert [(row["name"], row["kind"]) for row in rows] == [(case.name, kind) for case in SMALL for kind in case.kinds]
    for row in rows:
        assert row["wrong_bytes"] == 0
        assert row["visible_us"] > 0 < row["gb_s"]
    ready = rows[0]
    assert ready["bytes"] == 2 * 3 * ready["layer_bytes"] == 2 * 3 * 5 * 512
    assert set(ready["cpu_us_per_request"]) == {
        f"{a} {b}" for a in ("sender", "receiver") for b in ("caller", "engine")
    }
    [order] = [row for row in rows if row["kind"] == "order"]
    assert 0 < order["mean_of_ends_over_last"] <= 1
    assert order["bytes"] == 2 * 256 * 43


def test_wrong_bytes_are_counted() -> None:
    with traffic_pair.TrafficPair(SMALL[0], ("cpu", "cpu")) as pair:
        pair.move("ready")
        pair.receiver.ask("clear")
        assert pair.receiver.ask("wrong_bytes") > 2 * 3 * 5 * 512 * 0.9  # where the pattern is not zero


def test_every_case_is_named_once_and_has_known_kinds() -> None:
    for cases in (CPU, DEVICE):
        assert len({case.name for case in cases}) == len(cases)
        assert all(set(case.kinds) <= set(KINDS) for case in cases)


def test_the_picture_has_a_line_a_system(tmp_path: Path) -> None:
    row = {"kind": "ready", "requests": 1, "layer_bytes": 1024, "gb_s": 2.0}
    report = {
        "ceiling": {"1024": 9.0, "2048": "no tool"},
        "results": [row, {**row, "gb_s": 3.0}, {**row, "kind": "layers"}, {"kind": "", "error": "gone"}],
        "nixl": [{"error": "absent"}, {"runs": {}, "layer_bytes": 1024, "gb_s": 1.0, "default_gb_s": None}],
    }
    assert lines(report) == {
        "ceiling: UCX put, contiguous": [(1024, 9.0)],
        "hetkv, 1 request": [(1024, 3.0)],
        "NIXL, best settings": [(1024, 1.0)],
    }
    draw(report, tmp_path / "it.svg")
    assert "NIXL" in (tmp_path / "it.svg").read_text()


def test_what_cannot_be_measured_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "traffic", "--case", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err
    assert main(["bench", "traffic", "--reps", "0"]) == 2
