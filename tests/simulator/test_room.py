"""What fits an instance and what its link carries: KV room, positions, state, replicas of an MLA cache."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest

from hetkv.costmodel import RequestBytes, model_shape, step_model
from hetkv.errors import InputError
from hetkv.planner.problem import parse_problem
from hetkv.simulator.cluster import kv_bytes
from hetkv.simulator.deployment import Engine, LinkPlan, Plan, PoolPlan, build_pools
from hetkv.simulator.pages import Pages
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
    assert kv_bytes(prefill, decode, 0, 10, 20) == 10 * shape.layers * 576 * 2 * 8
    assert kv_bytes(decode, prefill, 0, 10, 20) == 10 * shape.layers * 576 * 2 * 4


def test_the_wire_carries_the_narrower_dtype() -> None:
    pools = [
        PoolPlan("prefill", "H100-SXM", "p"),
        PoolPlan("decode", "H100-SXM", "d", engine={"kv_dtype": "fp8"}),
    ]
    prefill, decode = build_pools(Plan("Llama-3.1-8B", pools, link=LinkPlan(50.0)))
    assert kv_bytes(prefill, decode, 0, 1, 2) == kv_bytes(decode, prefill, 0, 1, 2) == decode.model.kv_bytes_per_token


def hybrid() -> str:
    from hetkv.costmodel import known_models

    return next(name for name in known_models() if model_shape(name).state_layers)


def test_a_hybrid_models_state_is_in_the_room_and_on_the_link() -> None:
    shape = model_shape(hybrid())
    steps = step_model("H200-SXM", shape, 8)
    inputs = shape.state_layers * shape.state_inputs * 2
    assert steps.kv.state == shape.state_layers * shape.state_elements * 4 + inputs
    pools = [PoolPlan(role, "H200-SXM", role, 8) for role in ("prefill", "decode")]
    plan = Plan(shape.name, pools, link=LinkPlan(50.0))
    (pool, _) = build_pools(plan)
    page = pool.block_size * steps.kv.token
    assert pool.pages.state * page >= steps.kv.state > (pool.pages.state - 1) * page
    traffic = Traffic(rate=1, requests=20, prompt_tokens="512", output_tokens="8", arrivals="constant")
    sent = simulate(plan, traffic.build()).summary["link"]["gigabytes"] * 1e9
    assert sent == pytest.approx(20 * steps.kv.bytes(512))


def test_state_takes_places_from_a_batch() -> None:
    """With room for 20 states and their prompts, no more than 20 sequences run at once."""
    shape = model_shape(hybrid())
    steps = step_model("H200-SXM", shape, 8)
    room = int(20 * (steps.kv.state / steps.kv.token + 160))
    plan = Plan(shape.name, [PoolPlan("aggregated", "H200-SXM", "a", 8, kv_tokens=room)])
    traffic = Traffic(rate=1000, requests=200, prompt_tokens="64", output_tokens="64")
    found = simulate(plan, traffic.build())
    assert found.summary["finished"] == 200
    assert found.pools[0].running.peak <= 21


SLIDING = RequestBytes(100.0, 1, 3, 127)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 127, 128, 129, 1000])
def test_layers_with_a_window_keep_the_window(tokens: int) -> None:
    """Bytes, what is sent in any pieces, and pages: blocks of 16 tokens in one layer."""
    seen = min(tokens, 127)
    assert SLIDING.bytes(tokens) == 100 * (tokens + 3 * seen)
    for piece in (1, 50, 2000):
        cuts = [*range(0, tokens, piece), tokens]
        assert sum(SLIDING.sent(a, b, tokens) for a, b in pairwise(cuts)) == SLIDING.bytes(tokens)
    pages = Pages.of_request(SLIDING, 16)
    assert pages.kept(tokens) == -(-tokens // 16) + 3 * -(-seen // 16)
    assert pages.computing(0, tokens) == 4 * -(-tokens // 16)
    for total in (pages.computing(0, tokens), pages.kept(tokens) + 40):
        for chunk in (30, inf):
            longest = pages.longest(total, chunk)
            assert _most(pages, longest, chunk) <= total < _most(pages, longest + 16, chunk)


def _most(pages: Pages, tokens: int, chunk: float) -> int:
    """The most pages that a prompt of so many tokens takes on its way."""
    step = int(min(chunk, tokens))
    return max(pages.computing(max(0, done - step), min(step, done)) for done in range(1, tokens + 1))


def test_windows_make_room_for_more_requests() -> None:
    """gpt-oss keeps half of its layers to 128 tokens; without the hybrid allocator it keeps all of them whole."""
    traffic = Traffic(rate=1000, requests=300, prompt_tokens="3000", output_tokens="50")
    peaks = {}
    for hybrid in (True, False):
        engine = Engine(hybrid_kv_cache=hybrid, max_num_seqs=512)
        plan = Plan("gpt-oss-20b", [PoolPlan("aggregated", "H200-SXM", "a", kv_tokens=150_000)], engine)
        found = simulate(plan, traffic.build())
        assert found.summary["finished"] == 300
        peaks[hybrid] = found.pools[0].running.peak
    assert 1.6 * peaks[False] < peaks[True] <= 2.1 * peaks[False]


def test_a_problem_may_say_where_the_first_token_comes_from() -> None:
    assert small().first_token_at == "decode"
    assert parse_problem({**_document(), "first_token_at": "prefill"}, "x").first_token_at == "prefill"


def _document() -> dict[str, object]:
    import msgspec

    found: dict[str, object] = msgspec.to_builtins(small())
    return found
