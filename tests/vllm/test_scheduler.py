"""What vLLM's scheduler does with this connector from a request's arrival to its end: the behaviours that vLLM's tests
of its own connectors ask for, as far as they are any connector's."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any, Literal

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.request import Request, RequestStatus

from hetkv.integrations.vllm.metadata import Load, Reported
from tests.vllm.engines import checkpoint
from tests.vllm.scheduling import BLOCK, PRODUCE, Scheduled, consume

CONCURRENT = {**PRODUCE, "rendezvous": "concurrent", "transfer_id": "t"}


@pytest.fixture
def model(models: Path) -> str:
    return checkpoint(models)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(10, 1000) for _ in range(length)]


def computed(instance: Scheduled, prompt: list[int]) -> None:
    """Have a prompt in the prefix cache."""
    instance.add(prompt, max_tokens=1)
    instance.step()
    instance.check_empty()


# The producer.


@pytest.mark.parametrize("length", [1, BLOCK // 2, BLOCK, 2 * BLOCK + BLOCK // 2])
def test_a_producers_blocks_stay_until_they_are_sent(model: str, length: int) -> None:
    """Also those of a prompt that fills none."""
    producer = Scheduled(model, "kv_producer")
    request = producer.add(prompt_of(length), PRODUCE, max_tokens=1)
    blocks = -(-length // BLOCK)
    step = producer.step()
    assert step.output.num_scheduled_tokens == {request.request_id: length}
    [answer] = step.answers
    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.kv_transfer_params is not None
    assert answer.kv_transfer_params["do_remote_prefill"] is True
    held = producer.blocks(request)
    assert len(held) == blocks
    step = producer.step()
    [send] = step.orders.held
    assert (send.request_id, send.num_tokens, send.stop) == (request.request_id, length, length)
    assert send.blocks == (held,)
    for _ in range(3):
        assert not producer.step().orders.any_orders
        assert producer.blocks(request) == held
        assert producer.side.pending
    producer.step(sent={request.request_id})
    producer.check_empty()


def test_a_producer_sends_what_its_prefix_cache_had(model: str) -> None:
    producer, prompt = Scheduled(model, "kv_producer"), prompt_of(3 * BLOCK + 5)
    computed(producer, prompt)
    request = producer.add(prompt[: 2 * BLOCK + 9], PRODUCE, max_tokens=1)
    step = producer.step()
    assert step.output.num_scheduled_tokens == {request.request_id: 9}
    [send] = producer.step().orders.held
    assert send.stop == 2 * BLOCK + 9
    assert len(send.blocks[0]) == 3
    producer.step(sent={request.request_id})
    producer.check_empty()


@pytest.mark.parametrize("kind", [set, list])
def test_an_abort_frees_no_block_that_is_read(model: str, kind: Any) -> None:
    """The client leaves when its prefill is done and its KV travels. Workers name requests in a set, or in a list."""
    producer = Scheduled(model, "kv_producer")
    request = producer.add(prompt_of(2 * BLOCK + 7), PRODUCE, max_tokens=1)
    producer.step()
    producer.step()
    held = producer.blocks(request)
    producer.abort(request)
    producer.step()
    assert producer.blocks(request) == held
    producer.step(sent=kind([request.request_id]))
    producer.check_empty()


def test_an_abort_before_the_prefill_is_done(model: str) -> None:
    """Nothing is held for a consumer; where layers have left, blocks stay until nobody reads them."""
    producer = Scheduled(model, "kv_producer", chunk=BLOCK)
    request = producer.add(prompt_of(3 * BLOCK), PRODUCE, max_tokens=1)
    producer.step()
    producer.abort(request)
    assert not producer.step().orders.held
    producer.check_empty()
    request = producer.add(prompt_of(3 * BLOCK, 1), CONCURRENT, max_tokens=1)
    assert producer.step().orders.computing
    held = producer.blocks(request)
    producer.abort(request)
    step = producer.step()
    assert step.orders.dropped == {request.request_id}
    assert producer.blocks(request) == held
    producer.step(sent={request.request_id})
    producer.check_empty()


def test_chunks_are_offered_as_they_are_computed(model: str) -> None:
    """Each with the blocks so far, also where a chunk needs no new block; a payload in the first order alone."""
    producer, payload = Scheduled(model, "kv_producer", chunk=BLOCK // 2), b"first token"
    params = {**CONCURRENT, "payload": base64.b64encode(payload).decode()}
    request = producer.add(prompt_of(2 * BLOCK), params, max_tokens=1)
    sends = [send for _ in range(4) for send in producer.step().orders.computing]
    assert [(send.stop, len(send.blocks[0])) for send in sends] == [(16, 1), (32, 1), (48, 2), (64, 2)]
    held = producer.step().orders.held
    assert [send.payload for send in sends + held] == [payload, None, None, None, None]
    producer.step(sent={request.request_id})
    producer.check_empty()


def test_a_preempted_request_is_offered_with_its_payload_again(model: str) -> None:
    """Its transfer was ended, and what it carried with it."""
    producer = Scheduled(model, "kv_producer", chunk=BLOCK)
    params = {**CONCURRENT, "payload": base64.b64encode(b"again").decode()}
    request = producer.add(prompt_of(3 * BLOCK), params, max_tokens=1)
    assert [send.payload for _ in range(2) for send in producer.step().orders.computing] == [b"again", None]
    assert producer.core.reset_prefix_cache(reset_running_requests=True)
    orders = [producer.step().orders for _ in range(3)]
    assert orders[0].preempted == {request.request_id}
    assert [(send.stop, send.payload) for order in orders for send in order.computing] == [
        (BLOCK, b"again"),
        (2 * BLOCK, None),
        (3 * BLOCK, None),
    ]
    producer.step()
    producer.step(sent={request.request_id})
    producer.check_empty()


# The consumer.


def loading(consumer: Scheduled, length: int, seed: int = 0, **more: Any) -> tuple[Request, Load]:
    """A request whose KV was asked for."""
    request = consumer.add(prompt_of(length, seed), consume(f"t{seed}", **more))
    step = consumer.step()
    assert request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
    [load] = (load for load in step.orders.loads if load.request_id == request.request_id)
    return request, load


@pytest.mark.parametrize("length", [2, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + BLOCK // 2])
def test_a_consumer_computes_the_prompts_last_token(model: str, length: int) -> None:
    """All others are asked for; blocks are in nobody's prefix cache before they are filled."""
    consumer = Scheduled(model, "kv_consumer")
    request, load = loading(consumer, length)
    assert (load.cached, load.stop) == (0, length - 1)
    assert request.num_computed_tokens == length - 1
    held = consumer.blocks(request)
    assert len(held) >= -(-(length - 1) // BLOCK)
    assert load.blocks[0] == held
    for _ in range(2):
        step = consumer.step()
        assert not step.output.num_scheduled_tokens
        assert not step.answers
        assert consumer.cached(held) == 0
        assert consumer.side.pending
    consumer.step(received={request.request_id})
    step = consumer.step()
    assert step.output.num_scheduled_tokens == {request.request_id: 1}
    assert consumer.cached(consumer.blocks(request)) == length // BLOCK
    [answer] = consumer.step(stop=True).answers
    assert answer.finish_reason is FinishReason.STOP
    consumer.check_empty()


def test_one_token_is_not_asked_for(model: str) -> None:
    """The producer is let go, and the token computed here."""
    consumer = Scheduled(model, "kv_consumer")
    request = consumer.add(prompt_of(1), consume("t"))
    step = consumer.step(stop=True)
    assert step.output.num_scheduled_tokens == {request.request_id: 1}
    [load] = step.orders.loads
    assert not load.awaited
    consumer.check_empty()


def test_only_what_the_prefix_cache_lacks_is_asked_for(model: str) -> None:
    consumer, prompt = Scheduled(model, "kv_consumer"), prompt_of(3 * BLOCK + 5)
    computed(consumer, prompt[: 2 * BLOCK])
    request = consumer.add(prompt, consume("t"))
    [load] = consumer.step().orders.loads
    assert (load.cached, load.stop) == (2 * BLOCK, 3 * BLOCK + 4)
    consumer.step(received={request.request_id})
    consumer.step(stop=True)
    consumer.check_empty()


def test_other_requests_go_on_while_kv_travels(model: str) -> None:
    consumer = Scheduled(model, "kv_consumer")
    request, _ = loading(consumer, 2 * BLOCK)
    other = consumer.add(prompt_of(2 * BLOCK, 1))
    assert consumer.step().output.num_scheduled_tokens == {other.request_id: 2 * BLOCK}
    assert consumer.step(received={request.request_id}).output.num_scheduled_tokens == {other.request_id: 1}
    assert consumer.step(stop=True).output.num_scheduled_tokens == {request.request_id: 1, other.request_id: 1}
    consumer.check_empty()


def test_a_request_that_finds_no_blocks_waits_and_asks_once_it_has_them(model: str) -> None:
    consumer = Scheduled(model, "kv_consumer", blocks=6)
    other = consumer.add(prompt_of(3 * BLOCK + 3))
    consumer.step()
    request = consumer.add(prompt_of(3 * BLOCK, 1), consume("t"))
    step = consumer.step()
    assert not step.orders.loads
    assert request.status is RequestStatus.WAITING
    consumer.step(stop=True)
    assert other.is_finished()
    [load] = consumer.step().orders.loads
    assert (load.request_id, load.stop) == (request.request_id, 3 * BLOCK - 1)
    consumer.step(received={request.request_id})
    consumer.step(stop=True)
    consumer.check_empty()


@pytest.mark.parametrize("asked", [False, True])
def test_a_client_that_leaves_lets_the_producer_go(model: str, asked: bool) -> None:
    """Before the KV is asked for, or while it travels: then blocks stay until nothing writes to them."""
    consumer = Scheduled(model, "kv_consumer")
    if not asked:
        request = consumer.add(prompt_of(2 * BLOCK), consume("t"))
        consumer.abort(request)
        [load] = consumer.step().orders.loads
        assert (load.request_id, load.awaited) == (request.request_id, False)
        consumer.check_empty()
        return
    request, _ = loading(consumer, 2 * BLOCK)
    held = consumer.blocks(request)
    consumer.abort(request)
    assert consumer.step().orders.aborted_loads == {request.request_id}
    assert consumer.blocks(request) == held
    consumer.step(received={request.request_id})
    consumer.check_empty()


# Loads that fail.


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_load_that_fails(model: str, policy: Literal["recompute", "fail"], groups: int) -> None:
    """By its blocks in one cache group, by its name where there are several. Its neighbour is not touched, and what
    was not filled is in nobody's prefix cache."""
    consumer = Scheduled(model, "kv_consumer", policy=policy, window=None if groups == 1 else 4 * BLOCK)
    request, load = loading(consumer, 3 * BLOCK)
    neighbour, _ = loading(consumer, 3 * BLOCK, 1)
    held = consumer.blocks(request)
    arrived = {request.request_id, neighbour.request_id}
    if groups == 1:
        step = consumer.step(received=arrived, failed_blocks=load.blocks[0])
    else:
        step = consumer.step(received=arrived, failed={request.request_id})
    assert consumer.cached(held) == 0
    if policy == "fail":
        assert [(item.request_id, item.finish_reason) for item in step.answers] == [
            (request.request_id, FinishReason.ERROR)
        ]
        assert request.status is RequestStatus.FINISHED_ERROR
        step = consumer.step(stop=True)
        assert step.output.num_scheduled_tokens == {neighbour.request_id: 1}
    else:
        step = consumer.step(stop=True)
        assert step.output.num_scheduled_tokens == {request.request_id: 3 * BLOCK, neighbour.request_id: 1}
        assert not step.orders.loads
    consumer.check_empty()


def test_a_held_prefix_survives_a_failed_load(model: str) -> None:
    consumer, prompt = Scheduled(model, "kv_consumer", policy="recompute"), prompt_of(3 * BLOCK)
    computed(consumer, prompt[: 2 * BLOCK])
    request = consumer.add(prompt, consume("t"))
    [load] = consumer.step().orders.loads
    consumer.step(received={request.request_id}, failed_blocks=load.blocks[0][2:])
    assert consumer.step(stop=True).output.num_scheduled_tokens == {request.request_id: BLOCK}
    consumer.check_empty()


def test_a_payload_is_in_the_answer_and_forgotten(model: str) -> None:
    consumer = Scheduled(model, "kv_consumer")
    request, _ = loading(consumer, 2 * BLOCK, wants_payload=True)
    consumer.step(received={request.request_id}, reported=Reported(set(), {request.request_id: b"abc"}))
    [answer] = consumer.step(stop=True).answers
    assert answer.kv_transfer_params == {"payload": base64.b64encode(b"abc").decode()}
    consumer.check_empty()
