"""Several cache groups: a model whose layers alternate between a sliding window and full attention."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.engines import DTYPE, Engine, Pair

TOKENS = 12
WINDOW = 128
LEASE: dict[str, Any] = {
    "extra": {"transfer": {"lease_s": 6.0, "hold_s": 6.0}},
    "disable_hybrid_kv_cache_manager": False,
}


@pytest.fixture(scope="module")
def model(models: Path) -> str:
    """A random-weight Gemma 3."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1024,
        max_position_embeddings=4096,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(models / "gemma")
    return str(models / "gemma")


@pytest.fixture(scope="module")
def pair(model: str) -> Iterator[Pair]:
    made = Pair(
        Engine(model, "kv_producer", 32, max_num_batched_tokens=256, **dict(LEASE)),
        Engine(model, "kv_consumer", 128, policy="recompute", **dict(LEASE)),
    )
    assert made.producer.call("groups") == ["SlidingWindowSpec", "FullAttentionSpec"]
    yield made
    made.close()


def prompt_of(length: int) -> list[int]:
    draw = random.Random(length)
    return [draw.randrange(5, 1000) for _ in range(length)]


@pytest.mark.parametrize("mode", ["prefill_first", "concurrent"])
@pytest.mark.parametrize("length", [2, 37, 128, 129, 160, 161, 257, 1000])
def test_same_tokens(pair: Pair, mode: str, length: int) -> None:
    """Lengths whose window ends on a block boundary, before or after it; chunks that move the window during sends."""
    prompt = prompt_of(length)
    alone = pair.consumer.run(prompt, TOKENS)
    output = getattr(pair, mode)(prompt, TOKENS)
    assert (output.tokens, output.computed) == (alone.tokens, TOKENS)
    pair.settled()


def test_only_the_window_travels(pair: Pair) -> None:
    before = pair.consumer.call("stats")["payload_bytes"]
    pair.prefill_first(prompt_of(1000), 1)
    moved = pair.consumer.call("stats")["payload_bytes"] - before
    per_token = 2 * 2 * 64 * getattr(torch, DTYPE).itemsize  # K and V, heads, channels
    assert moved == 2 * per_token * ((WINDOW - 1) + 999)  # two layers of each kind; the last token is computed


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_failed_loads(pair: Pair, model: str, policy: str) -> None:
    """Listed by request: block ids mean nothing across groups."""
    consumer = (
        pair.consumer if policy == "recompute" else Engine(model, "kv_consumer", 128, policy=policy, **dict(LEASE))
    )
    prompt = prompt_of(300)
    output = consumer.run(prompt, TOKENS, {**pair.describe(), "transfer_id": "nobody sends this"})
    if policy == "fail":
        assert output.finish_reason == "error"
        consumer.close()
    else:
        assert output.computed == len(prompt) + TOKENS - 1
        assert output.tokens == consumer.run(prompt, TOKENS).tokens
    pair.settled()
