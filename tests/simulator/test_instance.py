"""One engine and its neighbours, against times worked out by hand."""

from __future__ import annotations

from math import inf, isnan

import numpy as np
import pytest

from hetkv.simulator.affine import AffineStepModel
from hetkv.simulator.request import FAILED, FINISHED, REJECTED
from hetkv.simulator.traffic.lengths import parse_lengths
from hetkv.simulator.validation.closed_forms import simulate_single
from tests.simulator.cases import Case

STEP, SEQ, CTX, TOK, PROMPT = 0.008, 1e-4, 1e-6, 2e-5, 1e-3  # simulator_cases.MODEL


def step(batch, context, prompt=0):
    return STEP + SEQ * batch + CTX * context + (TOK * prompt + PROMPT if prompt else 0)


def case(rows, **kind):
    kind = {"disaggregated": False, "counts": (1, 1), "kv_blocks": 1000, "max_num_batched_tokens": 64, **kind}
    return Case([(*row, None) if len(row) == 3 else row for row in rows], **kind)


def test_one_request_alone():
    _, c, _ = case([(0.5, 100, 4)]).run()
    first = 0.5 + step(0, 0, 64) + step(0, 0, 36)
    assert c["scheduled"][0] == 0.5
    assert c["first_token"][0] == pytest.approx(first)
    assert c["last_token"][0] == pytest.approx(first + sum(step(1, 100 + i) for i in range(3)))


def test_a_prompt_joins_at_the_next_step_boundary_and_shares_the_budget():
    _, c, _ = case([(0.0, 10, 50), (0.1, 100, 2)]).run()
    now, context = step(0, 0, 10), 10
    while now < 0.1:
        now, context = now + step(1, context), context + 1
    assert c["scheduled"][1] == pytest.approx(now)
    now += step(1, context, 63) + step(1, context + 1, 37)  # one of 64 tokens is the decoding sequence
    assert c["first_token"][1] == pytest.approx(now)
    assert c["last_token"][1] == pytest.approx(now + step(2, context + 2 + 100))


def test_without_chunks_decodes_wait_for_whole_prompts():
    _, c, _ = case([(0.0, 10, 3), (0.009, 100, 2)], chunked_prefill=False).run()
    prompt = step(0, 0, 10)
    assert c["first_token"][1] == pytest.approx(prompt + step(0, 0, 100))
    assert c["last_token"][0] == pytest.approx(c["first_token"][1] + step(2, 110) + step(1, 11))


def test_places_are_kept_and_the_queue_is_first_come_first_served():
    _, c, _ = case([(0.0, 10, 20)] * 5, max_num_seqs=2).run()
    assert np.all(np.diff(c["scheduled"]) >= 0)
    assert c["scheduled"][2] == pytest.approx(c["last_token"][0])
    assert c["scheduled"][4] > c["last_token"][1]


def test_the_youngest_is_preempted_and_computed_again():
    # 12 blocks of 4: two sequences of 8 + 39 tokens do not fit together (24 blocks).
    cluster, c, _ = case([(0.0, 8, 40), (0.0, 8, 40)], kv_blocks=13).run()
    assert c["preemptions"].tolist()[0] == 0
    assert c["preemptions"][1] >= 1
    assert c["last_token"][0] < c["last_token"][1]
    assert cluster.pools[0].prefill_tokens > 16
    assert cluster.pools[0].decode_tokens + cluster.pools[0].prefill_outputs == 80


def test_too_long_requests_are_rejected():
    _, c, _ = case([(0.0, 3000, 1000), (0.0, 3000, 1001), (0.0, 3001, 1000), (0.0, 3001, 1001)]).run()
    assert c["status"].tolist() == [FINISHED, FINISHED, FINISHED, REJECTED]


def test_handoff_times():
    # 1000 bytes a token, 4 layers, 100 tokens in steps of 64 and 36; 1e6 bytes/s: slower than the prefill.
    rows, kind = [(0.0, 100, 3)], {"disaggregated": True, "port": 1e6}
    _, c, _ = case(rows, **kind).run()
    one, two = step(0, 0, 64), step(0, 0, 36)
    assert c["first_token"][0] == pytest.approx(one + two)
    # Two flows from one port: the first starts when a quarter of its step is done; then they share until all is sent.
    assert c["visible"][0] == pytest.approx(one / 4 + 0.1)
    assert c["last_token"][0] == pytest.approx(c["visible"][0] + step(1, 100) + step(1, 101))
    _, c, _ = case(rows, overlap=False, **kind).run()
    assert c["visible"][0] == pytest.approx(one + two + 0.1)
    _, c, _ = case(rows, first_token_at="decode", **kind).run()
    assert c["first_token"][0] == pytest.approx(c["visible"][0] + step(1, 99))
    assert c["last_token"][0] == pytest.approx(c["first_token"][0] + step(1, 100) + step(1, 101))


def test_a_fast_link_hides_all_but_the_last_layer():
    _, c, _ = case([(0.0, 64, 3)], disaggregated=True, port=1e9).run()
    assert c["visible"][0] - c["prefilled"][0] == pytest.approx(64_000 / 4 / 1e9)


def test_kv_waits_at_the_prefill_instance_for_room():
    rows = [(0.0, 40, 10), (0.0, 40, 10), (0.0, 40, 10)]
    _, c, _ = case(rows, disaggregated=True, counts=(1, 1), kv_blocks=28, port=1e9).run()
    assert (c["status"] == FINISHED).all()
    assert c["visible"][2] > c["last_token"][0]


def test_prefix_is_computed_once_where_the_router_keeps_it():
    keys = tuple(range(6))
    rows = [(0.0, 100, 2, keys)] + [(0.3, 100, 2, keys)] * 6
    kind = {"prefix_caching": True, "block_size": 16, "counts": (2, 1)}
    found = {}
    for routing in ("prefix_aware", "round_robin"):
        cluster, c, _ = case(rows, prefill_routing=routing, **kind).run()
        found[routing] = c["cached"].tolist()
        assert cluster.pools[0].prefill_tokens == 700 - sum(found[routing])
    assert found["prefix_aware"] == [0] + [96] * 6
    assert found["round_robin"] == [0, 0] + [96] * 5


def test_a_prefix_the_decoder_holds_is_not_sent():
    keys = tuple(range(6))
    rows = [(0.0, 100, 2, keys), (1.0, 100, 2, keys)]
    cluster, _, _ = case(rows, disaggregated=True, prefix_caching=True, block_size=16).run()
    assert cluster.links.sent == 100_000 + 4_000


@pytest.mark.parametrize(
    "routing", ["join_shortest_queue", "round_robin", "least_loaded", "central_queue", "prefix_aware"]
)
def test_every_discipline_spreads_equal_load(routing):
    cluster, c, _ = case([(0.05, 50, 30)] * 60, counts=(3, 1), prefill_routing=routing).run()
    assert (c["status"] == FINISHED).all()
    busy = cluster.pools[0].busy.integral(cluster.events.now)
    assert cluster.pools[0].busy.peak == 3
    assert busy > 0


def test_an_outage_restarts_requests_with_their_tokens():
    rows = [(0.0, 10, 100)]
    kind = {"outages": [(0, 0.5, 1.0)]}
    _, c, _ = case(rows, **kind).run()
    made = int((0.5 - step(0, 0, 10)) / step(1, 40)) + 1
    again = 1.5 + step(0, 0, min(10 + made, 64))
    assert c["restarts"].tolist() == [1]
    assert c["first_token"][0] == pytest.approx(step(0, 0, 10))
    assert again + (99 - made - 3) * step(1, 60) < c["last_token"][0] < again + (99 - made + 3) * step(1, 100)
    _, c, _ = case(rows, restart=False, **kind).run()
    assert c["status"].tolist() == [FAILED]
    assert isnan(c["last_token"][0])
    assert 40 < c["generated"][0] < 70


def test_decode_failure_sends_requests_back_through_prefill():
    rows = [(0.0, 20, 80), (0.0, 20, 80)]
    cluster, c, _ = case(rows, disaggregated=True, counts=(1, 2), outages=[(1, 0.4, inf)]).run()
    assert (c["status"] == FINISHED).all()
    assert sorted(c["restarts"]) == [0, 1]
    assert cluster.links.count > 2


def test_first_come_first_served_single_server_is_lindleys_recursion():
    one = parse_lengths("1", "")
    columns = simulate_single(14.0, one, one, (0, 0, 0, 0.05, 0), 5000, 7, max_num_seqs=1)
    wait, waits = 0.0, []
    arrivals = columns["arrival"]
    wait = columns["scheduled"][0] - arrivals[0]
    for gap in np.diff(arrivals):
        waits.append(wait)
        wait = max(wait + 0.05 - gap, 0.0)
    np.testing.assert_allclose(columns["scheduled"][:-1] - arrivals[:-1], waits, atol=1e-9)


def test_affine_model_is_the_protocol():
    model = AffineStepModel((1, 2, 3, 4, 5), 10, 2.0)
    assert model.step_seconds(1, 1) == 6
    assert model.step_seconds(1, 1, 1, 1.0) == 15
    assert model.step_estimate(1, 1) == (6, 6, 6)
