"""A period of a trace: its own requests decide, with their bursts and their prefixes."""

from __future__ import annotations

import itertools

import msgspec

from hetkv.planner.problem import Limits, Objective, Problem
from hetkv.planner.replay import plan_period
from hetkv.simulator.traffic.trace import Row
from tests.planner.cases import small

SPAN = 60.0


def one_type(**engine: object) -> Problem:
    asked = msgspec.structs.replace(small(), gpus=small().gpus[:1], roles="aggregated")
    return msgspec.structs.replace(asked, engine=msgspec.structs.replace(asked.engine, **engine))


def bursts(of: int, every: float) -> list[Row]:
    """`of` requests at a time."""
    times = [start * every for start in range(int(SPAN / every)) for _ in range(of)]
    return [(at, 1500, 64, None) for at in times]


def test_a_period_that_comes_in_bursts_gets_a_plan_that_holds() -> None:
    found = plan_period(one_type(), 0.0, SPAN, bursts(40, 10.0), 0.0)
    assert found.replay_meets
    assert found.cost_per_hour is not None
    assert found.poisson_cost_per_hour is not None
    assert found.cost_per_hour > found.poisson_cost_per_hour


def with_power(**changes: object) -> Problem:
    asked = one_type()
    return msgspec.structs.replace(
        asked, gpus=[msgspec.structs.replace(asked.gpus[0], watts_per_gpu=1000.0)], **changes
    )


def test_a_period_costs_what_its_power_does() -> None:
    found = plan_period(with_power(objective=Objective(usd_per_kwh=5.0)), 0.0, SPAN, bursts(1, 0.5), 0.0)
    assert found.replay_meets
    assert found.cost_per_hour == found.poisson_cost_per_hour


def test_a_period_grows_no_further_than_its_limit() -> None:
    free = plan_period(with_power(), 0.0, SPAN, bursts(40, 10.0), 0.0)
    found = plan_period(with_power(limits=Limits(kw=free.gpus - 1)), 0.0, SPAN, bursts(40, 10.0), 0.0)
    assert not found.replay_meets
    assert 0 < found.gpus <= free.gpus - 1


def test_a_calm_period_keeps_its_plan() -> None:
    found = plan_period(one_type(), 0.0, SPAN, bursts(1, 0.5), 0.0)
    assert found.replay_meets
    assert found.cost_per_hour == found.poisson_cost_per_hour


def test_the_prefixes_of_a_trace_are_found_in_the_cache() -> None:
    """All prompts share all but their last block: with prefix caching the replay computes little of them."""
    numbers = itertools.count(100)
    rows: list[Row] = [(0.25 * i, 4096, 32, (1, 2, 3, 4, 5, 6, 7, next(numbers))) for i in range(200)]
    cold, warm = (plan_period(one_type(prefix_caching=on), 0.0, SPAN, rows, 0.0) for on in (False, True))
    assert cold.replayed_ttft_ms is not None
    assert warm.replayed_ttft_ms is not None
    assert warm.replayed_ttft_ms < 0.5 * cold.replayed_ttft_ms
