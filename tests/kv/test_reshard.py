"""Resharding: every destination element exactly once, replicas evenly, for any pair of deployments."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetkv.errors import InputError
from hetkv.kv.reshard import Route, head_elements, overlap, routes
from hetkv.kv.spec import Interval, KVSpec, LayerSpec, Segment, Shard


def deployment(spec: KVSpec, tp: int, pp: int = 1, stages: list[int] | None = None) -> list[Shard]:
    return [Shard.of(spec, tp, t, pp, p, stages) for p in range(pp) for t in range(tp)]


@st.composite
def specs(draw: st.DrawFn) -> KVSpec:
    layers: list[LayerSpec] = []
    for index in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["kv", "kv", "kv", "latent", "state", "shares"]))
        if kind == "latent":
            layers.append(LayerSpec.latent(512, 64, group=draw(st.integers(0, 2))))
        elif kind == "state":
            layers.append(LayerSpec.state(draw(st.integers(1, 9)), draw(st.integers(1, 4096)), group=1))
        else:
            shares = draw(st.integers(0, index - 1)) if kind == "shares" and index else None
            layers.append(LayerSpec.kv(draw(st.integers(1, 9)), draw(st.sampled_from([64, 80, 128])), shares=shares))
    return KVSpec(tuple(layers))


@st.composite
def deployments(draw: st.DrawFn, spec: KVSpec) -> list[Shard]:
    """TP x PP with uneven stages, several whole replicas of it, in any order."""
    num_layers, pp = len(spec.layers), draw(st.integers(1, 4))
    cuts = sorted(draw(st.lists(st.integers(0, num_layers), min_size=pp - 1, max_size=pp - 1)))
    stages = [b - a for a, b in pairwise([0, *cuts, num_layers])]
    shards = deployment(spec, draw(st.integers(1, 10)), pp, stages) * draw(st.integers(1, 3))
    return draw(st.permutations(shards))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[KVSpec, list[Shard], list[Shard]]:
    spec = draw(specs())
    return spec, draw(deployments(spec)), draw(deployments(spec))


def elements(spec: KVSpec, shard: Shard) -> set[tuple[int, int]]:
    return {(i, h) for i in range(*shard.layers) if spec.layers[i].shares is None for h in range(*shard.heads[i])}


def written(route: Route) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(*route.layers) for head in range(*route.heads)]


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_every_destination_element_is_written_exactly_once_by_a_holder(pair):
    spec, sources, destinations = pair
    held = [elements(spec, source) for source in sources]
    got: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
    for route in routes(spec, sources, destinations):
        assert route.layers.size > 0
        assert route.heads.size > 0
        assert held[route.source].issuperset(written(route))
        got[route.destination].update(written(route))
    for index, destination in enumerate(destinations):
        assert got[index] == Counter(elements(spec, destination))


@given(pairs())
@settings(max_examples=200, deadline=None)
def test_replicas_share_evenly(pair):
    """Over the elements that exactly one set of sources holds, loads differ by less than two of the largest heads."""
    spec, sources, destinations = pair
    holders: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, source in enumerate(sources):
        for element in elements(spec, source):
            holders[element].append(index)
    load: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    sizes: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for route in routes(spec, sources, destinations):
        for layer, head in written(route):
            group = tuple(holders[layer, head])
            load[group][route.source] += head_elements(spec, layer)
            sizes[group].add(head_elements(spec, layer))
    for group, loads in load.items():
        spread = max(loads[s] for s in group) - min(loads[s] for s in group)
        unit = max(sizes[group])
        assert spread <= unit if len(sizes[group]) == 1 else spread < 2 * unit


@given(pairs())
@settings(max_examples=50, deadline=None)
def test_routes_are_ordered_disjoint_and_the_same_each_time(pair):
    spec, sources, destinations = pair
    found = routes(spec, sources, destinations)
    assert found == routes(spec, list(sources), tuple(destinations))
    assert found == sorted(found, key=lambda r: (r.destination, r.source, r.layers, r.heads))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("heads", "prefill", "decode"),
    [
        (6, (3, 1), (2, 1)),
        (8, (8, 1), (1, 1)),
        (8, (1, 1), (8, 1)),
        (2, (4, 1), (1, 1)),
        (1, (1, 1), (8, 1)),
        (7, (2, 1), (3, 1)),
        (8, (1, 3), (4, 1)),
        (8, (4, 2), (3, 5)),
    ],
)
def test_named_pairs_in_both_directions(heads, prefill, decode):
    spec = KVSpec.uniform(10, heads, 128)
    for one, other in ((prefill, decode), (decode, prefill)):
        sources, destinations = deployment(spec, *one), deployment(spec, *other)
        count = Counter(
            (route.destination, *element) for route in routes(spec, sources, destinations) for element in written(route)
        )
        assert set(count.values()) == {1}
        assert len(count) == sum(len(elements(spec, d)) for d in destinations)


def test_tp3_to_tp2_is_four_rectangles():
    spec = KVSpec.uniform(4, 6, 64)
    whole = Interval(0, 4)
    assert routes(spec, deployment(spec, 3), deployment(spec, 2)) == [
        Route(0, 0, whole, Interval(0, 2)),
        Route(1, 0, whole, Interval(2, 3)),
        Route(1, 1, whole, Interval(3, 4)),
        Route(2, 1, whole, Interval(4, 6)),
    ]


def test_uneven_stages():
    spec = KVSpec.uniform(7, 2, 64)
    found = routes(spec, deployment(spec, 1, 2, [5, 2]), deployment(spec, 1, 3, [2, 4, 1]))
    assert [(r.source, r.destination, tuple(r.layers)) for r in found] == [
        (0, 0, (0, 2)),
        (0, 1, (2, 5)),
        (1, 1, (5, 6)),
        (1, 2, (6, 7)),
    ]


def test_two_heads_over_four_ranks_are_halved_by_layers():
    spec = KVSpec.uniform(8, 2, 64)
    assert routes(spec, deployment(spec, 4), deployment(spec, 1)) == [
        Route(0, 0, Interval(0, 4), Interval(0, 1)),
        Route(1, 0, Interval(4, 8), Interval(0, 1)),
        Route(2, 0, Interval(0, 4), Interval(1, 2)),
        Route(3, 0, Interval(4, 8), Interval(1, 2)),
    ]


def test_replicas_split_heads_before_layers():
    spec = KVSpec.uniform(8, 4, 64)
    assert routes(spec, [Shard.whole(spec)] * 2, [Shard.whole(spec)]) == [
        Route(0, 0, Interval(0, 8), Interval(0, 2)),
        Route(1, 0, Interval(0, 8), Interval(2, 4)),
    ]


def test_latent_ranks_pair_up():
    """Eight ranks hold the one head, eight want it: each sends one whole copy, to one peer."""
    spec = KVSpec((LayerSpec.latent(512, 64),) * 61)
    found = routes(spec, deployment(spec, 8), deployment(spec, 8))
    assert found == [Route(r, r, Interval(0, 61), Interval(0, 1)) for r in range(8)]


def test_latent_of_eight_ranks_to_one_is_an_eighth_each():
    spec = KVSpec((LayerSpec.latent(512, 64),) * 64)
    found = routes(spec, deployment(spec, 8), deployment(spec, 1))
    assert [r.layers.size for r in found] == [8] * 8


def test_a_layer_that_shares_another_cache_has_no_route():
    spec = KVSpec((LayerSpec.kv(2, 64), LayerSpec.kv(2, 64, shares=0), LayerSpec.kv(2, 64)))
    found = routes(spec, [Shard.whole(spec)], [Shard.whole(spec)])
    assert [tuple(r.layers) for r in found] == [(0, 1), (2, 3)]
    assert [layer for layer, _ in overlap(spec, Shard.whole(spec), Shard.whole(spec))] == [0, 2]


def test_a_missing_source_is_named():
    spec = KVSpec.uniform(4, 8, 64)
    with pytest.raises(InputError, match=r"layer 0, heads \[4, 8\): destination 0 needs them, no source holds them"):
        routes(spec, deployment(spec, 2)[:1], [Shard.whole(spec)])
    with pytest.raises(InputError, match=r"layer 2, heads \[0, 8\)"):
        routes(spec, deployment(spec, 1, 2)[:1], [Shard.whole(spec)])


@pytest.mark.parametrize(
    ("shard", "text"),
    [
        (Shard(Interval(0, 3), (Interval(0, 4),) * 2), r"source 0: layers \[0, 3\), the spec has 2"),
        (Shard(Interval(0, 2), (Interval(0, 4),)), "source 0: head intervals of 1 layers, the spec has 2"),
        (Shard(Interval(0, 2), (Interval(0, 4), Interval(0, 5))), r"source 0: heads \[0, 5\) of layer 1, which has 4"),
        (Shard(Interval(0, 2), (Interval(2, 2), Interval(0, 4))), r"source 0: heads \[2, 2\) of layer 0"),
    ],
)
def test_a_shard_that_does_not_fit_is_named(shard, text):
    spec = KVSpec.uniform(2, 4, 64)
    with pytest.raises(InputError, match=text):
        routes(spec, [shard], [Shard.whole(spec)])


def test_different_head_counts_in_one_layer_are_rejected():
    spec = KVSpec((LayerSpec("kv", (Segment("k", 4, 64), Segment("v", 2, 64))),))
    with pytest.raises(InputError, match=r"layer 0: segments have \[2, 4\] heads"):
        routes(spec, [Shard.whole(spec)], [Shard.whole(spec)])
