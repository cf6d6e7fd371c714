"""Any deployment to any deployment: real senders and receivers for every rank, checked byte for byte by the oracle."""

from __future__ import annotations

import os
import random
from contextlib import ExitStack

import torch
from hypothesis import HealthCheck, given, settings

from hetkv.transport.config import TransferConfig
from hetkv.transport.link_plan import wanted
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender, SendHandle
from tests.transport.deployments import Deployment, deployments, expected, fill_source, truth_of

EXAMPLES = int(os.environ.get("HETKV_EXAMPLES", "200"))
SECRET = b"a secret of tests"


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=deployments())
def test_random_deployments(case: Deployment) -> None:
    values = truth_of(case)
    fill_source(case, values)
    rng = random.Random(case.seed)
    config = TransferConfig(slot_bytes=1 << 13, window_bytes=rng.choice([1 << 13, 1 << 16]), direct=rng.random() < 0.7)
    with ExitStack() as stack:
        senders = [
            stack.enter_context(
                Sender(pool, secret=SECRET, instance="p", rank=rank, instance_shards=case.source.shards, config=config)
            )
            for rank, pool in enumerate(case.source.given)
        ]
        receivers = [
            stack.enter_context(
                Receiver(
                    pool, secret=SECRET, instance="d", rank=rank, instance_shards=case.destination.shards, config=config
                )
            )
            for rank, pool in enumerate(case.destination.given)
        ]
        addresses = [sender.listen() for sender in senders]
        for receiver in receivers:
            receiver.connect(addresses)
        want = [range(*span) for span in wanted(receivers[0].description, *tokens_and_held(case))]
        truth = [expected(case, values, rank, want) for rank in range(len(receivers))]

        tickets_first = rng.random() < 0.5
        receptions = [
            r.receive("x", case.destination.blocks, case.tokens, num_cached_tokens=held(case))
            for r in receivers
            if tickets_first
        ]
        sending = [sender.send("x", case.source.blocks, case.tokens) for sender in senders]
        send_layers(case, sending, rng)
        if not tickets_first:
            receptions = [
                r.receive("x", case.destination.blocks, case.tokens, num_cached_tokens=held(case)) for r in receivers
            ]
        for request in [*receptions, *(t for t, s in zip(sending, senders, strict=True) if s.peers)]:
            request.wait(20)
        for rank, pool in enumerate(case.destination.pools):
            for layer, memory in pool.layers.items():
                for name, tensor in memory.tensors.items():
                    assert torch.equal(tensor, truth[rank].layers[layer].tensors[name]), (rank, layer, name)


def held(case: Deployment) -> list[int]:
    """A `state` record is always sent."""
    return tokens_and_held(case)[1]


def tokens_and_held(case: Deployment) -> tuple[list[int], list[int]]:
    """Per cache group, as `Receiver.receive` sees them."""
    state = {layer.group for layer in case.spec.layers if layer.kind == "state"}
    groups = range(case.spec.num_groups)
    return [1 if g in state else case.tokens for g in groups], [0 if g in state else case.held for g in groups]


def send_layers(case: Deployment, sending: list[SendHandle], rng: random.Random) -> None:
    """Every rank sends its layers chunk by chunk, in a random order of chunks."""
    for rank, transmission in enumerate(sending):
        work = []
        for layer in case.source.pools[rank].layers:
            whole = case.spec.layers[layer].kind == "state"
            work += [(layer, None)] if whole else [(layer, chunk) for chunk in case.chunks]
        rng.shuffle(work)
        for layer, chunk in work:
            transmission.send_layer(layer, chunk)
