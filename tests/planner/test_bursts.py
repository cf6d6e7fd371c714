"""Classes whose requests come in bursts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest

from hetkv.errors import InputError
from hetkv.planner.capacity import Demand
from hetkv.planner.columns import build_columns
from hetkv.planner.problem import Problem
from hetkv.planner.queueing import Late, busy_batch, waiting_load
from hetkv.planner.slo_checker import SloChecker
from hetkv.planner.traffic import Mix, samples
from tests.planner.cases import small, some


def bursty(cv: float, **changes: Any) -> Problem:
    plain = small(**changes)
    classes = [msgspec.to_builtins(msgspec.structs.replace(c, arrival_cv=cv)) for c in plain.classes]
    return small(classes=classes, **changes)


def test_each_class_has_its_rate_and_its_bursts() -> None:
    first, second = small().classes[0], bursty(3.0).classes[0]
    classes = [first, msgspec.structs.replace(second, name="batch", rate=12.0)]
    mix = Mix(classes, count=60_000)
    kinds = mix.kinds(5)
    arrivals = np.array([r.arrival for r in mix.requests(5)])
    assert (np.diff(arrivals) >= 0).all()
    assert len(kinds) == len(arrivals) == 60_000
    for i, (rate, cv) in enumerate(((4.0, 1.0), (12.0, 3.0))):
        gaps = np.diff(arrivals[kinds == i])
        assert 1 / gaps.mean() == pytest.approx(rate, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_lengths_belong_to_the_class_of_the_request() -> None:
    first = small().classes[0]
    other = msgspec.structs.replace(first, name="long", prompt_tokens="fixed:5000", arrival_cv=2.0)
    mix = Mix([first, other], count=500)
    prompts = np.array([r.prompt for r in mix.requests(1)])
    assert (prompts[mix.kinds(1) == 1] == 5000).all()
    assert (prompts[mix.kinds(1) == 0] != 5000).any()


def test_poisson_traffic_is_what_it_was() -> None:
    """The streams of requests that plans were judged by until now."""
    mix = Mix(small().classes, count=100)
    gaps = np.random.default_rng([7, 0]).exponential(1 / mix.rate, 100)
    assert [r.arrival for r in mix.requests(7)] == np.cumsum(gaps).tolist()
    assert Demand(samples(small().classes)).bursts == 1


def test_bursts_lower_what_a_pool_may_be_used() -> None:
    service = np.linspace(0.05, 0.2, 100)
    late, moments = [Late(service, 1.0, 0.01)], (float(service.mean()), float(service.var()))
    loads = [waiting_load(late, *moments, cv**2) for cv in (1.0, 2.0, 4.0)]
    assert (loads[0] == waiting_load(late, *moments)).all()
    for calm, wild in pairwise(loads):
        assert (calm >= wild).all()
        assert calm[0] > wild[0]
    batches, slope = np.array([8.0]), np.array([0.2])
    assert busy_batch(batches, slope, 2.3, 9.0)[0, 0] > busy_batch(batches, slope, 2.3)[0, 0]


def test_columns_and_simulator_agree_that_bursts_cost_capacity() -> None:
    calm, wild = small(), bursty(3.0)
    rates = [{c.key: c.rates for c in build_columns(p).columns} for p in (calm, wild)]
    assert all((rates[1][k] <= rates[0][k]).all() for k in rates[1])
    for role in ("prefill", "decode"):
        assert any(rates[1][k][0] < rates[0][k][0] for k in rates[1] if k[1] == role)
    used = [SloChecker(p, p.models[0])([some("aggregated", "H100-SXM", 1)], 1.0).used() for p in (calm, wild)]
    assert used[1] > used[0]


@pytest.mark.parametrize("cv", [0.5, 0.0, -1.0, 11.0, float("nan")])
def test_what_is_no_burst_is_rejected_by_name(cv: float) -> None:
    with pytest.raises(InputError, match=r"class.*chat.*`arrival_cv` must be 1 \(Poisson\) to 10"):
        bursty(cv)


def test_a_calm_class_dilutes_the_bursts_of_another() -> None:
    problem = bursty(3.0)
    calm = replace(samples(problem.classes)[0], spec=small().classes[0], share=0.75)
    wild = replace(samples(problem.classes)[0], share=0.25)
    assert Demand([calm, wild]).bursts == pytest.approx(0.75 + 0.25 * 9)
