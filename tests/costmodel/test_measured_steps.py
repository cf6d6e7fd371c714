"""Steps measured on a running engine: their fit, and a simulation that takes its step times from them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetkv.cli import main
from hetkv.costmodel.measured_steps import MeasuredSteps, StepFit, StepWork, load_steps, terms
from hetkv.errors import InputError
from hetkv.runtime.step_log import StepLog
from hetkv.simulator.deployment import load_plan
from hetkv.simulator.run import simulate
from hetkv.simulator.traffic.sources import Traffic

TRUE = StepFit(
    name="here", step_s=2e-3, token_s=(0.0, 1e-4, 1e-4, 1e-4, 2e-5, 2e-5, 2e-5, 2e-5, 5e-5, 5e-5, 5e-5, 5e-5, 5e-5),
    sequence_s=3e-5, context_s=2e-8, pair_s=1e-8, prompt_s=5e-4, kv_bytes_per_token=4096.0, rows=0, median_error=0.0,
    low=1.0, high=1.0, provenance="",
)  # fmt: skip


def rows(noise: float) -> list[dict[str, float]]:
    """Steps of all kinds that take the time of `TRUE`, give or take."""
    random, model, found = np.random.default_rng(3), MeasuredSteps(TRUE, 1), []
    for _ in range(600):
        batch = int(random.integers(0, 64))
        prompt = int(random.choice([0, 0, random.integers(1, 1500)])) or int(batch == 0)
        context, pairs = batch * int(random.integers(10, 900)), prompt * (prompt + 1) / 2
        seconds = model.step_seconds(batch, context, prompt, pairs) * random.uniform(1 - noise, 1 + noise)
        found.append({"seconds": seconds, "decoding": batch, "context": context, "prompt": prompt, "pairs": pairs})
    return found


def calibrated(folder: Path, steps: list[dict[str, Any]]) -> Path:
    source, out = folder / "steps.json", folder / "own.json"
    source.write_text(json.dumps({"device": "test", "commit": "abc", "steps": steps}))
    assert main(["calibrate", "--bench", str(source), "--out", str(out)]) == 0
    return out


def test_one_step_and_many_are_the_same_function() -> None:
    work = StepWork(
        np.array([0, 1, 7, 70]), np.array([0, 9, 90, 9000]), np.array([300, 0, 5000, 0]), np.array([9, 0, 7, 0])
    )
    constants = [TRUE.step_s, *TRUE.token_s, TRUE.sequence_s, TRUE.context_s, TRUE.pair_s, TRUE.prompt_s]
    model = MeasuredSteps(TRUE, 1)
    each = [model.step_seconds(*map(int, one)) for one in zip(*work, strict=True)]
    assert terms(work) @ np.array(constants) == pytest.approx(each)


def test_the_fit_finds_what_steps_take(tmp_path: Path) -> None:
    entry = {"name": "here", "kv_bytes_per_token": 4096, "rows": rows(0.1)}
    fit = load_steps([calibrated(tmp_path, [entry])])["here"]
    assert fit.rows == 600
    assert fit.median_error < 0.07
    assert 0.88 < fit.low < 0.95
    assert 1.05 < fit.high < 1.12
    found, true = MeasuredSteps(fit, 1), MeasuredSteps(TRUE, 1)
    for work in ((1, 500.0, 0, 0.0), (32, 16000.0, 0, 0.0), (0, 0.0, 700, 245350.0), (20, 9000.0, 1000, 500500.0)):
        assert found.step_seconds(*work) == pytest.approx(true.step_seconds(*work), rel=0.03)


def test_steps_are_slower_while_others_work(tmp_path: Path) -> None:
    """The share is found, and two requests at a time on two instances take that much longer than one on one."""
    random, steps = np.random.default_rng(4), rows(0.1)
    for row in steps:
        row["others"] = float(random.choice([0.0, 1.0, random.uniform()]))
        row["seconds"] *= 1 + 0.4 * row["others"]
    path = calibrated(tmp_path, [{"name": "here", "kv_bytes_per_token": 4096, "rows": steps}])
    fit = load_steps([path])["here"]
    assert fit.crowding == pytest.approx(0.4, abs=0.05)
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "model: Llama-2-7B\ncalibration: [own.json]\n"
        "pools: [{role: aggregated, gpu: this one, steps: here, kv_tokens: 4096, count: 2}]\n"
    )
    alone, both = (
        simulate(load_plan(plan), Traffic(rate=rate, requests=2, prompt_tokens="64", output_tokens="400").build(), 1)
        for rate in (0.001, 1000)
    )
    ratio = both.summary["tpot_ms"]["mean"] / alone.summary["tpot_ms"]["mean"]
    assert ratio == pytest.approx(1 + fit.crowding, rel=0.03)


def test_a_plan_of_measured_steps(tmp_path: Path) -> None:
    """Requests one at a time take the sums of their steps, and the time to the engine and back."""
    calibrated(tmp_path, [{"name": "here", "kv_bytes_per_token": 4096, "rows": rows(0.0)}])
    path = tmp_path / "plan.yaml"
    path.write_text(
        "model: Llama-2-7B\ncalibration: [own.json]\nfront_ms: 5\nengine: {name: hetkv}\n"
        "pools: [{role: aggregated, gpu: this one, steps: here, kv_tokens: 4096}]\n"
    )
    traffic = Traffic(rate=1, arrivals="constant", requests=5, prompt_tokens="100", output_tokens="11")
    summary = simulate(load_plan(path), traffic.build()).summary
    true = MeasuredSteps(TRUE, 1)
    first = true.step_seconds(0, 0, 100, 5050)
    later = sum(true.step_seconds(1, 100 + step) for step in range(10))
    assert summary["ttft_ms"]["p50"] == pytest.approx(1e3 * first + 5, rel=0.02)
    assert summary["tpot_ms"]["p50"] == pytest.approx(1e3 * later / 10, rel=0.02)


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        ("steps: there, kv_tokens: 4096", "unknown measured `steps` 'there'; known are here"),
        ("steps: here", "`steps` needs `kv_tokens`"),
        ("steps: here, kv_tokens: 4096, pp: 2", "without pipeline stages"),
    ],
)
def test_steps_that_cannot_be_used(tmp_path: Path, pool: str, reason: str) -> None:
    calibrated(tmp_path, [{"name": "here", "kv_bytes_per_token": 4096, "rows": rows(0.0)}])
    path = tmp_path / "plan.yaml"
    path.write_text(f"model: Llama-2-7B\ncalibration: [own.json]\npools: [{{role: aggregated, gpu: x, {pool}}}]\n")
    with pytest.raises(InputError, match=reason):
        simulate(load_plan(path), Traffic(rate=1, requests=1).build())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"name": "here", "rows": []}, "kv_bytes_per_token"),
        ({"name": "here", "kv_bytes_per_token": 1, "rows": [{"seconds": 1}]}, "decoding"),
        ({"name": "here", "kv_bytes_per_token": 1, "rows": rows(0.0)[:5]}, "5 steps, at least 20"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, entry: dict[str, Any], reason: str, capsys: Any) -> None:
    source = tmp_path / "steps.json"
    source.write_text(json.dumps({"steps": [entry]}))
    assert main(["calibrate", "--bench", str(source), "--out", str(tmp_path / "own.json")]) == 2
    assert reason in capsys.readouterr().err


def test_the_log_has_a_row_for_each_step(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps" / "one.csv")
    log.begin()
    log.end([10, 20], [(0, 5), (100, 103)])
    log.end([11], [])
    with (tmp_path / "steps" / "one.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["decoding"], first["context"], first["prompt"]) == ("2", "30", "8")
    assert float(first["pairs"]) == 5 * 6 / 2 + (101 + 102 + 103)
    assert (second["decoding"], second["prompt"]) == ("1", "0")
    assert 0 <= float(second["seconds"]) <= float(second["end"]) - float(first["end"]) + 1e-3
