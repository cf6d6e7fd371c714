"""The step time: physics that must hold whatever the constants, sizes by hand, memory, and bad input."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkv.costmodel import Estimate, load_catalogue, model_shape, step_model
from hetkv.costmodel.efficiency import Constants
from hetkv.costmodel.step import Placement, coefficients, count_work, seconds
from hetkv.errors import InputError

IDEAL = Constants(
    gemm_bytes=1, gemm_flops=1, expert_bytes=1, expert_flops=1, kv_bytes=1, attention_flops=1, layer_s=0, step_s=0,
    sequence_s=0, prompt_s=0, prompt_layer_s=0, reduce=0, reduce_latency=0,
)  # fmt: skip
MODELS = ("Llama-2-7B", "Llama-3.1-70B", "Mixtral-8x7B", "DeepSeek-V3", "gpt-oss-120b", "Qwen3.5-397B-A17B", "GLM-5")


def ideal(gpu: str, model: str, tp: int = 1, dtype: str = "bf16", pp: int = 1, dp: int = 1) -> tuple[Any, ...]:
    work = count_work(load_catalogue().gpu(gpu), model_shape(model), Placement(tp, pp, dp), dtype, "bf16")
    return coefficients(work, IDEAL)


def test_one_token_reads_every_weight_once() -> None:
    """Llama-2 7B, bf16: 6.607e9 weights without the embedding, 2 bytes each, at 3.35 TB/s."""
    assert seconds(ideal("H100", "Llama-2-7B"), 1, 0, 0, 0) == pytest.approx(6.607e9 * 2 / 3.35e12, rel=0.01)


def test_kv_reading() -> None:
    k = ideal("H100", "Llama-2-7B")
    spent = seconds(k, 1, 1e6, 0, 0) - seconds(k, 1, 0, 0, 0)
    assert spent == pytest.approx(1e6 * 512 * 1024 / 3.35e12)


def test_a_long_prompt_is_bound_by_operations() -> None:
    """2 operations a weight and token: 6.476e9 weights in the layers; the head works on the last token alone."""
    tokens = 100_000
    spent = seconds(ideal("H100", "Llama-2-7B"), 0, 0, tokens, 0)
    assert spent == pytest.approx(2 * 6.476e9 * tokens / 989e12, rel=0.01)


def test_attention_pairs() -> None:
    """4 operations a pair and channel: 2 products over 32 heads of 128 channels, 32 layers."""
    k = ideal("H100", "Llama-2-7B")
    spent = seconds(k, 0, 0, 1000, 1e9) - seconds(k, 0, 0, 1000, 0)
    assert spent == pytest.approx(4 * 32 * 128 * 32 * 1e9 / 989e12)


def test_experts_touched_grow_with_the_batch() -> None:
    """Mixtral, 2 of 8: one token reads a quarter of the experts, many read all of them and no more."""
    shape, k = model_shape("Mixtral-8x7B"), ideal("H100", "Mixtral-8x7B")
    dense = (shape.dense_params + shape.head_params) * 2 / 3.35e12
    routed = shape.routed_params * 2 / 3.35e12
    assert seconds(k, 1, 0, 0, 0) == pytest.approx(dense + routed / 4, rel=0.01)
    assert seconds(k, 40, 0, 0, 0) == pytest.approx(dense + routed, rel=0.05)


def test_a_sliding_window_bounds_the_keys() -> None:
    work = count_work(load_catalogue().gpu("H100"), model_shape("gpt-oss-120b"), Placement(), "bf16", "bf16")
    k = coefficients(work, IDEAL)
    per_token = 2 * 8 * 64 * 2 / 3.35e12  # K and V, 8 heads of 64, bf16, one layer
    assert seconds(k, 1, 100, 0, 0) - seconds(k, 1, 0, 0, 0) == pytest.approx(36 * 100 * per_token)
    far = seconds(k, 1, 10_100, 0, 0) - seconds(k, 1, 10_000, 0, 0)
    assert far == pytest.approx(18 * 100 * per_token)  # the 18 full layers alone still grow


def test_products_of_few_rows_have_a_share_of_their_own() -> None:
    """A batch of 64 at a twentieth of the peak, on top of the products at peak; beyond 256 nothing is added, and rows
    of prompts are no few rows."""
    work = count_work(load_catalogue().gpu("MI300X"), model_shape("Llama-2-70B"), Placement(), "bf16", "bf16")
    plain, slow = coefficients(work, IDEAL), coefficients(work, replace(IDEAL, few_rows_flops=0.05))
    rows = work.dense_s_per_token * 64 * (1 + 19) + work.head_s_per_sequence * 64 * 20 + work.head_bytes_s
    assert seconds(slow, 64, 0, 0, 0) == pytest.approx(rows, rel=0.02)
    alone = work._replace(head_s_per_sequence=0.0)
    plain, slow = coefficients(alone, IDEAL), coefficients(alone, replace(IDEAL, few_rows_flops=0.05))
    more = [seconds(slow, n, 0, 0, 0) - seconds(plain, n, 0, 0, 0) for n in (2560, 25600)]
    assert more == pytest.approx([work.dense_s_per_token * 256 * 19] * 2, rel=0.02)
    for tokens in (1, 64, 2560, 25600):
        assert seconds(slow, 0, 0, tokens, 0) == seconds(plain, 0, 0, tokens, 0)


def test_attention_that_reads_keys_for_every_query_head() -> None:
    """Llama-3 8B has 4 query heads to a KV head: KV is read 4 times; and 3 times more slowly beyond 512 heads."""
    constants = replace(IDEAL, kv_group=1.0, kv_unsplit=3.0)
    work = count_work(load_catalogue().gpu("MI300X"), model_shape("Llama-3-8B"), Placement(2), "bf16", "bf16")
    k = coefficients(work, constants)

    def reading(batch: int) -> float:
        return float(seconds(k, batch, 1e6, 0, 0) - seconds(k, batch, 0, 0, 0))

    assert reading(32) == pytest.approx(4 * 1e6 * work.kv_s_per_token)
    assert reading(33) == pytest.approx(3 * reading(32))
    assert all(
        count_work(load_catalogue().gpu("H100"), model_shape(m), Placement(8), "bf16", "bf16").kv_group >= 1
        for m in MODELS
    )


def test_latent_attention_is_bound_by_operations_on_one_rank() -> None:
    """DeepSeek: 128 heads read one latent of 576; absorbed, that is 4 operations an element and head."""
    k = ideal("H100", "DeepSeek-V3", tp=8, dtype="fp8")
    spent = seconds(k, 1, 1e6, 0, 0) - seconds(k, 1, 0, 0, 0)
    bytes_s, flops_s = 61 * 576 * 2e6 / 3.35e12, 61 * 576 * 4 * 16 * 1e6 / 989e12
    assert spent == pytest.approx(max(bytes_s, flops_s))


def test_fp8_halves_the_weights_and_doubles_the_operations() -> None:
    bf16, fp8 = ideal("H100", "Llama-3.1-70B"), ideal("H100", "Llama-3.1-70B", dtype="fp8")
    assert seconds(fp8, 1, 0, 0, 0) < 0.55 * seconds(bf16, 1, 0, 0, 0)
    assert seconds(fp8, 0, 0, 10**6, 0) < 0.55 * seconds(bf16, 0, 0, 10**6, 0)


@settings(max_examples=150, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    gpu=st.sampled_from(["H100", "MI300X", "A100-80-SXM", "Gaudi3"]),
    tp=st.sampled_from([1, 2, 8]),
    batch=st.integers(0, 300),
    each=st.integers(1, 20_000),
    prompt=st.integers(0, 9000),
    more=st.integers(1, 3000),
)
def test_more_work_never_takes_less_time(
    model: str, gpu: str, tp: int, batch: int, each: int, prompt: int, more: int
) -> None:
    work = count_work(load_catalogue().gpu(gpu), model_shape(model), Placement(tp), "bf16", "bf16")
    k = coefficients(work, Constants())
    pairs = prompt * (prompt + 1) / 2

    def at(b: int, c: float, p: int, q: float) -> float:
        value = float(seconds(k, b, c, p, q))
        assert value > 0
        return value * (1 + 1e-12)

    base = at(batch, batch * each, prompt, pairs) / (1 + 1e-12)
    assert base <= at(batch + more, (batch + more) * each, prompt, pairs)
    assert base <= at(batch, batch * each + more, prompt, pairs)
    assert base <= at(batch, batch * each, prompt + more, (prompt + more) * (prompt + more + 1) / 2)
    assert base <= at(batch, batch * each, prompt, pairs + more)


@pytest.mark.parametrize("model", MODELS)
def test_more_ranks_read_fewer_bytes(model: str) -> None:
    times = [seconds(ideal("H200", model, tp), 8, 8000, 0, 0) for tp in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)


def test_floats_and_arrays_agree() -> None:
    gpu, plain = load_catalogue().gpu("H100"), []
    works = [count_work(gpu, model_shape(m), Placement(2), "bf16", "bf16") for m in MODELS]
    stacked = type(works[0])(*(np.array(column, dtype=float) for column in zip(*works, strict=True)))
    for work in works:
        plain.append(seconds(coefficients(work, Constants()), 5, 5000, 100, 6000))
    many = seconds(coefficients(stacked, Constants()), *(np.full(len(works), x) for x in (5, 5000, 100, 6000)))
    assert many == pytest.approx(plain)


def test_pipeline_stages() -> None:
    """Two stages: one sequence fills only one of them (bubble), many sequences keep both busy."""
    one = step_model("H100", "Llama-3.1-70B", tp=4)
    two = step_model("H100", "Llama-3.1-70B", tp=4, pp=2)
    assert two.step_seconds(1, 1000) == pytest.approx(one.step_seconds(1, 1000), rel=0.05)
    assert two.step_seconds(64, 64_000) < one.step_seconds(64, 64_000)
    assert two.step_seconds(64, 64_000) > one.step_seconds(32, 32_000)
    assert two.kv_capacity_tokens > 2.5 * one.kv_capacity_tokens


def test_data_parallel_attention_holds_a_latent_once() -> None:
    wide = step_model("H200", "DeepSeek-V3", tp=1, dp=8, weight_dtype="fp8")
    replicated = step_model("H200", "DeepSeek-V3", tp=8, weight_dtype="fp8")
    assert wide.kv_bytes_per_token * 8 == replicated.kv_bytes_per_token
    assert wide.kv_capacity_tokens > 5 * replicated.kv_capacity_tokens


def test_data_parallel_attention_pays_for_the_exchange() -> None:
    """DeepSeek on 8 H200 with dp 8: 58 layers x 2 messages of 8 x 7168 x 2 bytes for each eighth of the tokens."""
    work = count_work(load_catalogue().gpu("H200"), model_shape("DeepSeek-V3"), Placement(1, 1, 8), "fp8", "bf16")
    assert work.reduce_small_s == pytest.approx(58 * 2 * 5e-6)
    assert work.reduce_small_s_per_token == pytest.approx(58 * 2 * 8 * 7168 * 2 / 8 * (7 / 8) / (0.5 * 450e9))


def test_capacity_by_hand() -> None:
    """Llama-2 7B on an 80 GiB GPU: 72 GiB usable, 12.55 GiB weights, 1.4 GiB runtime, 0.16 GiB activations."""
    found = step_model("H100", "Llama-2-7B", max_batched_tokens=2048).kv_capacity_tokens
    assert found == pytest.approx((72 - 12.55 - 1.4 - 0.16) * 2**30 / (512 * 1024), rel=0.01)


def test_estimate_holds_the_prediction() -> None:
    model = step_model("H100", "Qwen3-32B", tp=2, engine="vllm", engine_version="0.12.0")
    found = model.step_estimate(16, 16_000)
    assert isinstance(found, Estimate)
    assert found.low < found.value == model.step_seconds(16, 16_000) < found.high
    assert model.efficiency.fallback == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "H101"}, "unknown GPU 'H101'"),
        ({"model": "Llama-9"}, "unknown model 'Llama-9'"),
        ({"tp": 0}, "`tp` must be a whole number of at least 1, got 0"),
        ({"pp": 1.5}, "`pp` must be a whole number"),
        ({"pp": 100}, "too few for 100 pipeline stages"),
        ({"weight_dtype": "fp7"}, "unknown weight dtype 'fp7'"),
        ({"kv_dtype": "int3"}, "unknown KV dtype 'int3'"),
        ({"memory_share": 1.5}, r"memory share must be in \(0, 1\], got 1.5"),
        ({"max_batched_tokens": 0}, "at least 1, got 0"),
        ({"tp": 1}, r"does not fit on 1 x H100-SXM .*131.4 GiB of weights"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        step_model(**{"gpu": "H100", "model": "Llama-3.1-70B", "tp": 4, **arguments})


def test_the_same_model_differs_by_engine() -> None:
    """70B on four H100: 29.6 ms a token in Splitwise's engine, about 18.5 ms in LLM-Inference-Bench's vLLM."""
    old = step_model("H100", "Llama-2-70B", 4, engine="splitwise", engine_version="2023")
    new = step_model("H100", "Llama-2-70B", 4, engine="vllm", engine_version="2024")
    assert old.step_seconds(1, 576) == pytest.approx(29.6e-3, rel=0.05)
    assert new.step_seconds(1, 576) == pytest.approx(18.5e-3, rel=0.05)


def test_calls_are_cheap() -> None:
    """Far above the microsecond that it takes, so that a busy machine passes and an accidental array does not."""
    import timeit

    model = step_model("H100", "Llama-3.1-70B", 4)
    best = min(timeit.repeat(lambda: model.step_seconds(64, 64_000.0, 512, 1e5), number=2000, repeat=5)) / 2000
    assert best < 20e-6


def test_order_of_gpus_for_a_decode_step() -> None:
    times = {gpu: seconds(ideal(gpu, "Llama-3-8B"), 8, 8000, 0, 0) for gpu in ("L4", "L40S", "A100", "H100", "H200")}
    assert all(times[a] > times[b] for a, b in itertools.pairwise(times))
