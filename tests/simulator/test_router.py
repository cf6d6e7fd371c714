"""Routers: the heap chooses what a walk over all instances would, and thousands of instances are no burden."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hetkv.simulator.affine import AffineStepModel
from hetkv.simulator.cluster import Cluster
from hetkv.simulator.deployment import Engine, Plan, PoolPlan, Routing
from hetkv.simulator.events import Events
from hetkv.simulator.instance import Instance
from hetkv.simulator.pool import Pool
from hetkv.simulator.records import Records
from hetkv.simulator.request import Request
from hetkv.simulator.router import DISCIPLINES, Router
from hetkv.simulator.run import simulate
from hetkv.simulator.traffic.sources import Traffic

MODEL = AffineStepModel((0.008, 1e-4, 1e-6, 2e-5, 1e-3), 0, 1000.0)


def pools(count: int) -> list[Pool]:
    shared = {"role": "aggregated", "gpu": "g", "gpus": 1, "model": MODEL, "layers": 4}
    return [
        Pool("small", count=count, kv_blocks=300, weight=1.0, **shared),  # type: ignore[arg-type]
        Pool("large", count=count, kv_blocks=900, weight=2.5, **shared),  # type: ignore[arg-type]
    ]


class Watched(Router):
    """Checks each choice against a walk over all instances."""

    chosen = 0

    def choose(self, request: Request) -> Instance | None:
        found = super().choose(request)
        up = [i for i in self.instances if i.up]
        if self._cost is not None and up:
            costs = [self._cost(i, request) for i in up]
            assert found is not None
            assert self._cost(found, request) == pytest.approx(min(costs), rel=1e-12)
            Watched.chosen += 1
        return found


@pytest.mark.parametrize("discipline", [d for d in DISCIPLINES if d != "central_queue"])
def test_a_choice_is_the_least_of_all(discipline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hetkv.simulator.cluster.Router", Watched)
    random = np.random.default_rng(5)
    events, records = Events(), Records()
    cluster = Cluster(pools(6), events, records, prefill_routing=discipline)
    rows = zip(np.cumsum(random.exponential(0.004, 1500)), random.integers(1, 900, 1500), strict=True)
    cluster.start(Request(i, float(at), int(n), 1 + i % 40) for i, (at, n) in enumerate(rows))
    for at, name in ((1.0, "small/0"), (2.0, "large/3")):
        events.at(at, lambda name: cluster.fail(str(name)), name)
        events.at(at + 1.5, lambda name: cluster.recover(str(name)), name)
    before = Watched.chosen
    events.run()
    cluster.finish()
    assert len(records) == 1500
    assert discipline == "round_robin" or Watched.chosen > before + 1000


@pytest.mark.parametrize("discipline", ["join_shortest_queue", "least_loaded"])
def test_an_instance_that_was_down_while_idle_is_chosen_again(discipline: str) -> None:
    """It has no load that falls: that it is up again is all that it reports."""
    cluster = Cluster(pools(1), Events(), Records(), prefill_routing=discipline)
    first, second = cluster.entry.instances
    request = Request(0, 0.0, 10, 10)
    for looked_at in (True, False):
        assert cluster.entry.choose(request) is first
        cluster.fail(first.name)
        if looked_at:
            assert cluster.entry.choose(request) is second
        cluster.recover(first.name)
    assert cluster.entry.choose(request) is first


def test_weights_are_shares_of_the_requests_in_flight() -> None:
    found = [
        PoolPlan("aggregated", "H100-SXM", "a", weight=2.0),
        PoolPlan("aggregated", "H100-SXM", "b", weight=1.0),
    ]
    plan = Plan("Llama-3.1-8B", found, Engine(), routing=Routing("weighted"))
    result = simulate(plan, Traffic(rate=60, requests=4000, prompt_tokens="200", output_tokens="200").build())
    flight = {p.name: p.running.integral(result.end) for p in result.pools}
    assert flight["a"] / flight["b"] == pytest.approx(2.0, rel=0.15)


def test_thousands_of_instances_cost_little_more_than_a_few() -> None:
    """Requests a processor second, relative to few instances: a walk over 2,048 instances is 8 times slower."""
    seconds = {}
    for count in (4, 1024):
        best = float("inf")
        for _ in range(2):
            events, records = Events(), Records()
            cluster = Cluster(pools(count), events, records, prefill_routing="least_loaded")
            arrivals = (Request(i, i / (40 * count), 100 + i % 50, 2) for i in range(6000))
            begin = time.process_time()
            cluster.start(arrivals)
            events.run()
            best = min(best, time.process_time() - begin)
        seconds[count] = best
    assert seconds[1024] < 3 * seconds[4]
