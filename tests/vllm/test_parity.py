"""Prefill here, decode there: the same greedy tokens as one vLLM instance, whatever the two sides differ in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import Engine, Output, Pair, checkpoint

TOKENS = 12
MODES = ("prefill_first", "concurrent")


@pytest.fixture(scope="module")
def expected(models: Path, prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """What one instance without a connector says."""
    engine = Engine(checkpoint(models), None, 128)
    assert engine.error is None
    yield [engine.run(prompt, TOKENS).tokens for prompt in prompts]
    engine.close()


def check(pair: Pair, mode: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Token-identical, only the last prompt token computed by the consumer, nothing left behind."""
    for prompt, tokens in zip(prompts, expected, strict=True):
        output: Output = getattr(pair, mode)(prompt, TOKENS)
        assert output.tokens == tokens, f"prompt of {len(prompt)} tokens"
        assert output.computed == TOKENS  # the last prompt token and all output tokens but the last
        pair.settled()


@pytest.mark.parametrize(("producer", "consumer"), [(32, 32), (32, 128), (128, 32), (64, 128)])
def test_block_sizes(
    models: Path, prompts: list[list[int]], expected: list[list[int]], producer: int, consumer: int
) -> None:
    model = checkpoint(models)
    pair = Pair(Engine(model, "kv_producer", producer), Engine(model, "kv_consumer", consumer))
    for mode in MODES:
        check(pair, mode, prompts, expected)
    sent, received = pair.producer.call("stats"), pair.consumer.call("stats")
    assert sent["payload_bytes"] == received["payload_bytes"] > 0
    assert sent["failed_requests"] == received["failed_requests"] == 0
    pair.close()


@pytest.mark.parametrize(("kv_heads", "head_dim"), [(7, 96), (3, 128)])
def test_heads(models: Path, prompts: list[list[int]], kv_heads: int, head_dim: int) -> None:
    model = checkpoint(models, kv_heads=kv_heads, head_dim=head_dim)
    pair = Pair(Engine(model, "kv_producer", 32), Engine(model, "kv_consumer", 128))
    some = prompts[::5]
    alone = [pair.consumer.run(prompt, TOKENS).tokens for prompt in some]
    for mode in MODES:
        check(pair, mode, some, alone)
    pair.close()


@pytest.mark.parametrize(("producer", "consumer"), [(2, 1), (1, 2)])
def test_tensor_parallel(models: Path, prompts: list[list[int]], producer: int, consumer: int) -> None:
    """In float32: in bfloat16 the sums over ranks round, and vLLM itself says other tokens at TP 1 than at TP 2."""
    model = checkpoint(models, kv_heads=4)
    pair = Pair(
        Engine(model, "kv_producer", 64, tensor_parallel_size=producer, dtype="float32"),
        Engine(model, "kv_consumer", 128, tensor_parallel_size=consumer, dtype="float32"),
    )
    some = prompts[::6]
    alone = [pair.consumer.run(prompt, TOKENS).tokens for prompt in some]
    for mode in MODES:
        for prompt, tokens in zip(some, alone, strict=True):
            output = getattr(pair, mode)(prompt, TOKENS)
            assert (output.tokens, output.computed) == (tokens, TOKENS)
    pair.close()


def test_dtypes(models: Path, prompts: list[list[int]]) -> None:
    """float32 to bfloat16: the first token, which every loaded entry decides, is that of the consumer alone."""
    model = checkpoint(models)
    pair = Pair(Engine(model, "kv_producer", 32, dtype="float32"), Engine(model, "kv_consumer", 128))
    some = prompts[::3]
    alone = [pair.consumer.run(prompt, 1).tokens for prompt in some]
    for mode in MODES:
        outputs = [getattr(pair, mode)(prompt, 1) for prompt in some]
        assert all(output.computed == 1 for output in outputs)
        same = sum(output.tokens == tokens for output, tokens in zip(outputs, alone, strict=True))
        assert same >= 0.8 * len(some), f"{same} of {len(some)}"
    pair.settled()
    pair.close()


def test_both_roles(models: Path, prompts: list[list[int]]) -> None:
    """Two instances that each produce and consume, in both directions."""
    model = checkpoint(models)
    first, second = Engine(model, "kv_both", 32), Engine(model, "kv_both", 128)
    some = prompts[::10]
    alone = [first.run(prompt, TOKENS).tokens for prompt in some]
    for pair in (Pair(first, second), Pair(second, first)):
        for mode in MODES:
            check(pair, mode, some, alone)
    pair.close()
