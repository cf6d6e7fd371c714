"""The field's methods do what their papers say, and are judged by the simulator like ours."""

from __future__ import annotations

import sys
from math import inf

import numpy as np
import pytest

from hetkv.errors import NotCoveredError
from hetkv.planner import baselines
from hetkv.planner.baselines.aic_tool import AicTool
from hetkv.planner.baselines.aiconfigurator import AIConfigurator, Worker, match
from hetkv.planner.baselines.candidates import candidates, hourly
from hetkv.planner.baselines.distserve import DistServe, attains, goodput
from hetkv.planner.baselines.melange import Melange, buckets, max_rate
from hetkv.planner.result import Instances
from tests.planner.cases import PRICES, small

PROBLEM = small()
MODEL = PROBLEM.models[0]


@pytest.fixture(scope="module")
def distserve():
    return DistServe(PROBLEM)


def by_role(instances: list[Instances]) -> dict[str, Instances]:
    return {i.role: i for i in instances}


def test_goodput_is_where_the_target_is_lost():
    one = candidates(PROBLEM, MODEL)[0]
    for phase in ("prefill", "decode"):
        found = goodput(PROBLEM, MODEL, one, phase)
        assert found > 0
        assert attains(PROBLEM, MODEL, one, phase, PROBLEM.classes, found)
        assert not attains(PROBLEM, MODEL, one, phase, PROBLEM.classes, 1.1 * found)


def test_distserve_replicates_the_best_of_each_phase(distserve):
    for scale in (1.0, 7.0):
        found = by_role(distserve(scale))
        assert len({i.gpu for i in found.values()}) == 1
        for role, one in found.items():
            rate = next(r for c, r in distserve.goodputs[MODEL.name][role] if c.offer.gpu == one.gpu)
            assert one.count == int(np.ceil(scale / rate))


def test_distserve_mixed_takes_the_most_for_the_money_in_each_phase(distserve):
    found = by_role(distserve.also_mixed()(40.0))
    for role, rates in distserve.goodputs[MODEL.name].items():
        worth = {c.offer.gpu: r / c.price for c, r in rates}
        assert found[role].gpu == max(worth, key=worth.get)
    assert hourly(PROBLEM, found.values()) <= hourly(PROBLEM, distserve(40.0)) * 1.1


def test_melange_covers_every_bucket_with_whole_slices():
    sizer = Melange(PROBLEM)
    (_, found, types, rates), scale = sizer.profiles[0], 20.0
    assert sum(b.rate for b in found) == pytest.approx(PROBLEM.classes[0].rate)
    counts = {(i.gpu, i.tp): i.count for i in sizer(scale)}
    assert {i.role for i in sizer(scale)} == {"aggregated"}
    capacity = sum(n for n in counts.values())
    least = sum(scale * b.rate / rates[k].max() for k, b in enumerate(found))
    assert capacity >= least - 1e-6
    cheapest = min(
        np.ceil(sum(scale * b.rate / rates[k, j] for k, b in enumerate(found))) * types[j].price
        for j in range(len(types))
    )
    assert hourly(PROBLEM, sizer(scale)) <= cheapest + 1e-9  # one type alone is one of its choices


def test_melange_knows_no_rate_where_tpot_cannot_be_met():
    spec = {"name": "a", "rate": 1, "prompt_tokens": "800", "output_tokens": "64", "ttft_ms": 600, "tpot_ms": 0.5}
    problem = small(classes=[spec])
    (bucket,) = buckets(problem.classes)
    assert max_rate(candidates(problem, MODEL)[0], bucket, 256) == 0
    assert Melange(problem)(1.0) is None
    option = baselines.plan("melange", problem)
    assert not option.feasible
    assert "no deployment" in option.why


def test_aiconfigurator_matches_rates_as_trying_all_does():
    one = candidates(PROBLEM, MODEL)[0]
    for head_rate, tail_rate in ((3.0, 7.3), (11.0, 0.9), (5.0, 5.0)):
        head, tail = Worker(one, 1, head_rate), Worker(one, 8, tail_rate)
        best = max(min(0.9 * head_rate * x, 0.92 * tail_rate * y) / (x + y) for x in range(1, 33) for y in range(1, 33))
        found = match(head, tail)
        assert found.rate / found.gpus == pytest.approx(best)


def test_aiconfigurator_repeats_replicas_until_the_rate_is_met():
    sizer = AIConfigurator(PROBLEM)
    few, many = sizer(1.0), sizer(30.0)
    assert hourly(PROBLEM, few) <= hourly(PROBLEM, many)
    assert len({i.gpu for i in many}) == 1
    mixed = AIConfigurator(PROBLEM, mixed=True)(30.0)
    assert hourly(PROBLEM, mixed) <= hourly(PROBLEM, many)


def test_a_plan_that_is_too_small_says_what_it_misses():
    one = Instances("aggregated", "MI300X", 1, 1, 1, MODEL.name, 8192, None, PRICES["MI300X"])
    option = baselines.judged("tiny", PROBLEM, [one], 40.0, 0.0)
    assert not option.feasible
    assert "of chat" in option.why
    enough = Instances("aggregated", "H100-SXM", 1, 1, 4, MODEL.name, 8192, None, PRICES["H100-SXM"])
    option = baselines.judged("large", PROBLEM, [enough], 1.0, 0.0)
    assert option.feasible, option.why
    assert option.cost_per_hour == pytest.approx(4 * PRICES["H100-SXM"])


def test_a_method_that_promised_too_much_is_repaired_by_asking_it_for_more():
    class Halved:
        """Buys half of what is needed."""

        def __call__(self, scale: float) -> list[Instances]:
            count = max(1, int(2 * scale))
            return [Instances("aggregated", "H100-SXM", 1, 1, count, MODEL.name, 8192, None, PRICES["H100-SXM"])]

    problem = small(classes=[{**_class(), "rate": 14.0}])
    found = baselines.repaired("halved", problem, Halved())
    assert found is not None
    factor, option = found
    assert option.feasible
    assert factor >= 1
    assert option.instances[0].count == max(1, int(2 * factor))


def test_goodput_for_a_budget_stays_within_it():
    budget = 12.0
    problem = small(objective={"goal": "goodput", "budget_usd_per_hour": budget})
    option = baselines.plan("melange", problem)
    assert option.cost_per_hour <= budget
    assert option.rate > PROBLEM.classes[0].rate
    more = Melange(problem)(1.1 * option.rate / PROBLEM.classes[0].rate)
    assert hourly(problem, more) > budget


def test_whole_nodes_and_caps_count():
    offers = [
        {"gpu": "MI300X", "usd_per_gpu_hour": 2.0, "basis": "on_demand", "as_of": "2026-05", "cap": 16, "rent": "node"}
    ]
    problem = small(gpus=offers)
    nine = [Instances("aggregated", "MI300X", 1, 1, 9, MODEL.name, 8192)]
    assert hourly(problem, nine) == 32.0
    assert hourly(problem, [Instances("aggregated", "MI300X", 1, 1, 17, MODEL.name, 8192)]) == inf


def test_the_tool_says_why_it_cannot_be_asked():
    with pytest.raises(NotCoveredError, match="pip install aiconfigurator"):
        AicTool(PROBLEM, sys.executable)
    with pytest.raises(NotCoveredError):
        AicTool(PROBLEM, "/nowhere/python")
    with pytest.raises(NotCoveredError, match="int4"):
        AicTool(small(engine={"weight_dtype": "int4"}), sys.executable)


def _class() -> dict:
    import msgspec

    return dict(msgspec.to_builtins(PROBLEM.classes[0]))
