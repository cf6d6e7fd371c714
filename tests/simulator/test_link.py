"""Fair sharing and layer-wise overlap, against results worked out by hand."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkv.simulator.events import Events
from hetkv.simulator.kv_links import Flow, Links, max_min


def finish_times(port, flows, fabric=inf, latency=0.0):
    """Seconds at which each (start, source, sink, size, produced_over, layers) is visible."""
    events = Events()
    links = Links(events, port, fabric, latency)
    ends = {}
    for i, (start, source, sink, size, over, layers) in enumerate(flows):

        def begin(_, i=i, source=source, sink=sink, size=size, over=over, layers=layers):
            links.start(source, sink, size, lambda flow: ends.setdefault(i, events.now), None, over, layers)

        events.at(start, begin)
    events.run()
    assert links.flows.value == 0
    assert links.sent == pytest.approx(sum(f[3] for f in flows))
    return [ends[i] for i in range(len(flows))]


def test_alone():
    assert finish_times(100, [(1, "a", "x", 50, 0, 1)], latency=0.25) == [1.75]


def test_two_into_one_port_then_one():
    # Both at 50/s until the short one ends at 1 s; the long one has 100 left at 100/s.
    assert finish_times(100, [(0, "a", "x", 50, 0, 1), (0, "b", "x", 150, 0, 1)]) == pytest.approx([1, 2])


def test_max_min_gives_what_others_cannot_use():
    # Three into x get 1/3 each; a's other flow takes what is left of a's port.
    flows = [Flow(s, d, 1, inf, lambda f: None, None) for s, d in (("a", "x"), ("b", "x"), ("c", "x"), ("a", "y"))]
    assert list(max_min(flows, 90).values()) == pytest.approx([30, 30, 30, 60])


def test_fabric_bounds_the_sum():
    assert finish_times(100, [(0, "a", "x", 100, 0, 1), (0, "b", "y", 100, 0, 1)], fabric=100) == pytest.approx([2, 2])


def test_overlap_exposes_the_last_layer_only():
    # 10 layers over 1 s, 100 bytes: the link (1000/s) keeps up, the last layer's 10 bytes leave after the step.
    assert finish_times(1000, [(0, "a", "x", 100, 1.0, 10)]) == pytest.approx([1.01])


def test_overlap_on_a_slow_link_starts_after_the_first_layer():
    assert finish_times(50, [(0, "a", "x", 100, 1.0, 10)]) == pytest.approx([0.1 + 2.0])


@settings(max_examples=60, deadline=None)
@given(st.floats(0.1, 10), st.floats(1, 1000), st.integers(1, 80))
def test_overlap_equals_sending_layer_by_layer(seconds, port, layers):
    size = 100.0
    free = 0.0
    for layer in range(layers):  # a layer leaves when it is computed and the one before it is gone
        free = max(free, (layer + 1) * seconds / layers) + size / layers / port
    assert finish_times(port, [(0, "a", "x", size, seconds, layers)]) == pytest.approx([free])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from([inf, 5.0, 40.0])), min_size=1, max_size=15
    ),
    st.sampled_from([inf, 150.0]),
)
def test_max_min_is_feasible_and_no_flow_can_grow(pairs, fabric):
    port = 100.0
    flows = [Flow(f"s{a}", f"d{b}", 1, cap, lambda f: None, None) for a, b, cap in pairs]
    rates = max_min(flows, port, fabric)

    def used(test):
        return sum(rate for flow, rate in rates.items() if test(flow))

    total = used(lambda f: True)
    assert total <= fabric * (1 + 1e-9)
    for flow, rate in rates.items():
        out, into = used(lambda f, g=flow: f.source == g.source), used(lambda f, g=flow: f.sink == g.sink)
        assert max(out, into) <= port * (1 + 1e-9)
        assert 0 < rate <= flow.cap
        # Bottlenecked: at its cap, or largest on a full port or fabric.
        full = [f for f in flows if f.source == flow.source] if out > port * (1 - 1e-9) else []
        full2 = [f for f in flows if f.sink == flow.sink] if into > port * (1 - 1e-9) else []
        full3 = flows if total > fabric * (1 - 1e-9) else []
        largest = any(g and rate >= max(rates[f] for f in g) * (1 - 1e-9) for g in (full, full2, full3))
        assert rate >= flow.cap * (1 - 1e-9) or largest


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 5), st.integers(0, 3), st.integers(0, 2), st.floats(1, 200), st.sampled_from([0.0, 0.5, 3.0])
        ),
        min_size=2,
        max_size=12,
    ),
    st.sampled_from([inf, 150.0]),
)
def test_rates_in_progress_are_those_of_all_flows_shared_anew(flows, fabric):
    # A change that moves no other flow is not shared out again: the rates must be as if it were.
    events = Events()
    links = Links(events, 100.0, fabric)
    for start, source, sink, size, over in flows:
        begin = (f"s{source}", f"d{sink}", size, lambda flow: None, None, over, 8)
        events.at(start, lambda _, begin=begin: links.start(*begin))

    def look(_):
        running = list(links._all)
        shared = max_min(running, 100.0, fabric)
        assert [f.rate for f in running] == pytest.approx([shared[f] for f in running])

    for tick in range(400):
        events.at(0.0313 * tick, look)
    events.run()


class Eager(Links):
    """Schedules an end with every rate, also while the bytes are still being computed."""

    def _set(self, flow, rate, now):
        known = flow.epoch
        super()._set(flow, rate, now)
        if flow.cap < inf and flow.epoch != known:
            self._end_at(flow)

    def _uncap(self, flow):
        held_back = flow.rate >= flow.cap
        flow.cap = inf
        if held_back and flow in self._all:
            self._share(flow)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 5), st.integers(0, 3), st.integers(0, 2), st.floats(1, 200), st.sampled_from([0.0, 0.5, 3.0])
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([inf, 150.0]),
)
def test_ends_that_cannot_come_are_not_waited_for(flows, fabric):
    # Bytes that are still being computed do not end: leaving their ends out changes none.
    found = []
    for kind in (Links, Eager):
        events, ends = Events(), {}
        links = kind(events, 100.0, fabric, 0.01)
        for i, (start, source, sink, size, over) in enumerate(flows):

            def begin(_, i=i, source=source, sink=sink, size=size, over=over, links=links, ends=ends, events=events):
                links.start(f"s{source}", f"d{sink}", size, lambda _: ends.setdefault(i, events.now), None, over, 8)

            events.at(start, begin)
        events.run()
        found.append((ends, links.sent))
    # Not the peaks: which of two changes at one time comes first is left to rounding.
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert len(found[0][0]) == len(flows)
    assert found[0][1] == pytest.approx(found[1][1])


def test_cancelled_flow_frees_its_share_and_never_ends():
    events = Events()
    links = Links(events, 100)
    ends = []
    first = links.start("a", "x", 100, lambda f: ends.append("first"))
    links.start("b", "x", 100, lambda f: ends.append(events.now))
    events.at(1.0, lambda _: links.cancel(first))
    late = links.start("c", "x", 100, lambda f: ends.append("late"), produced_over=10, layers=1)
    links.cancel(late)
    events.run()
    assert ends == [pytest.approx(1.5)]
