"""Laws that hold whatever the deployment, the traffic and the failures."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings

from hetkv.costmodel import RequestBytes
from hetkv.simulator.request import FAILED, FINISHED, REJECTED
from tests.simulator.cases import Case, cases


def check_laws(case, cluster, columns):
    count = len(case.rows)
    assert columns["id"].tolist() == list(range(count)), "every request ends exactly once"
    assert not cluster.alive
    status = columns["status"]
    reach = min(pool.longest for pool in cluster.pools)
    too_long = columns["prompt"] + columns["output"] - 1 > reach
    assert np.array_equal(status == REJECTED, too_long)
    done = status == FINISHED

    # Tokens: what finished has all its tokens, and every token of anyone came out of a step.
    assert np.array_equal(columns["generated"][done], columns["output"][done])
    made = sum(pool.decode_tokens + pool.prefill_outputs for pool in cluster.pools)
    assert made == columns["generated"].sum()
    computed = sum(pool.prefill_tokens for pool in cluster.pools)
    once = (columns["preemptions"] == 0) & (columns["restarts"] == 0)  # the others may find more cached the next time
    assert computed >= (columns["prompt"] - columns["cached"])[done & once].sum()
    if (done & once).all():
        assert computed == (columns["prompt"] - columns["cached"]).sum()

    # Time.
    order = [columns[k][done] for k in ("arrival", "scheduled", "first_token", "last_token")]
    for earlier, later in pairwise(order):
        assert np.all(earlier <= later + 1e-12)
    assert np.all(
        columns["last_token"][done & (columns["output"] > 1)] > columns["first_token"][done & (columns["output"] > 1)]
    )

    # Nothing is left over, unless it waits for an instance that stays down.
    if not all(instance.up for instance in cluster.instances.values()):
        return
    for instance in cluster.instances.values():
        scheduler = instance.scheduler
        assert not any([scheduler.queue, scheduler.resumed, scheduler.ready, scheduler.prefilling])
        assert not any([scheduler.batch.members, scheduler.fresh])
        assert not any([instance.reserved, instance.holding])
        assert instance.kv.available == instance.kv.total, "KV leaked"
        assert (instance.requests, instance.prompt_tokens) == (0, 0)
    for pool in cluster.pools:
        assert (pool.waiting.value, pool.running.value, pool.busy.value) == (0, 0, 0)
    if cluster.links is not None:
        assert cluster.links.flows.value == 0
        assert cluster.links.throughput.value == pytest.approx(0, abs=1e-3)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_laws(case):
    cluster, columns, _ = case.run()
    check_laws(case, cluster, columns)
    assert not (columns["status"] == FAILED).any()
    assert not columns["restarts"].any()
    if cluster.links is not None:
        sent = case.kv.bytes(columns["prompt"][columns["status"] == FINISHED])
        single = columns["output"][columns["status"] == FINISHED] == 1
        if case.first_token_at == "prefill":
            sent = sent[~single]
        assert cluster.links.sent == pytest.approx(sent.sum())


@settings(max_examples=60, deadline=None)
@given(cases(prefix=True))
def test_laws_with_prefix_reuse(case):
    cluster, columns, _ = case.run()
    check_laws(case, cluster, columns)
    assert not (columns["status"] == FAILED).any()
    assert np.all(columns["cached"] < columns["prompt"])


@settings(max_examples=100, deadline=None)
@given(cases(failures=True, prefix=True))
def test_laws_under_failures(case):
    cluster, columns, _ = case.run()
    check_laws(case, cluster, columns)
    for_ever = any(down == float("inf") for _, _, down in case.outages)
    if case.restart and not for_ever:
        assert not (columns["status"] == FAILED).any(), "all instances come back, so all requests are served"


# Two instances decode, and the router asks for their blocks in the middle of their runs.
BALANCED = Case(
    [(1.3, 19, 1, None), (0.0, 3, 4, None), (0.003, 14, 5, None), (0.0, 88, 1, None), *[(0.0, 1, 1, None)] * 4],
    disaggregated=True,
    counts=(1, 2),
    kv_blocks=110,
    block_size=1,
    max_num_seqs=3,
    max_num_batched_tokens=17,
    chunked_prefill=False,
    first_token_at="decode",
    prefill_routing="balanced",
    decode_routing="balanced",
    overlap=False,
    restart=False,
    kv=RequestBytes(layer=250.0, full=1, sliding=3, sliding_tokens=9, state=0.0),
)


@settings(max_examples=100, deadline=None)
@given(cases(failures=True))
@example(BALANCED)
def test_skipping_ahead_equals_every_step(case):
    _, fast, _ = case.run()
    _, slow, _ = case.run(skip_ahead=False)
    for name, column in fast.items():
        if column.dtype.kind == "f":
            np.testing.assert_allclose(column, slow[name], rtol=1e-9, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(column, slow[name], err_msg=name)


@settings(max_examples=20, deadline=None)
@given(cases(failures=True, prefix=True))
def test_same_case_same_result(case):
    first, second = case.run()[1], case.run()[1]
    for name, column in first.items():
        np.testing.assert_array_equal(column, second[name], err_msg=name)
