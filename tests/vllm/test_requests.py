"""What vLLM's scheduler and workers ask of a connector: chunks, prefix caches, aborts, preemptions, leases."""

from __future__ import annotations

import base64
import random
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hetkv.control.payloads import MAX_PAYLOAD_BYTES
from tests.vllm.engines import DTYPE, Engine, Pair, checkpoint, until

TOKENS = 8
PRODUCE = {"do_remote_decode": True, "do_remote_prefill": False}
CHUNK = 256
LEASES = {"transfer": {"lease_s": 20.0, "hold_s": 15.0, "handshake_timeout_s": 60.0}}


def prompt_of(length: int, seed: int) -> list[int]:
    """A random prompt."""
    draw = random.Random(seed)
    return [draw.randrange(5, 1000) for _ in range(length)]


def pair_of(model: str, producer: dict[str, Any], consumer: dict[str, Any]) -> Pair:
    """A producer with blocks of 32 tokens, a consumer with blocks of 128."""
    return Pair(Engine(model, "kv_producer", 32, **producer), Engine(model, "kv_consumer", 128, **consumer))


@pytest.fixture(scope="module")
def model(models: Path) -> str:
    return checkpoint(models)


@pytest.fixture(scope="module")
def chunked(model: str) -> Iterator[Pair]:
    """Chunked prefill and prefix caches on both sides, short leases; what cannot be loaded is computed."""
    options = {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": True, "extra": LEASES, "policy": "recompute"}
    pair = pair_of(model, dict(options), dict(options))
    yield pair
    pair.close()


@pytest.mark.parametrize("mode", ["prefill_first", "concurrent"])
def test_chunked_prefill(chunked: Pair, mode: str) -> None:
    """Chunks leave one by one, and what the producer's own prefix cache had leaves too."""
    for seed in (1, 2):
        prompt = prompt_of(900 + seed, seed)
        first = getattr(chunked, mode)(prompt, TOKENS)
        assert first.computed == TOKENS
        again = chunked.producer.run(prompt, 1, PRODUCE)  # mostly out of the producer's prefix cache
        assert again.computed <= CHUNK
        chunked.consumer.call("reset_prefix_cache")
        assert chunked.consumer.run(prompt, TOKENS, again.params).tokens == first.tokens
        chunked.consumer.call("reset_prefix_cache")
        assert chunked.consumer.run(prompt, TOKENS).tokens == first.tokens
    chunked.settled()


def test_layers_leave_while_the_prefill_goes_on(chunked: Pair) -> None:
    """Mode `concurrent`: what is computed arrives before the producer's request has ended."""
    prompt, known = prompt_of(1400, 5), chunked.describe()
    before = chunked.consumer.call("stats")["payload_bytes"]
    chunked.producer.call("pause", True)
    prefill, decode = chunked.begin_concurrent(prompt, TOKENS, known)
    for _ in range(2):
        chunked.producer.call("step_once")
    until(lambda: chunked.consumer.call("stats")["payload_bytes"] > before, LEASES["transfer"]["lease_s"])
    assert chunked.producer.call("take", prefill) is None
    chunked.producer.call("pause", False)
    output = chunked.consumer.wait(decode)
    assert chunked.producer.wait(prefill).finish_reason == "length"
    chunked.consumer.call("reset_prefix_cache")
    assert (output.tokens, output.computed) == (chunked.consumer.run(prompt, TOKENS).tokens, TOKENS)
    chunked.settled()
    assert len(chunked.producer.call("take_observed", "exposed_seconds")) > 0


def test_only_what_the_consumer_lacks_travels(chunked: Pair) -> None:
    start, tail = prompt_of(512, 11), prompt_of(200, 12)
    chunked.prefill_first(start, TOKENS)
    before = chunked.consumer.call("stats")["payload_bytes"]
    output = chunked.prefill_first(start + tail, TOKENS)
    moved = chunked.consumer.call("stats")["payload_bytes"] - before
    alone = chunked.consumer.run(start + tail, TOKENS)
    assert output.tokens == alone.tokens
    per_token = 2 * 2 * 3 * 64 * getattr(torch, DTYPE).itemsize  # layers, K and V, heads, channels
    assert moved == (len(start + tail) - 1 - len(start)) * per_token
    chunked.settled()


def test_whole_prompt_held_by_the_consumer(chunked: Pair) -> None:
    """Nothing travels, and the producer is let go at once."""
    prompt = prompt_of(129, 21)
    chunked.consumer.run(prompt, 1)
    before = chunked.consumer.call("stats")["payload_bytes"]
    first = chunked.producer.run(prompt, 1, PRODUCE)
    chunked.consumer.run(prompt, TOKENS, first.params)
    assert chunked.consumer.call("stats")["payload_bytes"] == before
    chunked.settled()


def test_idle_engine_keeps_stepping(chunked: Pair) -> None:
    """Blocks are held after the last request has ended, and freed without another one to drive the engine."""
    first = chunked.producer.run(prompt_of(300, 31), 1, PRODUCE)
    assert chunked.producer.call("has_work")
    chunked.consumer.run(prompt_of(300, 31), 1, first.params)
    until(lambda: not chunked.producer.call("has_work"))
    chunked.settled()


def test_lease_of_the_producer(chunked: Pair) -> None:
    """No consumer comes: blocks go back after `hold_s`, not before. One that comes later computes the prompt."""
    prompt = prompt_of(300, 41)
    first = chunked.producer.run(prompt, 1, PRODUCE)
    start = time.monotonic()
    assert chunked.producer.call("free_blocks") < chunked.free[0]
    until(lambda: chunked.producer.call("free_blocks") == chunked.free[0])
    assert time.monotonic() - start > LEASES["transfer"]["hold_s"] - 0.5
    late = chunked.consumer.run(prompt, TOKENS, first.params)
    assert late.finish_reason == "length"
    assert late.computed == len(prompt) + TOKENS - 1
    chunked.settled()


def test_a_producer_that_says_nothing(chunked: Pair) -> None:
    """The lease covers connecting, whatever a handshake may take."""
    prompt, start = prompt_of(300, 45), time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        params = {"do_remote_prefill": True, "transfer_id": "t", "remote_engine_id": "mute"}
        output = chunked.consumer.run(prompt, TOKENS, {**params, "remote_addresses": [address]})
    assert output.computed == len(prompt) + TOKENS - 1
    assert time.monotonic() - start < LEASES["transfer"]["handshake_timeout_s"] / 2
    chunked.settled()


@pytest.mark.parametrize("mode", ["prefill_first", "concurrent"])
def test_abort_of_the_consumer_before_the_producer_is_done(chunked: Pair, mode: str) -> None:
    """The consumer's client leaves while its KV is awaited: both sides let go, and the next request is served."""
    prompt = prompt_of(700, 51)
    order: dict[str, Any] = dict(PRODUCE, transfer_id=uuid.uuid4().hex)
    params: dict[str, Any] = dict(chunked.describe(), transfer_id=order["transfer_id"])
    if mode == "concurrent":
        order["rendezvous"] = mode
    chunked.consumer.call("pause", True)
    decode = chunked.consumer.add(prompt, TOKENS, params)
    chunked.consumer.call("step_once")
    chunked.consumer.call("abort", decode)
    chunked.consumer.call("pause", False)
    chunked.producer.run(prompt, 1, order)
    chunked.settled()
    assert chunked.prefill_first(prompt, TOKENS).finish_reason == "length"
    chunked.settled()


def test_abort_of_a_consumer_that_was_never_scheduled(chunked: Pair) -> None:
    prompt = prompt_of(300, 61)
    first = chunked.producer.run(prompt, 1, PRODUCE)
    chunked.consumer.call("pause", True)
    decode = chunked.consumer.add(prompt, TOKENS, first.params)
    chunked.consumer.call("abort", decode)
    chunked.consumer.call("pause", False)
    start = time.monotonic()
    chunked.settled()
    assert time.monotonic() - start < LEASES["transfer"]["hold_s"] - 0.5  # let go, not expired


def test_abort_of_the_producer(chunked: Pair) -> None:
    """The producer's request is aborted in the middle of its prefill: the consumer computes the prompt."""
    prompt = prompt_of(1400, 71)
    alone = chunked.consumer.run(prompt, TOKENS)
    chunked.consumer.call("reset_prefix_cache")
    known = chunked.describe()
    chunked.producer.call("pause", True)
    prefill, decode = chunked.begin_concurrent(prompt, TOKENS, known)
    for _ in range(2):
        chunked.producer.call("step_once")
    chunked.producer.call("abort", prefill)
    chunked.producer.call("pause", False)
    output = chunked.consumer.wait(decode)
    assert output.tokens == alone.tokens
    assert output.computed == len(prompt) + TOKENS - 1
    chunked.settled()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])  # 2: see test_preemption.py
def test_preempted_producer(models: Path, ranks: int) -> None:
    """Requests that are preempted in mid-prefill drain, are computed again, and arrive under the same transfer id.

    Several ranks stop at different places, and agree on what is sent again.
    """
    model, same = checkpoint(models, kv_heads=4), {"dtype": "float32"}
    small = {
        "tensor_parallel_size": ranks,
        **same,
        "num_gpu_blocks_override": 70,
        "max_num_batched_tokens": 192,
        "long_prefill_token_threshold": 64,
        "scheduler_reserve_full_isl": False,
    }
    pair = pair_of(model, small, dict(same))
    prompts = [prompt_of(1200, 80 + i) for i in range(3)]
    alone = [pair.consumer.run(prompt, TOKENS) for prompt in prompts]
    names = [pair.begin_concurrent(prompt, TOKENS) for prompt in prompts]
    outputs = [pair.consumer.wait(decode) for _, decode in names]
    for prefill, _ in names:
        pair.producer.wait(prefill)
    assert pair.producer.call("preemptions") > 0
    assert [output.tokens for output in outputs] == [output.tokens for output in alone]
    assert [output.computed for output in outputs] == [TOKENS] * 3
    for engine, free in zip((pair.producer, pair.consumer), pair.free, strict=True):
        until(lambda engine=engine, free=free: engine.call("free_blocks") == free)
    pair.close()


def test_retry_of_a_transfer_that_was_consumed(chunked: Pair) -> None:
    """The producer has given the blocks back, and says so at once: no lease is waited for."""
    prompt = prompt_of(400, 92)
    first = chunked.producer.run(prompt, 1, PRODUCE)
    loaded = chunked.consumer.run(prompt, TOKENS, dict(first.params or {}))
    chunked.settled()
    start = time.monotonic()
    for _ in range(2):
        chunked.consumer.call("reset_prefix_cache")
        again = chunked.consumer.run(prompt, TOKENS, dict(first.params or {}))
        assert (again.tokens, again.computed) == (loaded.tokens, len(prompt) + TOKENS - 1)
    assert time.monotonic() - start < LEASES["transfer"]["lease_s"] / 2
    chunked.settled()


def test_connecting_fails_in_a_way_that_nobody_foresaw(chunked: Pair) -> None:
    """The request is computed, as the policy says, and the engine lives on."""
    prompt = prompt_of(300, 93)
    params = {"do_remote_prefill": True, "transfer_id": "t", "remote_engine_id": "new"}
    chunked.consumer.call("break_connecting", True)
    output = chunked.consumer.run(prompt, TOKENS, {**params, "remote_addresses": ["127.0.0.1:1"]})
    chunked.consumer.call("break_connecting", False)
    assert output.computed == len(prompt) + TOKENS - 1
    assert chunked.prefill_first(prompt_of(300, 94), TOKENS).computed == TOKENS
    chunked.settled()


def test_second_use_of_a_transfer(chunked: Pair) -> None:
    """Two requests of one transfer id at once: one loads, the other computes; both are right."""
    prompt, start = prompt_of(400, 91), time.monotonic()
    first = chunked.producer.run(prompt, 1, PRODUCE)
    names = [chunked.consumer.add(prompt, TOKENS, dict(first.params or {})) for _ in range(2)]
    outputs = [chunked.consumer.wait(name) for name in names]
    assert outputs[0].tokens == outputs[1].tokens
    assert time.monotonic() - start < LEASES["transfer"]["lease_s"] / 2
    chunked.settled()


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "transfer_id": 7, "remote_engine_id": "x", "remote_addresses": ["127.0.0.1:1"]},
        {"do_remote_prefill": True, "transfer_id": "t", "remote_engine_id": "x", "remote_addresses": ["nowhere"]},
        {
            "do_remote_prefill": True,
            "transfer_id": "t" * 300,
            "remote_engine_id": "x",
            "remote_addresses": ["127.0.0.1:1"],
        },
        {
            "do_remote_prefill": True,
            "transfer_id": "t",
            "remote_engine_id": "x",
            "remote_addresses": ["x" * 70 + ":1"] * 5,
        },
        {
            "do_remote_prefill": True,
            "transfer_id": "\ud800",
            "remote_engine_id": "x",
            "remote_addresses": ["127.0.0.1:1"],
        },
        {"do_remote_decode": True, "rendezvous": "never"},
        {"do_remote_decode": True},  # a consumer is no producer
    ],
)
def test_wrong_params_are_computed_locally(chunked: Pair, params: dict[str, Any]) -> None:
    """Clients write these: none may end the engine."""
    prompt = prompt_of(50, 101)
    output = chunked.consumer.run(prompt, TOKENS, params)
    assert output.finish_reason == "length"
    chunked.settled()


@pytest.mark.parametrize("mode", ["prefill_first", "concurrent"])
@pytest.mark.parametrize("size", [0, MAX_PAYLOAD_BYTES])
def test_a_payload_is_in_the_consumers_answer(chunked: Pair, mode: str, size: int) -> None:
    payload = base64.b64encode(random.randbytes(size)).decode()
    assert answer(chunked, mode, payload, True) == {"payload": payload}
    chunked.settled()


def test_requests_go_on_without_a_payload(chunked: Pair) -> None:
    """Where the consumer does not ask for one, or the producer has none."""
    assert answer(chunked, "concurrent", "AAAA", False) is None
    assert answer(chunked, "prefill_first", None, True) is None
    chunked.settled()


def answer(pair: Pair, mode: str, payload: str | None, wants: bool) -> dict[str, Any] | None:
    """`kv_transfer_params` of the consumer's answer to a request whose prompt it has loaded."""
    prompt, name = prompt_of(200, random.getrandbits(32)), uuid.uuid4().hex
    order = {**PRODUCE, "transfer_id": name, "rendezvous": mode} | ({"payload": payload} if payload is not None else {})
    take = {**pair.describe(), "transfer_id": name, "wants_payload": wants}
    producer = pair.producer.add(prompt, 1, order)
    if mode == "prefill_first":
        pair.producer.wait(producer)
    output = pair.consumer.run(prompt, TOKENS, take)
    if mode == "concurrent":
        pair.producer.wait(producer)
    assert output.computed == TOKENS
    return output.params
