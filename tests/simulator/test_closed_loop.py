"""Clients that wait for an answer before they ask again."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from hetkv.errors import InputError
from hetkv.simulator.deployment import FailurePlan, HazardPlan, LinkPlan, Plan, PoolPlan
from hetkv.simulator.run import Result, simulate
from hetkv.simulator.traffic.lengths import parse_lengths
from hetkv.simulator.traffic.sources import Traffic
from hetkv.simulator.traffic.workload import ClosedLoop

PLAN = Plan(model="Llama-3.1-8B", pools=[PoolPlan("aggregated", "H100-SXM", "all", count=2)])
PAIR = Plan(
    model="Llama-3.1-8B",
    pools=[PoolPlan(role, "H100-SXM", role) for role in ("prefill", "decode")],
    link=LinkPlan(25.0),
)


def run(clients: int, think_s: float, count: int, plan: Plan = PLAN, prompt: str = "lognormal:500:0.5") -> Result:
    lengths = parse_lengths(prompt, ""), parse_lengths("uniform:5:60", "")
    return simulate(plan, ClosedLoop(clients, think_s, *lengths, count), seed=3)


def in_flight(result: Result) -> int:
    """The most at any time; a request that ends as another is sent is not with it."""
    sent, ended = result.columns["arrival"], result.columns["last_token"]
    times = np.concatenate([sent, ended])
    changes = np.concatenate([np.ones(len(sent)), -np.ones(len(ended))])
    return int(np.cumsum(changes[np.lexsort((changes, times))]).max())


@pytest.mark.parametrize("plan", [PLAN, PAIR])
def test_no_more_requests_are_in_flight_than_there_are_clients(plan: Plan) -> None:
    found = run(7, 0.0, 400, plan)
    assert found.summary["finished"] == 400
    assert in_flight(found) == 7
    assert in_flight(run(7, 2.0, 400, plan)) < 7


def test_one_client_sends_when_it_has_its_answer() -> None:
    columns = run(1, 0.0, 50).columns
    assert columns["arrival"][0] == 0
    assert (columns["arrival"][1:] == columns["last_token"][:-1]).all()


def test_the_law_of_response_times() -> None:
    """Clients are thinking or waiting: N = X (R + Z), whatever is simulated."""
    result = run(40, 0.5, 8000)
    columns = result.columns
    response = float((columns["last_token"] - columns["arrival"]).mean())
    rate = 8000 / float(columns["arrival"].max())
    assert rate * (response + 0.5) == pytest.approx(40, rel=0.03)


def test_more_clients_wait_longer_and_get_more_done() -> None:
    few, many = run(4, 0.0, 1000), run(64, 0.0, 1000)
    assert many.summary["throughput_rps"] > 3 * few.summary["throughput_rps"]
    assert many.summary["e2e_ms"]["p50"] > few.summary["e2e_ms"]["p50"]


def test_the_same_seed_gives_the_same_columns() -> None:
    one, two = run(9, 0.3, 300, PAIR), run(9, 0.3, 300, PAIR)
    assert all(np.array_equal(one.columns[k], two.columns[k], equal_nan=True) for k in one.columns)


def test_a_rejected_request_does_not_stop_its_client() -> None:
    result = run(3, 0.1, 60, prompt="uniform:100000:200000")
    assert result.summary["requests"] == 60
    assert result.summary["rejected"] > 0
    assert result.summary["rejected"] + result.summary["finished"] == 60


def test_a_last_request_that_is_rejected_ends_the_simulation() -> None:
    """Failures go on at random for as long as anybody is there."""

    def last_too_long(random: np.random.Generator, count: int) -> np.ndarray:
        return np.where(np.arange(count) == count - 1, 200_000, 100)

    plan = msgspec.structs.replace(PLAN, failures=FailurePlan(random=[HazardPlan("all", 5.0, 1000.0)]))
    loop = ClosedLoop(1, 3.0, last_too_long, parse_lengths("fixed:5", ""), 6)
    found = simulate(plan, loop, seed=3)
    assert found.summary["rejected"] == 1
    assert found.summary["finished"] == 5
    assert found.summary["simulated_seconds"] == found.columns["arrival"][-1]


def test_fewer_requests_than_clients() -> None:
    assert run(50, 1.0, 8).summary["finished"] == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clients": 0}, "clients must be at least 1, got 0"),
        ({"clients": 2, "think_s": -1.0}, "think time must be 0 s or more, got -1"),
        ({"clients": 2, "rate": 3.0}, "give one of --trace, --rate and --clients"),
        ({"rate": 3.0, "think_s": 1.0}, "--think is for --clients"),
        ({"clients": 2, "duration": 5.0}, "--duration is for --rate"),
        ({"clients": 2, "requests": 0}, "requests must be at least 1, got 0"),
    ],
)
def test_what_makes_no_closed_loop_is_rejected(options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Traffic(**options).build()


def test_the_options_say_it_in_one_line() -> None:
    assert Traffic(clients=12, think_s=2.5).build().about == "12 clients that think 2.5 s"
