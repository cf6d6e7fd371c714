"""KV transfer over a route set, with layer-wise overlap."""

from __future__ import annotations

import pytest

from hetkv.costmodel.kv_transfer import KVRoute, Link, kv_routes, transfer_time
from hetkv.costmodel.models import model_shape
from hetkv.errors import InputError

LLAMA, DEEPSEEK = model_shape("Llama-2-70B"), model_shape("DeepSeek-V3")


def bytes_per_token(routes: list[KVRoute]) -> float:
    return sum(r.bytes_per_token * (r.stop - r.start) for r in routes)


@pytest.mark.parametrize("source", [(1, 1), (2, 1), (3, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("destination", [(1, 1), (2, 4), (3, 2), (8, 1)])
def test_every_destination_element_comes_once(source: tuple[int, int], destination: tuple[int, int]) -> None:
    routes = kv_routes(LLAMA, source, destination)
    assert bytes_per_token(routes) == pytest.approx(320 * 1024)
    assert {r.destination for r in routes} == set(range(destination[0] * destination[1]))
    assert all(0 <= r.source < source[0] * source[1] for r in routes)


def test_replicas_of_the_destination_each_get_their_copy() -> None:
    assert bytes_per_token(kv_routes(LLAMA, (8, 1), (16, 1))) == pytest.approx(2 * 320 * 1024)


def test_replicated_sources_share_the_load() -> None:
    routes = kv_routes(DEEPSEEK, (4, 1), (4, 1))
    assert sorted(r.source for r in routes) == [0, 1, 2, 3]
    assert bytes_per_token(routes) == 4 * 61 * 576 * 2


def test_a_fast_link_exposes_the_last_layer_only() -> None:
    routes = kv_routes(LLAMA, (1, 1), (1, 1))
    found = transfer_time(routes, 1000, 1.0, Link(1e12))
    layer = 320 * 1024 * 1000 / 80 / 1e12
    assert found.exposed == pytest.approx(layer)
    assert found.alone == pytest.approx(80 * layer)


def test_a_slow_link_exposes_all_but_the_prefill() -> None:
    routes = kv_routes(LLAMA, (1, 1), (1, 1))
    found = transfer_time(routes, 1000, 1.0, Link(1e8))
    assert found.exposed == pytest.approx(found.alone - 1.0 + 1.0 / 80)


def test_more_ports_are_faster_and_latency_counts_per_layer() -> None:
    one = transfer_time(kv_routes(LLAMA, (1, 1), (1, 1)), 1000, 0.0, Link(1e10))
    eight = transfer_time(kv_routes(LLAMA, (8, 1), (8, 1)), 1000, 0.0, Link(1e10))
    assert one.exposed == pytest.approx(8 * eight.exposed)
    late = transfer_time(kv_routes(LLAMA, (1, 1), (1, 1)), 1000, 0.0, Link(1e10, 1e-3))
    assert late.exposed == pytest.approx(one.exposed + 80e-3)


def test_fewer_destinations_than_sources_share_one_port() -> None:
    narrow = transfer_time(kv_routes(LLAMA, (8, 1), (1, 1)), 1000, 0.0, Link(1e10))
    assert narrow.exposed == pytest.approx(320 * 1024 * 1000 / 1e10)


def test_bad_links() -> None:
    with pytest.raises(InputError, match="positive bandwidth"):
        transfer_time([], 1, 0.0, Link(0.0))
    with pytest.raises(InputError, match="unknown KV dtype"):
        kv_routes(LLAMA, (1, 1), (1, 1), "fp9")
