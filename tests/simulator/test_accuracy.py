"""Against queues with known answers, and against a real serving run."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from hetkv.simulator.affine import AffineStepModel
from hetkv.simulator.traffic.lengths import parse_lengths
from hetkv.simulator.validation import closed_forms as closedforms
from hetkv.simulator.validation.accuracy import SERVING_RUN
from hetkv.simulator.validation.serving_run import compare, first_third, fit, ks_distance, load_serving_run, replay

DATA = Path(os.environ.get("HETKV_SHARED", Path(__file__).parents[3] / "shared")) / "data"


@pytest.mark.parametrize(
    "case",
    [
        partial(closedforms.md1, 0.5, 60_000),
        partial(closedforms.decode_sharing, count=15_000),
        partial(closedforms.decode_limited, rate=0.3, count=20_000),
    ],
    ids=["M/D/1", "batch service", "batch service, limited"],
)
def test_closed_forms_within_2_percent(case):
    formula, found = case()
    assert found == pytest.approx(formula, rel=0.02)


def test_central_queue_is_the_kiefer_wolfowitz_recursion():
    service, mean, servers = 0.05, 5000, 3
    columns = closedforms.simulate_single(
        0.8 * servers / service,
        parse_lengths(f"exponential:{mean}", ""),
        parse_lengths("1", ""),
        (0, 0, 0, service / mean, 0),
        4000,
        3,
        max_num_seqs=1,
        max_num_batched_tokens=2**40,
        instances=servers,
        warm_up=0,
    )
    free = [0.0] * servers
    for arrival, scheduled, prompt in zip(*(columns[k] for k in ("arrival", "scheduled", "prompt")), strict=True):
        free.sort()
        begin = max(arrival, free[0])
        assert scheduled == pytest.approx(begin, abs=1e-9)
        free[0] = begin + prompt * service / mean


def test_formulas_agree_where_they_overlap():
    # One server with exponential times: Erlang C is M/M/1, and a batch of one place is M/M/1 too.
    load, service = 0.7, 2.0
    wait = load * service / (1 - load)
    assert closedforms.mmc_wait(load, service, 1) == pytest.approx(wait)
    assert closedforms.md1_wait(load, service) == pytest.approx(wait / 2)
    running, waiting = closedforms.batch_service(load / service, 10, lambda j: service / 10, places=1)
    assert running == pytest.approx(load)
    assert waiting == pytest.approx(load / service * wait)


@pytest.mark.skipif(not (DATA / SERVING_RUN).is_dir(), reason="the data folder (HETKV_SHARED) is not here")
def test_serving_run_fitted_on_its_first_third():
    run = load_serving_run(DATA / SERVING_RUN)
    third = first_third(run)
    assert (len(run), third.sum()) == (300, 100)
    model = fit(run, third, third, 500_000)
    found = compare(run, replay(run, model), ~third)
    for key in ("ttft_p25", "ttft_p50", "ttft_p90", "tpot_p50"):
        assert abs(found[f"{key}_error"]) < 0.05
    assert found["tpot_median_error"] < 0.03
    assert found["ttft_ks"] < 0.1
    assert found["queue_start"] == pytest.approx(found["queue_start_real"], abs=0.3)
    assert found["concurrency_mean_gap"] < 2


@pytest.mark.skipif(not (DATA / SERVING_RUN).is_dir(), reason="the data folder (HETKV_SHARED) is not here")
def test_a_fit_sees_only_what_it_may():
    run = load_serving_run(DATA / SERVING_RUN)
    seen = np.arange(len(run)) < 5
    blind = load_serving_run(DATA / SERVING_RUN)
    for times in (blind.first_token, blind.last_token, blind.scheduled):
        times[5:] = np.nan
    assert fit(run, seen, seen, 500_000, 40).constants == fit(blind, seen, seen, 500_000, 40).constants


def test_ks_distance():
    assert ks_distance(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == 0
    assert ks_distance(np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6])) == pytest.approx(0.5)


def test_replay_needs_no_measured_times():
    run = load_serving_run(DATA / SERVING_RUN) if (DATA / SERVING_RUN).is_dir() else None
    if run is None:
        pytest.skip("the data folder (HETKV_SHARED) is not here")
    model = AffineStepModel((0.01, 1e-5, 5e-8, 5e-5, 5e-3), 500_000, 0.0)
    again = replay(run, model)
    assert np.all(again.first_token > run.queued)
    assert again.last_token.max() > run.queued.max()
    assert replay(again, model).last_token.tolist() == again.last_token.tolist()
