"""Lists of prompts and several choices: each prompt is sent once, under a name of its own that both sides know."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from hetkv.integrations.vllm.naming import Claims, Sequence, TransferIds
from tests.vllm.engines import Engine, Pair, checkpoint

TOKENS, BLOCK = 8, 128
PRODUCE = {"do_remote_decode": True, "do_remote_prefill": False}
MODES = ("prefill_first", "concurrent")


def ids_of(name: str, n: int = 1) -> list[str]:
    """What vLLM makes of a request id that its server chose, for each of `n` choices."""
    request = EngineCoreRequest(
        request_id=name, prompt_token_ids=[1], mm_features=None, sampling_params=SamplingParams(n=n),
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    InputProcessor.assign_request_id(request)
    if n == 1:
        return [request.request_id]
    parent = ParentRequest(request)
    return [parent.get_child_info(choice)[0] for choice in range(n)]


@pytest.mark.parametrize("base", [uuid.uuid4().hex, "x", "a-1-2", "7_b-3", "cmpl-1-deadbeef"])
def test_names_of_a_list(base: str) -> None:
    """Both sides read the same place in the list from ids that differ in vLLM's random digits."""
    for position in (0, 1, 31):
        for n in (1, 6):
            mine, theirs = ([Sequence.of(name) for name in ids_of(f"cmpl-{base}-{position}", n)] for _ in range(2))
            assert {item.name("t") for item in (*mine, *theirs)} == {f"t/{position}"}
            assert len({item.prompt for item in mine}) == len({item.prompt for item in theirs}) == 1
            assert {item.group for item in (*mine, *theirs)} == {f"cmpl-{base}"}
            assert mine[0].prompt != theirs[0].prompt


@pytest.mark.parametrize("base", ["chatcmpl-x", "chatcmpl-x-3", "42", "resp_1_2", "5_6"])
def test_names_of_single_prompts(base: str) -> None:
    for n in (1, 3):
        items = {Sequence.of(name) for name in ids_of(base, n)}
        assert {(item.position, item.name("t")) for item in items} == {(0, "t/0")}
        assert len({item.group for item in items}) == 1


def test_transfer_ids_of_requests_whose_router_gave_none() -> None:
    """One for all prompts of a list; another one where the client uses its own request id again."""
    ids = TransferIds()
    first = {ids.of(Sequence.of(name)) for place in range(4) for name in ids_of(f"cmpl-x-{place}", 2)}
    again = {ids.of(Sequence.of(name)) for place in range(4) for name in ids_of(f"cmpl-x-{place}")}
    chats = {ids.of(Sequence.of(ids_of("chatcmpl-x")[0])) for _ in range(4)}
    assert (len(first), len(again), len(chats), len(first | again | chats)) == (1, 1, 4, 6)


def test_claims() -> None:
    claims = Claims()
    first, second = (Sequence.of(name) for name in ids_of("cmpl-x-0", 2))
    [stranger] = (Sequence.of(name) for name in ids_of("cmpl-x-0"))
    assert not claims.taken("t/0", first)
    claims.take("t/0", first)
    assert claims.taken("t/0", second)
    assert not claims.taken("t/0", stranger)


@pytest.fixture(scope="module")
def pair(models: Path) -> Iterator[Pair]:
    """Prefix caches on both sides; what cannot be loaded fails the request."""
    model, options = checkpoint(models), {"enable_prefix_caching": True, "policy": "fail"}
    pair = Pair(Engine(model, "kv_producer", 32, **options), Engine(model, "kv_consumer", BLOCK, **options))
    yield pair
    pair.close()


def prompt_of(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, 1000) for _ in range(length)]


@pytest.mark.parametrize("mode", MODES)
def test_choices_share_one_load(pair: Pair, mode: str) -> None:
    """The KV of a prompt travels once; further choices find it in the consumer's prefix cache."""
    prompt, n = prompt_of(700, MODES.index(mode)), 4
    alone = pair.consumer.run(prompt, TOKENS).tokens
    pair.consumer.call("reset_prefix_cache")
    transfer = uuid.uuid4().hex
    if mode == "concurrent":
        known = {**pair.describe(), "transfer_id": transfer}
        decode = pair.consumer.add(prompt, TOKENS, known, n=n)
        pair.producer.run(prompt, 1, {**PRODUCE, "rendezvous": mode, "transfer_id": transfer})
    else:
        first = pair.producer.run(prompt, 1, PRODUCE)
        decode = pair.consumer.add(prompt, TOKENS, first.params, n=n)
    output = pair.consumer.wait(decode)
    assert output.choices == [alone] * n
    assert output.computed <= n * TOKENS + (n - 1) * BLOCK
    pair.consumer.call("reset_prefix_cache")
    pair.settled()


@pytest.mark.parametrize("mode", MODES)
def test_choices_that_the_producer_computes_too(pair: Pair, mode: str) -> None:
    """A router may leave `n` in the prefill's request: it is sent once, and nothing is left over."""
    prompt, transfer = prompt_of(300, 7), uuid.uuid4().hex
    alone = pair.consumer.run(prompt, TOKENS).tokens
    pair.consumer.call("reset_prefix_cache")
    order: dict[str, Any] = dict(PRODUCE, rendezvous=mode)
    if mode == "concurrent":
        order["transfer_id"] = transfer
    known = pair.describe()
    prefill = pair.producer.add(prompt, 1, order, n=3)
    params = {**known, "transfer_id": transfer} if mode == "concurrent" else pair.producer.wait(prefill).params
    output = pair.consumer.run(prompt, TOKENS, params)
    assert (output.tokens, output.computed) == (alone, TOKENS)
    pair.producer.wait(prefill)
    pair.consumer.call("reset_prefix_cache")
    pair.settled()


@pytest.mark.parametrize("mode", MODES)
def test_another_prompt_under_the_id(pair: Pair, mode: str) -> None:
    """Never loaded: the request fails at once, as its policy says, and both sides hold nothing."""
    prompt, other, transfer = prompt_of(300, 8), prompt_of(300, 9), uuid.uuid4().hex
    order: dict[str, Any] = dict(PRODUCE, rendezvous=mode, transfer_id=transfer)
    known = {**pair.describe(), "transfer_id": transfer}
    decode = pair.consumer.add(other, TOKENS, known) if mode == "concurrent" else None
    pair.producer.run(prompt, 1, order)
    output = pair.consumer.wait(decode) if decode else pair.consumer.run(other, TOKENS, known)
    assert output.finish_reason == "error"
    assert output.tokens == []
    pair.settled()


@pytest.mark.parametrize("mode", MODES)
def test_list_under_one_id(pair: Pair, mode: str) -> None:
    """Each prompt of a list gets its own KV, in whatever order the two sides take them."""
    prompts = [prompt_of(40 + 60 * i, 20 + i) for i in range(8)]
    alone = [pair.consumer.run(prompt, TOKENS).tokens for prompt in prompts]
    pair.consumer.call("reset_prefix_cache")
    known, transfer, base = pair.describe(), uuid.uuid4().hex, uuid.uuid4().hex
    order: dict[str, Any] = dict(PRODUCE, rendezvous=mode)
    if mode == "concurrent":
        order["transfer_id"] = transfer

    def produce() -> list[str]:
        return [
            pair.producer.add(prompt, 1, order, name=f"cmpl-{base}-{place}") for place, prompt in enumerate(prompts)
        ]

    def consume(params: dict[str, Any] | None) -> dict[int, str]:
        places = sorted(range(len(prompts)), key=lambda place: -place)
        return {
            place: pair.consumer.add(prompts[place], TOKENS, params, name=f"cmpl-{transfer}-{place}")
            for place in places
        }

    if mode == "concurrent":
        decodes = consume({**known, "transfer_id": transfer})
        prefills = produce()
        answers = [pair.producer.wait(name) for name in prefills]
    else:
        answers = [pair.producer.wait(name) for name in produce()]
        decodes = consume(answers[0].params)  # vLLM's answer to a list has the first prompt's alone
    outputs = [pair.consumer.wait(decodes[place]) for place in range(len(prompts))]
    assert [output.tokens for output in outputs] == alone
    assert [output.computed for output in outputs] == [TOKENS] * len(prompts)
    pair.consumer.call("reset_prefix_cache")
    pair.settled()
