"""Many plans at once: the same on every back end, and over a trace of a production service."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest

from hetkv.errors import InputError
from hetkv.planner.frontier import frontier
from hetkv.planner.problem import Problem
from hetkv.planner.replay import replan
from tests.planner.cases import small

SHARED = Path(os.environ.get("HETKV_SHARED", Path(__file__).parents[3] / "shared"))
TRACE = SHARED / "data" / "traces" / "azure2023_conv.csv"
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens"


def one_type() -> Problem:
    """Aggregated instances of one GPU type: plans in a fraction of a second."""
    return msgspec.structs.replace(small(), gpus=small().gpus[1:], roles="aggregated")


def test_plans_on_a_ray_cluster_are_those_of_this_process() -> None:
    ray = pytest.importorskip("ray", reason="the package `ray` is not installed")
    here = frontier(one_type(), scales=(0.5, 1.0), targets=(1.0,), jobs=1)
    assert frontier(one_type(), scales=(0.5, 1.0), targets=(1.0,), jobs=2, backend="ray") == here
    ray.shutdown()


def test_without_ray_the_back_end_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.util.joblib"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    with pytest.raises(InputError, match=r"--backend ray: the package `ray` is not installed \(pip install ray\)"):
        frontier(one_type(), scales=(1.0,), targets=(1.0,), jobs=1, backend="ray")


@pytest.mark.skipif(not TRACE.is_file(), reason="the data folder (HETKV_SHARED) is not here")
def test_a_trace_of_a_production_service_is_replanned(tmp_path: Path) -> None:
    lines = TRACE.read_text(encoding="utf-8").splitlines()
    assert lines[0] == HEAD
    (tmp_path / "part.csv").write_text("\n".join(lines[:2001]) + "\n", encoding="utf-8")
    found = replan(one_type(), str(tmp_path / "part.csv"), period_s=240.0, jobs=1)
    assert sum(w.requests for w in found.periods) == 2000
    assert len(found.periods) >= 2
    assert found.cost is not None
    assert found.peak_cost is not None
    assert 0 < found.cost <= found.peak_cost
    for period in found.periods:
        assert period.why == ""
        assert period.gpus > 0
        assert 100 < period.prompt_mean < 5000
        assert period.served_rate == pytest.approx(period.rate)
