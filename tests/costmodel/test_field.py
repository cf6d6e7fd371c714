"""The package's answers that are kept are answers to the runs that are judged."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import aiconfigurator

from hetkv.costmodel.calibration.datasets import read_serving
from hetkv.costmodel.calibration.field import packages, shipped_answers
from hetkv.costmodel.calibration.serving_runs import FILE
from tests.costmodel.test_calibrate import DATA, needs_data


@needs_data
def test_every_aggregated_run_is_asked_as_it_is_recorded():
    tasks = aiconfigurator.tasks(DATA)
    rows = {row.id: row for row in read_serving(DATA / FILE).serving if not row.disaggregated}
    assert {task["id"] for task in tasks} == set(rows)
    for task in tasks:
        tp, dp, moe_tp, moe_ep = task["parallel"]
        row = rows[task["id"]]
        assert (tp, dp) == (row.decode.tp, row.decode.dp)
        assert moe_tp * moe_ep == tp * dp
        assert (task["prompt"], task["output"]) == (row.prompt, row.output)
        assert abs(task["batch"] * dp - row.concurrency) <= dp
    assert set(shipped_answers()["ttft_tpot_ms"]) == set(rows)


@needs_data
def test_a_run_without_an_answer_has_no_prediction():
    answers = shipped_answers()
    rows = read_serving(DATA / FILE).serving
    for method in packages(rows, answers):
        for row, ttft, tpot in zip(rows, *method.seconds, strict=True):
            answer = answers["ttft_tpot_ms"].get(row.id)
            if isinstance(answer, dict):
                assert 0 < tpot < 10
                assert 0 < ttft < 1e4
            else:
                assert np.isnan(ttft)
                assert np.isnan(tpot)
                assert answer is None or "Error" in answer or "no tables" in answer
