"""Pipeline stages and attention replicas: latency and throughput are two quantities."""

from __future__ import annotations

from typing import Any

import pytest

from hetkv.costmodel import step_model
from hetkv.simulator.deployment import Engine, LinkPlan, Plan, PoolPlan
from hetkv.simulator.run import simulate
from hetkv.simulator.traffic.sources import Traffic

PROMPT = 8192


def ttft_ms(pp: int, budget: int = PROMPT, **traffic: Any) -> float:
    """One prompt at a time on an idle instance."""
    plan = Plan(
        "Llama-3.1-70B", [PoolPlan("aggregated", "H100-SXM", "a", 4, pp)], Engine(max_num_batched_tokens=budget)
    )
    lone = {"rate": 0.01, "requests": 5, "prompt_tokens": str(PROMPT), "output_tokens": "2", "arrivals": "constant"}
    return float(simulate(plan, Traffic(**{**lone, **traffic}).build()).summary["ttft_ms"]["p50"])


def test_one_prompt_in_one_step_is_no_sooner_through_more_stages() -> None:
    alone = ttft_ms(1)
    for pp in (2, 4):
        assert alone < ttft_ms(pp) < 1.01 * alone


def test_chunks_of_one_prompt_overlap() -> None:
    """`k` chunks of `pp` stages each: the last one is through after k + pp - 1 of k * pp stage times."""
    for pp in (2, 4):
        whole = ttft_ms(1, PROMPT // pp)  # the same chunks, one after the other
        assert ttft_ms(pp, PROMPT // pp) == pytest.approx(whole * (2 * pp - 1) / pp**2, rel=0.03)


@pytest.mark.parametrize("pp", [2, 4])
def test_a_stream_of_prompts_fills_the_stages(pp: int) -> None:
    rates = []
    for stages in (1, pp):
        pools = [PoolPlan("prefill", "H100-SXM", "p", 4, stages), PoolPlan("decode", "H100-SXM", "d", 4, count=8)]
        plan = Plan("Llama-3.1-70B", pools, Engine(), LinkPlan(400.0))
        traffic = Traffic(rate=20, requests=120, prompt_tokens=str(PROMPT), output_tokens="2")
        rates.append(simulate(plan, traffic.build()).summary["throughput_rps"])
    assert rates[1] / rates[0] == pytest.approx(pp, rel=0.1)


def test_a_batch_smaller_than_the_stages_does_not_overlap() -> None:
    one, two = (step_model("H100-SXM", "Llama-3.1-70B", 4, pp) for pp in (1, 2))
    assert two.step_seconds(1, 1000.0) == pytest.approx(one.step_seconds(1, 1000.0), rel=0.01)
    assert two.step_seconds(64, 64_000.0) < one.step_seconds(64, 64_000.0)


def test_no_request_is_lost_between_stages() -> None:
    plan = Plan("Llama-3.1-8B", [PoolPlan("aggregated", "L40S", "a", 1, 2, kv_tokens=9_000)], Engine())
    traffic = Traffic(rate=6, requests=400, prompt_tokens="uniform:100:4000", output_tokens="uniform:2:200")
    found = simulate(plan, traffic.build(), seed=3)
    assert found.summary["finished"] == 400
    assert found.columns["preemptions"].sum() > 0
    assert (found.columns["generated"] == found.columns["output"]).all()


def test_an_instance_that_fails_with_prompts_between_its_stages_serves_them_again() -> None:
    plan = Plan("Llama-3.1-8B", [PoolPlan("aggregated", "L40S", "a", 1, 4)], Engine(max_num_batched_tokens=1024))
    from hetkv.simulator.deployment import FailurePlan, OutagePlan

    plan = Plan(plan.model, plan.pools, plan.engine, failures=FailurePlan([OutagePlan("a/0", 2.0, 1.0)]))
    traffic = Traffic(rate=6, requests=60, prompt_tokens="uniform:2000:4000", output_tokens="uniform:2:50")
    found = simulate(plan, traffic.build(), seed=3)
    assert found.summary["finished"] == 60
    assert found.columns["restarts"].sum() > 0


def test_one_prompt_is_computed_by_one_attention_replica() -> None:
    """Eight replicas share the experts of many prompts; one prompt has the attention of one of them."""
    pairs = PROMPT * (PROMPT + 1) / 2
    tp, dp = (step_model("H200-SXM", "DeepSeek-V3", *size, weight_dtype="fp8") for size in ((8, 1, 1), (1, 1, 8)))
    assert dp.step_seconds(0, 0.0, PROMPT, pairs) > tp.step_seconds(0, 0.0, PROMPT, pairs)
    many = dp.step_seconds(0, 0.0, PROMPT, pairs / 8)  # eight prompts of an eighth
    assert many < 0.7 * dp.step_seconds(0, 0.0, PROMPT, pairs)


def test_each_replica_has_its_own_places_and_budget() -> None:
    from hetkv.simulator.deployment import build_pools

    pools = [PoolPlan("aggregated", "H200-SXM", "a", 1, 1, 8)]
    (pool,) = build_pools(Plan("DeepSeek-V3", pools, Engine(weight_dtype="fp8")))
    assert (pool.max_num_seqs, pool.max_num_batched_tokens) == (8 * 256, 8 * 8192)
    assert pool.longest <= pool.kv_blocks * pool.block_size / 8
