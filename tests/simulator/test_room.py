"""What fits an instance and what its link carries: KV room, positions, state, replicas of an MLA cache."""

from __future__ import annotations

import pytest

from hetkv.costmodel import model_shape, step_model
from hetkv.errors import InputError
from hetkv.planner.problem import parse_problem
from hetkv.simulator.cluster import kv_bytes
from hetkv.simulator.deployment import Engine, LinkPlan, Plan, PoolPlan, build_pools
from hetkv.simulator.run import simulate
from hetkv.simulator.traffic.sources import Traffic
from tests.planner.cases import small


def test_the_room_is_what_vllm_reports() -> None:
    """vLLM's own log on an RTX 4090 with an 8B model and its default of 2,048 tokens a step: 41,408 tokens."""
    assert step_model("RTX-4090", "Llama-3.1-8B", max_batched_tokens=2048).kv_capacity_tokens == pytest.approx(
        41_408, rel=0.02
    )


def test_a_deployment_that_was_measured_fits() -> None:
    assert step_model("A100-40-SXM", "Llama-2-70B", 4).kv_capacity_tokens > 4096


def test_a_request_beyond_the_models_positions_is_rejected() -> None:
    plan = Plan("Llama-2-7B", [PoolPlan("aggregated", "H100-SXM", "a")])
    traffic = Traffic(rate=1, requests=10, prompt_tokens="4000", output_tokens="97")
    assert simulate(plan, traffic.build()).summary["rejected"] == 10
    traffic = Traffic(rate=1, requests=10, prompt_tokens="4000", output_tokens="96")
    assert simulate(plan, traffic.build()).summary["rejected"] == 0


def test_long_prompts_are_not_planned_for_a_short_model() -> None:
    with pytest.raises(InputError, match=r"class chat: .* longer than the 4,096 positions of Llama-2-7B"):
        small(
            models=[{"name": "Llama-2-7B"}],
            classes=[
                {
                    "name": "chat",
                    "rate": 1,
                    "prompt_tokens": "100000",
                    "output_tokens": "10",
                    "ttft_ms": 60000,
                    "tpot_ms": 100,
                }
            ],
        )


def test_an_mla_cache_goes_to_every_rank() -> None:
    """From TP 1 to TP 8 each of the eight ranks gets the whole cache."""
    plan = Plan(
        "DeepSeek-V3",
        [PoolPlan("prefill", "MI325X", "p", 4), PoolPlan("decode", "H200-SXM", "d", 8)],
        Engine(weight_dtype="fp8"),
        LinkPlan(50.0),
    )
    prefill, decode = build_pools(plan)
    shape = model_shape("DeepSeek-V3")
    assert kv_bytes(prefill, decode, 10) == 10 * shape.layers * 576 * 2 * 8
    assert kv_bytes(decode, prefill, 10) == 10 * shape.layers * 576 * 2 * 4


def test_the_wire_carries_the_narrower_dtype() -> None:
    pools = [
        PoolPlan("prefill", "H100-SXM", "p"),
        PoolPlan("decode", "H100-SXM", "d", engine={"kv_dtype": "fp8"}),
    ]
    prefill, decode = build_pools(Plan("Llama-3.1-8B", pools, link=LinkPlan(50.0)))
    assert kv_bytes(prefill, decode, 1) == kv_bytes(decode, prefill, 1) == decode.model.kv_bytes_per_token


def hybrid() -> str:
    from hetkv.costmodel import known_models

    return next(name for name in known_models() if model_shape(name).state_layers)


def test_a_hybrid_models_state_is_in_the_room_and_on_the_link() -> None:
    shape = model_shape(hybrid())
    steps = step_model("H200-SXM", shape, 8)
    assert steps.state_bytes == shape.state_layers * shape.state_elements * 4
    pools = [PoolPlan(role, "H200-SXM", role, 8) for role in ("prefill", "decode")]
    plan = Plan(shape.name, pools, link=LinkPlan(50.0))
    (pool, _) = build_pools(plan)
    assert pool.state_blocks * pool.block_size >= steps.state_tokens > (pool.state_blocks - 1) * pool.block_size
    traffic = Traffic(rate=1, requests=20, prompt_tokens="512", output_tokens="8", arrivals="constant")
    sent = simulate(plan, traffic.build()).summary["link"]["gigabytes"] * 1e9
    assert sent == pytest.approx(20 * (512 * steps.kv_bytes_per_token + steps.state_bytes))


def test_state_takes_places_from_a_batch() -> None:
    """With room for 20 states and their prompts, no more than 20 sequences run at once."""
    shape = model_shape(hybrid())
    steps = step_model("H200-SXM", shape, 8)
    room = int(20 * (steps.state_tokens + 160))
    plan = Plan(shape.name, [PoolPlan("aggregated", "H200-SXM", "a", 8, kv_tokens=room)])
    traffic = Traffic(rate=1000, requests=200, prompt_tokens="64", output_tokens="64")
    found = simulate(plan, traffic.build())
    assert found.summary["finished"] == 200
    assert found.pools[0].running.peak <= 21


def test_a_problem_may_say_where_the_first_token_comes_from() -> None:
    assert small().first_token_at == "decode"
    assert parse_problem({**_document(), "first_token_at": "prefill"}, "x").first_token_at == "prefill"


def _document() -> dict[str, object]:
    import msgspec

    found: dict[str, object] = msgspec.to_builtins(small())
    return found
