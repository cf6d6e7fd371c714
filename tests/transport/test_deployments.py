"""Any deployment to any deployment: real senders and receivers for every rank, checked byte for byte by the oracle."""

from __future__ import annotations

import os
import random
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hetkv.transport.config import TransferConfig
from hetkv.transport.link_plan import wanted
from hetkv.transport.receiver import Receiver, RecvHandle
from hetkv.transport.sender import Sender, SendHandle
from tests.transport.deployments import Deployment, deployments, expected, fill_source, truth_of
from tests.transport.memory_kinds import ON_GPU, ON_HOST
from tests.transport.peers import WAIT_S

EXAMPLES = int(os.environ.get("HETKV_EXAMPLES", "200"))
SECRET = b"a secret of tests"


every = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@every
@given(case=deployments(ON_HOST, ON_HOST))
def test_random_deployments(case: Deployment) -> None:
    check(case)


GPUS = torch.cuda.is_available()
PLACES = {"to the host": (ON_GPU, ON_HOST), "from the host": (ON_HOST, ON_GPU), "to a GPU": (ON_GPU, ON_GPU)}


@pytest.mark.gpu
@pytest.mark.skipif(not GPUS, reason="PyTorch sees no GPU")
@pytest.mark.parametrize("place", PLACES)
def test_random_deployments_on_gpus(place: str) -> None:
    every(given(case=deployments(*PLACES[place]))(check))()


def check(case: Deployment) -> None:
    """Deliver all of it, and compare every byte of the destination's pools."""
    values = [truth_of(case, request) for request in range(case.requests)]
    for request, truth in enumerate(values):
        fill_source(case, truth, request)
    for side in (case.source, case.destination):
        side.copy_to_gpu()
    rng = random.Random(case.seed)
    slot = rng.choice([1 << 13, 1 << 20])
    config = TransferConfig(
        slot_bytes=slot,
        window_bytes=slot * rng.choice([1, 8]),
        direct=rng.random() < 0.7,
        bundle_frames=rng.choice([1, 2, 64]),
        verify=rng.choice(["payload", "pool"]),
    )
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

        def receive(request: int) -> list[RecvHandle]:
            return [
                r.receive(f"{request}", case.destination.blocks[request], case.tokens, num_cached_tokens=held(case))
                for r in receivers
            ]

        tickets_first = [request for request in range(case.requests) if rng.random() < 0.5]
        received = [handle for request in tickets_first for handle in receive(request)]
        sending = [
            [sender.send(f"{request}", case.source.blocks[request], case.tokens) for request in range(case.requests)]
            for sender in senders
        ]
        send_layers(case, senders, sending, rng)
        for request in range(case.requests):
            if request not in tickets_first:
                received += receive(request)
        used = [handle for handles, s in zip(sending, senders, strict=True) if s.peers for handle in handles]
        for handle in [*received, *used]:
            handle.wait(WAIT_S)
        case.destination.copy_from_gpu()
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


def send_layers(case: Deployment, senders: list[Sender], sending: list[list[SendHandle]], rng: random.Random) -> None:
    """Every rank sends its layers chunk by chunk, in a random order of chunks and requests, or for all requests in one
    call."""
    for rank, handles in enumerate(sending):
        together = rng.random() < 0.5
        work: list[tuple[SendHandle | None, int, tuple[int, int] | None]] = []
        for layer in case.source.pools[rank].layers:
            whole = case.spec.layers[layer].kind == "state"
            chunks = [None] if whole else case.chunks
            work += [(handle, layer, chunk) for handle in ([None] if together else handles) for chunk in chunks]
        rng.shuffle(work)
        for handle, layer, chunk in work:
            if handle is not None:
                handle.send_layer(layer, chunk)
            else:
                senders[rank].batch([(one, chunk) for one in handles]).send_layer(layer)
