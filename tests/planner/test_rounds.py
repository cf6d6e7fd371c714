"""Rounds of a search: what one of them teaches the next, and when held-out seeds are asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hetkv.planner.calibrator import Calibrator, Reach
from hetkv.planner.columns import build_columns
from hetkv.planner.result import ClassLatency
from hetkv.planner.search import Search
from hetkv.planner.slo_checker import SloChecker, Verdict
from hetkv.planner.trials import Candidate
from tests.planner.cases import small


@pytest.fixture(scope="module")
def search() -> Search:
    problem = small()
    checkers = {m.name: SloChecker(problem, m) for m in problem.models}
    return Search(problem, build_columns(problem), checkers)


def candidate(search: Search, ttft_ms: float, tpot_ms: float) -> Candidate:
    """One prefill and one decode instance, with these latencies under limits of 600 and 40 ms."""
    keys = [next(c.key for c in search.found.columns if c.role == role) for role in ("prefill", "decode")]
    verdict = Verdict({"chat": ClassLatency(ttft_ms, tpot_ms, 600, 40, 90, 90)})
    return Candidate(dict.fromkeys(keys, 1), 1.0, 5.0, {"Llama-3.1-8B": verdict})


def test_a_pool_beyond_the_largest_size_is_corrected_by_what_was_measured_last(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8,000 instances carried 0.9 of the load and 9,000 carried 0.98: the second measurement counts."""
    column = next(c for c in search.found.columns if c.role == "prefill")
    column = replace(column, rates=np.full_like(column.rates, 1e-3))
    calibrator = Calibrator(search.problem, [column], search.checkers)
    for count, reach in ((8000, 0.9), (9000, 0.98)):
        monkeypatch.setattr(Calibrator, "largest", lambda *_, reach=reach: Reach(reach))
        calibrator.measure("Llama-3.1-8B", {column.key: count}, 1.0, ["prefill"])
    (corrected,) = calibrator.corrected()
    assert float(corrected.rates[-1]) * 9000 == pytest.approx(0.98 * calibrator.rate("Llama-3.1-8B"))


def test_more_is_asked_of_the_pool_that_misses_and_of_no_other(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    late = candidate(search, 660, 20)
    model = "Llama-3.1-8B"
    monkeypatch.setattr(search.calibrator, "role", lambda *_: late.verdicts[model])
    assert search._short(late, {(model, "prefill"): Reach(1.0, cut=True)}) == {(model, "prefill")}
    assert search._short(late, {(model, "prefill"): Reach(0.9)}) == set()  # the measurement corrects it
    assert search._short(candidate(search, 300, 20), {}) == set()
    search.more = {(model, "prefill"): 0.04}
    try:
        for column in search.found.columns:
            part = 1.04 if column.role == "prefill" else 1.0
            assert search._reserved(column).rates == pytest.approx(column.rates / part)
    finally:
        search.more = {}


def test_a_ttft_that_the_prompts_alone_keep_asks_for_decode(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost on the link or for want of room at the receiver is not won back by more prefill."""
    model, late = "Llama-3.1-8B", candidate(search, 660, 20)
    for alone, asked in ((300, "decode"), (590, "prefill")):
        verdict = candidate(search, alone, 20).verdicts[model]
        monkeypatch.setattr(search.calibrator, "role", lambda *_, verdict=verdict: verdict)
        assert search._short(late, {(model, "prefill"): Reach(1.3)}) == {(model, asked)}


def test_where_nothing_held_the_closest_plan_grows_until_it_does(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TPOT needs three decode instances here, and prefill stays as it is."""
    tried = []

    def simulate(counts: dict, scale: float) -> Candidate:
        decode = next(n for k, n in counts.items() if k[1] == "decode")
        tried.append(decode)
        return replace(candidate(search, 300, 108 / decode), counts=counts, scale=scale)

    monkeypatch.setattr(search.trials, "simulate", simulate)
    monkeypatch.setattr(search, "seen", [candidate(search, 300, 108)])
    search._grow()
    assert search.best is not None
    assert tried == [2, 3]
    assert sorted(search.best.counts.values()) == [1, 3]
    search.best = None


def test_a_plan_that_held_with_each_of_few_seeds_is_near(search: Search) -> None:
    """Three seeds say little about another one: Student's quantile for two degrees of freedom is 2.9."""
    missed = candidate(search, 1.2 * 600, 20)
    assert not missed.near
    assert replace(missed, each_holds=True).near
    assert not replace(missed, each_holds=True).meets
