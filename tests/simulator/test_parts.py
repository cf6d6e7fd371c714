"""Clock, time series, KV blocks, decode batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkv.errors import InputError
from hetkv.simulator.batch import DecodeBatch
from hetkv.simulator.events import Events
from hetkv.simulator.kv import KVBlocks
from hetkv.simulator.pages import Pages
from hetkv.simulator.request import Request
from hetkv.simulator.series import Series


def test_events_run_in_order_of_time_then_of_pushing():
    events, seen = Events(), []
    for time, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        events.at(time, lambda argument: seen.append((events.now, argument)), name)
    events.run(until=1.5)
    assert seen == [(1.0, "a"), (1.0, "b")]
    assert events.now == 1.5
    with pytest.raises(ValueError, match=r"clock is at 1\.5"):
        events.at(1.0, seen.append)
    with pytest.raises(ValueError):
        events.at(float("nan"), seen.append)
    events.run()
    assert seen[-1] == (2.0, "c")


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 1.0, 3600.0])
def test_events_are_handled_in_the_order_of_a_sorted_list(gap: float) -> None:
    # Some at one time, some in the past of the interval in progress, thousands within one and none within many.
    random = np.random.default_rng(7)
    events, pushed, seen = Events(), [], []

    def push(at: float) -> None:
        pushed.append((at, len(pushed)))
        events.at(at, handle, pushed[-1])

    def handle(event: tuple[float, int]) -> None:
        assert events.now == event[0]
        seen.append(event)
        if len(pushed) < 20_000:
            for delay in random.exponential(gap, random.integers(0, 4)):
                push(events.now + random.choice([0.0, 1e-3, 1.0, 50.0]) * float(delay))
        if len(seen) == 5000:
            events.stop()

    for at in random.exponential(gap, 2000):
        push(float(at))
    push(math.inf)
    events.run(until=gap / 7)
    assert events.now == gap / 7
    assert seen == sorted(p for p in pushed if p[0] <= gap / 7)
    events.run()
    assert len(seen) == 5000
    assert len(events) == len(pushed) - 5000
    events._stopped = False
    events.run()
    assert seen == sorted(pushed)
    assert len(events) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 50), st.integers(-3, 5)), max_size=60), st.sampled_from([2, 8, 64]))
def test_series_keeps_the_integral_in_few_bins(changes, bins):
    series = Series(bins=bins, width=0.25)
    now = value = integral = 0.0
    for gap, delta in changes:
        integral += value * gap
        now, value = now + gap, value + delta
        series.add(now, delta)
    now, integral = now + 3, integral + value * 3
    assert series.integral(now) == pytest.approx(integral, abs=1e-6)
    centres, means = series.averages(now)
    assert len(centres) <= bins
    assert np.all(np.diff(centres) > 0)
    left = np.arange(len(centres)) * series.width
    assert float(np.sum(means * (np.minimum(left + series.width, now) - left))) == pytest.approx(integral, abs=1e-6)


def test_prefix_cache_shares_evicts_the_oldest_and_counts():
    kv = KVBlocks(total=64, block_size=16, hash_tokens=128)  # a hash is 8 blocks
    assert kv.take(16)
    assert kv.share((1, 2), 0, 256) == 2  # the request's 16 blocks are shared now
    kv.drop((1, 2))
    assert (kv.free, kv.shared, kv.available) == (48, 16, 64)
    assert kv.match((1, 2, 3), 1000) == 2
    assert kv.match((1, 2), 256) == 1  # one token at least is left to compute
    assert kv.match((9, 2), 1000) == 0
    assert kv.take(56)  # needs one of the two: the end of the chain goes first
    assert kv.match((1, 2), 1000) == 1
    kv.hold((1,))
    assert not kv.take(1)
    kv.drop((1,))
    kv.give(56)
    assert kv.take(64)
    assert kv.shared == 0
    kv.reset()
    assert kv.free == 64


def test_duplicate_prefix_stays_with_its_request():
    kv = KVBlocks(total=64, block_size=16, hash_tokens=128)
    assert kv.take(32)
    assert kv.share((1, 2), 0, 256) == 2
    assert kv.share((1, 2), 0, 256) == 0
    with pytest.raises(InputError, match="block_size 48 does not divide"):
        KVBlocks(64, 48, 512)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(2, 60)), min_size=1, max_size=12),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([(1, 0, 0), (1, 3, 9), (0, 1, 33), (2, 3, 64)]),
)
def test_batch_growth_equals_counting_pages(lengths, size, layers):
    pages = Pages(size, *layers)
    batch = DecodeBatch(pages)
    for i, (prompt, output) in enumerate(lengths):
        request = Request(i, 0.0, prompt, output)
        request.generated = 1
        batch.join(request)
    while len(batch):
        steps = batch.to_next_change()
        assert steps > 0
        tokens = [r.prompt + r.output - (r.finish_step - batch.steps) - 1 for r in batch.members]
        assert batch.context == sum(tokens)
        for k in range(steps + 1):
            assert batch.growth(k) == sum(pages.kept(t + k) - pages.kept(t) for t in tokens)
        for budget in (0, 1, 5):
            fit = batch.steps_within(budget, steps)
            assert batch.growth(fit) <= budget
            assert fit == steps or batch.growth(fit + 1) > budget
        left = min(r.finish_step for r in batch.members) - batch.steps
        batch.advance(steps)
        done = batch.pop_finished()
        assert bool(done) == (left == steps)
        assert all(r.generated == r.output for r in done)
