"""Continuous batching alone: it runs the steps that the simulator runs, and hands out the blocks that it counts."""

from __future__ import annotations

from math import inf, isnan, nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkv.errors import InputError
from hetkv.runtime.batching import Batching, Limits
from hetkv.runtime.block_manager import BlockManager, prefix_hashes
from hetkv.runtime.sampling import Sampling
from hetkv.runtime.sequence import Sequence
from hetkv.simulator.kv import KVBlocks
from hetkv.simulator.request import FINISHED
from tests.simulator.cases import PLAIN, Case, Steps, cases

MODEL = Steps(PLAIN)


class Times:
    """Of one request, as the simulator records them."""

    def __init__(self) -> None:
        self.scheduled = self.first_token = self.last_token = nan
        self.cached = 0


def run(case: Case, requests: list[Any]) -> tuple[dict[int, Times], int]:
    """The runtime's batching under the simulator's clock and step times; and how often it preempted."""
    blocks = BlockManager(case.kv_blocks, case.block_size, 16 if case.prefix_caching else 0)
    batching = Batching(blocks, Limits(case.max_num_seqs, case.max_num_batched_tokens, case.chunked_prefill))
    times = {request.id: Times() for request in requests}
    to_come, now, idle = list(requests), 0.0, True
    while to_come or len(batching):
        while to_come and to_come[0].arrival <= now:
            request = to_come.pop(0)
            sampling = Sampling(max_tokens=request.output)
            hashes = (request.hashes or ()) if case.prefix_caching else ()
            batching.waiting.append(Sequence(str(request.id), [0] * request.prompt, sampling, hashes=hashes))
            if idle:
                break  # the simulator starts what comes first, at once
        step = batching.plan()
        idle = not step
        if idle:
            now = max(now, to_come[0].arrival)
            continue
        decode = [chunk for chunk in step if chunk.sequence.id in batching.decoding]
        prompts = [chunk for chunk in step if chunk.sequence.id in batching.prefilling]
        for chunk in prompts:
            at = times[int(chunk.sequence.id)]
            if isnan(at.scheduled):
                at.scheduled, at.cached = now, chunk.sequence.start
        tokens = sum(chunk.stop - chunk.start for chunk in prompts)
        now += MODEL.step_seconds(len(decode), sum(chunk.start for chunk in decode), tokens, 0.0)
        for sequence in batching.advance(step):
            at = times[int(sequence.id)]
            sequence.tokens.append(0)
            sequence.generated += 1
            at.first_token = now if isnan(at.first_token) else at.first_token
            if sequence.generated == sequence.sampling.max_tokens:
                at.last_token = now
                batching.end(sequence)
        held = sum(len(sequence.blocks) for sequence in batching)
        assert blocks.available + held >= blocks.total or case.prefix_caching
    assert blocks.available == blocks.total
    return times, batching.preemptions


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_steps_are_those_of_the_simulator(case: Case) -> None:
    """Same arrivals, same step times: each request is scheduled, begins and ends when the simulator says."""
    case = case.without(
        disaggregated=False, counts=(1, 1), outages=[], prefill_routing="round_robin", prefix_caching=False, kv=PLAIN
    )
    _, columns, _ = case.run(skip_ahead=False)
    served = [request for request in case.requests() if columns["status"][request.id] == FINISHED]
    times, preemptions = run(case, served)
    assert preemptions == columns["preemptions"].sum()
    for request in served:
        for name in ("scheduled", "first_token", "last_token"):
            assert getattr(times[request.id], name) == pytest.approx(columns[name][request.id], rel=1e-9), name


@settings(max_examples=100, deadline=None)
@given(case=cases(prefix=True))
def test_prefixes_are_found_as_the_simulator_finds_them(case: Case) -> None:
    case = case.without(
        disaggregated=False, counts=(1, 1), outages=[], prefill_routing="round_robin", kv_blocks=1000, kv=PLAIN
    )
    _, columns, _ = case.run(skip_ahead=False)
    served = [request for request in case.requests() if columns["status"][request.id] == FINISHED]
    times, _ = run(case, served)
    for request in served:
        assert times[request.id].cached == columns["cached"][request.id]
        assert times[request.id].last_token == pytest.approx(columns["last_token"][request.id], rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_blocks_are_those_that_the_simulator_counts(data: st.DataObject) -> None:
    """The same calls on both; block ids are never handed out twice, and a prefix's blocks stay its own."""
    counts, blocks = KVBlocks(40, 2, 4), BlockManager(40, 2, 4)
    own: list[list[int]] = []
    held: list[tuple[tuple[int, ...], list[int]]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["take", "give", "share", "hold", "drop"]))
        if action == "take":
            number = data.draw(st.integers(0, 12))
            got = blocks.take(number)
            assert counts.take(number) == (got is not None)
            if got:
                own.append(got)
        elif action == "give" and own:
            gone = own.pop(data.draw(st.integers(0, len(own) - 1)))
            blocks.give(gone)
            counts.give(len(gone))
        elif action == "share" and own:
            mine = own.pop()
            family = data.draw(st.integers(0, 3))
            hashes = tuple(family * 100 + i for i in range(len(mine) // 2))
            now = blocks.share(hashes, 0, 2 * len(mine), mine)
            assert counts.share(hashes, 0, 2 * len(mine)) == now
            counts_left = len(mine) - 2 * now
            if now:
                held.append((hashes[:now], mine[: 2 * now]))
            if counts_left:
                own.append(mine[2 * now :])
        elif action == "hold":
            family = data.draw(st.integers(0, 3))
            hashes = tuple(family * 100 + i for i in range(6))
            found = blocks.match(hashes, 100)
            assert counts.match(hashes, 100) == found
            counts.hold(hashes[:found])
            if found:
                held.append((hashes[:found], blocks.hold(hashes[:found])))
        elif action == "drop" and held:
            hashes, _ = held.pop(data.draw(st.integers(0, len(held) - 1)))
            blocks.drop(hashes)
            counts.drop(hashes)
        assert (blocks.free, blocks.available) == (counts.free, counts.available)
        assert len({block for ids in own for block in ids}) == sum(map(len, own))
        for hashes, ids in held:
            assert not {block for other in own for block in other} & set(ids)
            assert blocks.hold(hashes) == ids
            blocks.drop(hashes)


def test_a_prefix_unit_is_whole_blocks() -> None:
    with pytest.raises(InputError, match="blocks of 48 tokens do not divide"):
        BlockManager(10, 48, 64)


def test_a_hash_stands_for_all_that_comes_before() -> None:
    first, second = prefix_hashes(range(130), 64), prefix_hashes([1, *range(1, 130)], 64)
    assert len(first) == len(second) == 2
    assert not set(first) & set(second)
    assert prefix_hashes(range(64), 64) == first[:1]
    assert prefix_hashes(range(130), 0) == ()


def test_a_sequence_that_is_sent_keeps_its_blocks() -> None:
    """Decoding ones make room for each other; what a peer is reading is never preempted, and no prompt waits for it."""
    blocks = BlockManager(8, 4)
    batching = Batching(blocks, Limits(8, 64))
    sent = Sequence("sent", [0] * 15, Sampling(max_tokens=5), goes_to="decode-0")
    batching.waiting += [Sequence("a", [0] * 8, Sampling(max_tokens=9)), sent]
    for sequence in batching.advance(batching.plan()):
        sequence.tokens.append(0)
    assert sent.id in batching.holding
    for _ in range(12):
        assert len(sent.blocks) == 4
        for sequence in batching.advance(batching.plan()):
            sequence.tokens.append(0)
    assert batching.preemptions > 0
    batching.end(sent)
    for sequence in list(batching):
        batching.end(sequence)
    assert blocks.free == 8


def test_no_prompt_is_longer_than_a_budget() -> None:
    batching = Batching(BlockManager(100, 4), Limits(8, 10))
    batching.waiting += [Sequence(name, [0] * 25, Sampling(max_tokens=5)) for name in "ab"]
    steps = [[(c.sequence.id, c.start, c.stop) for c in step] for step in (batching.plan(), batching.plan())]
    assert steps[0] == [("a", 0, 10)] == steps[1]  # what was not computed is planned again
    assert inf > len(batching) == 2
