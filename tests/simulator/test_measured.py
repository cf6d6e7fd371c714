"""Links that were measured, in plans and problems."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hetkv.cli import main
from hetkv.errors import InputError
from hetkv.planner.problem import load_problem
from hetkv.simulator.deployment import load_plan, port_bytes_per_second

NAME = "rma nhd:16 -> hnd:64"
PLAN = """
model: Llama-3.1-8B
pools:
  - {{name: p, gpu: H100, role: prefill}}
  - {{name: d, gpu: H100, role: decode}}
calibration: [links.json]
link: {link}
"""
PROBLEM = Path(__file__).parents[2] / "docs/examples/llama-3-70b.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two layer sizes at 12 GB/s and 30 us a layer, as `hetkv bench transfer --json` writes them."""
    files = []
    for mib in (1, 16):
        size = mib * 2**20
        result = {"path": "rma", "source": "nhd:16", "destination": "hnd:64", "layer_mib": mib}
        result["hetkv_gb_s"] = size / (30e-6 + size / 12e9) / 1e9
        files.append(tmp_path / f"{mib}.json")
        files[-1].write_text(json.dumps({"device": "test", "commit": "abc", "results": [result]}))
    arguments = [part for file in files for part in ("--bench", str(file))]
    assert main(["calibrate", *arguments, "--out", str(tmp_path / "links.json")]) == 0
    return tmp_path


def test_a_plan_reads_the_constants_that_calibrate_wrote(folder: Path) -> None:
    (folder / "plan.yaml").write_text(PLAN.format(link=f'{{measured: "{NAME}", overlap: none}}'))
    plan = load_plan(folder / "plan.yaml")
    assert plan.link is not None
    assert port_bytes_per_second(plan) == pytest.approx(12e9)
    assert plan.link.latency_us == pytest.approx(30)
    assert plan.link.overlap == "none"


def test_a_problem_does_so_too(folder: Path) -> None:
    text = re.sub(r"^link:.*\n(  .*\n)*", "", PROBLEM.read_text(), flags=re.MULTILINE)
    (folder / "problem.yaml").write_text(f'{text}\ncalibration: [links.json]\nlink: {{measured: "{NAME}"}}\n')
    assert load_problem(folder / "problem.yaml").link.gb_s == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("{measured: tcp}", f"unknown `measured` link 'tcp'; known are {NAME}"),
        (f'{{measured: "{NAME}", gb_s: 5}}', "give `measured` or `gb_s`, not both"),
    ],
)
def test_bad_links(folder: Path, link: str, message: str) -> None:
    (folder / "plan.yaml").write_text(PLAN.format(link=link))
    with pytest.raises(InputError, match=message):
        load_plan(folder / "plan.yaml")
