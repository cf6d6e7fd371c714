"""Fitting: known constants come back, unmeasured groups get what is common, outliers do not bend the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from hetkv.costmodel.calibration.datasets import ServingRow, Side, StepRow
from hetkv.costmodel.calibration.decisions import regret
from hetkv.costmodel.calibration.errors import Intervals, cross_predict, folds, holdouts, score
from hetkv.costmodel.calibration.fit import Array, Level, Prior, Values, fit, layout
from hetkv.costmodel.calibration.problems import ServingLoops, StaticSteps
from hetkv.costmodel.catalogue import load_catalogue
from hetkv.costmodel.efficiency import Constants
from hetkv.costmodel.models import model_shape
from hetkv.costmodel.serving import Load, LoopConstants, aggregated, disaggregated, static_batch
from hetkv.costmodel.step import Placement, coefficients, count_work, seconds

CATALOGUE = load_catalogue()


def step_rows(truth: dict[str, float]) -> list[StepRow]:
    """Rows that the model itself makes from `truth`."""
    blank = [
        StepRow(gpu, "Llama-2-70B", tp, prompt, batch, 128, 1.0, 1.0, 1)
        for gpu in ("a100-80gb", "h100-80gb")
        for tp in (2, 4, 8)
        for prompt, batch in ((128, 1), (1024, 1), (4096, 1), (512, 8), (512, 32))
    ]
    problem = StaticSteps(blank, CATALOGUE)
    plan = problem.layout()
    values = {name: np.full(len(blank), truth.get(name, prior.start)) for name, prior in plan.priors.items()}
    values.update({name: np.full(len(blank), value) for name, value in plan.fixed.items()})
    prompt_s, token_s = problem.predict(values)
    return [
        replace(row, prompt_s=float(p), token_s=float(t)) for row, p, t in zip(blank, prompt_s, token_s, strict=True)
    ]


def test_known_constants_are_found_again() -> None:
    truth = {"gemm_bytes": 0.7, "gemm_flops": 0.45, "host_layer_s": 2e-4, "prompt_layer_s": 3e-4}
    rows = step_rows(truth)
    problem = StaticSteps(rows, CATALOGUE)
    found = fit(rows, problem.residuals, problem.layout(), 0.05)
    error = np.abs(np.expm1(problem.residuals(found.values(rows))))
    assert np.quantile(error, 0.9) < 0.01
    assert found.value("gemm_flops", rows[0]) == pytest.approx(0.45, rel=0.05)


class Point(NamedTuple):
    group: str
    measured: float


def scale_of_a_new_group(rows: list[Point]) -> float:
    plan = layout(("scale",), {"scale": (Level(lambda r: r.group, 0.3),)}, None, {"scale": Prior(1.0, 0.01, 100, 5.0)})
    measured = np.array([row.measured for row in rows])

    def residuals(values: Values) -> Array:
        return np.asarray(np.log(values["scale"] / measured))

    found = fit(rows, residuals, plan)
    return found.value("scale", Point("new", 0.0))


def test_a_group_never_measured_gets_the_common_value() -> None:
    rows = [Point("a", 2.0 * np.exp(0.1))] * 10 + [Point("b", 2.0 * np.exp(-0.1))] * 10
    assert scale_of_a_new_group(rows) == pytest.approx(2.0, rel=0.02)


def test_outliers_do_not_bend_the_fit() -> None:
    assert scale_of_a_new_group([Point("a", 3.0)] * 20 + [Point("a", 300.0)] * 3) == pytest.approx(3.0, rel=0.05)


def test_folds_hold_each_row_out_once_and_keep_repeats_together() -> None:
    rows = [Point(str(i // 3), float(i)) for i in range(60)]
    masks = folds(rows, lambda r: r.group)
    assert np.sum(masks, axis=0).tolist() == [1] * 60
    for mask in masks:
        held = {row.group for row, out in zip(rows, mask, strict=True) if out}
        kept = {row.group for row, out in zip(rows, mask, strict=True) if not out}
        assert not held & kept
    assert set(holdouts(rows[:6], lambda r: r.group)) == {"0", "1"}


def test_no_row_is_predicted_by_a_fit_that_saw_it() -> None:
    rows = [Point(str(i), float(i)) for i in range(20)]

    def run(train: object, test: object) -> Array:
        assert isinstance(train, list)
        assert isinstance(test, list)
        assert not set(train) & set(test)
        return np.array([row.measured for row in test])

    assert cross_predict(rows, lambda r: r.group, run).tolist() == [float(i) for i in range(20)]


def test_intervals_hold_nine_tenths_of_new_rows() -> None:
    random = np.random.default_rng(0)
    rows = [Point("a", 1.0)] * 400
    spans = Intervals(rows, np.exp(random.normal(0, 0.1, 400)), lambda r: r.group)
    fresh = np.exp(random.normal(0, 0.1, 20_000))
    low, high = spans.of(rows[0])
    assert np.mean((fresh >= low) & (fresh <= high)) == pytest.approx(0.9, abs=0.03)
    one = np.ones(4)
    judged = score(one, np.array([0.5, 1.0, 1.25, 2.0]), 0.7 * one, 1.5 * one)
    assert (judged.n, judged.coverage) == (4, 0.5)
    assert judged.bias == pytest.approx((1.0 + 0.0 - 0.2 - 0.5) / 4)


def test_regret() -> None:
    measured, predicted = np.array([100.0, 80.0, 60.0]), np.array([90.0, 95.0, 50.0])
    tpot = np.array([0.03, 0.01, 0.01])
    assert regret([[0, 1, 2]], [measured, predicted], tpot, tpot, 0.05) == ([pytest.approx(0.2)], 0)
    assert regret([[0, 1, 2]], [measured, predicted], tpot, tpot, 0.02) == ([0.0], 0)
    wrong = np.array([0.01, 0.03, 0.03])
    assert regret([[0, 1, 2]], [measured, predicted], tpot, wrong, 0.02) == ([1.0], 1)
    assert regret([[0, 1]], [measured, predicted], tpot, tpot, 0.02) == ([], 0)


K = coefficients(
    count_work(CATALOGUE.gpu("H100"), model_shape("Llama-3-8B"), Placement(), "bf16", "bf16"),
    Constants(),
)
QUIET = LoopConstants(1e-9, 1e-12, 1.0, 0.0, 0.0)


def load(concurrency: float, prompt: float = 1000, output: float = 100) -> Load:
    return Load(np.array([concurrency]), np.array([prompt]), np.array([output]))


def test_one_request_at_a_time_is_plain_steps() -> None:
    found = aggregated(K, load(1), np.array([1e6]), 8192, QUIET)
    assert found.tpot_s[0] == pytest.approx(seconds(K, 1, 1050, 0, 0), rel=1e-6)
    assert found.batch[0] <= 1


def test_a_closed_loop_keeps_littles_law() -> None:
    for concurrency in (4, 32, 128):
        found = aggregated(K, load(concurrency), np.array([1e6]), 8192, QUIET)
        assert found.rate[0] * 100 * found.tpot_s[0] == pytest.approx(found.batch[0], rel=1e-3)
        assert found.batch[0] < concurrency


def test_disaggregation_takes_prompts_out_of_the_decode_steps() -> None:
    one, room = np.array([1.0]), np.array([1e6])
    together = aggregated(K, load(64), room, 8192, QUIET)
    separate = disaggregated(K, K, load(64), one, one, room, 8192, 0 * one, QUIET)
    assert separate.tpot_s[0] < together.tpot_s[0]


def test_prefill_workers_bound_the_rate() -> None:
    one, room = np.array([1.0]), np.array([1e6])
    prompt_s = seconds(K, 0, 0, 8000, 8000 * 8001 / 2)
    found = disaggregated(K, K, load(512, 8000, 10), one, one, room, 8192, 0 * one, QUIET)
    assert found.rate[0] == pytest.approx(1 / prompt_s, rel=1e-6)
    assert found.ttft_s[0] > 100 * prompt_s


def test_a_batch_beyond_the_cache_runs_in_turns() -> None:
    fits = static_batch(K, np.array([16.0]), np.array([512.0]), np.array([512.0]), np.array([16.0]))
    twice = static_batch(K, np.array([32.0]), np.array([512.0]), np.array([512.0]), np.array([16.0]))
    assert twice[0] == pytest.approx(2 * fits[0])


def test_the_front_end_bounds_the_rate() -> None:
    found = aggregated(K, load(256), np.array([1e6]), 8192, QUIET._replace(front_token_s=1e-3))
    assert found.rate[0] == pytest.approx(10.0, rel=1e-3)


def test_serving_problem_uses_the_side_of_each_row() -> None:
    row = ServingRow(
        "x", "user", "H100", "vllm", "1", "Llama-3-8B", "bf16", 1000, 100, 16, Side(1, 1, 2), Side(2, 1), 1.0, 1.0
    )
    both = [row, replace(row, prefill=None, decode=Side(1, 1))]
    problem = ServingLoops(both, CATALOGUE)
    plan = problem.layout()
    values = {name: np.full(2, prior.start) for name, prior in plan.priors.items()}
    found = problem.predict(values)
    assert found.tpot_s[0] < found.tpot_s[1]
    assert found.batch[0] < found.batch[1]
