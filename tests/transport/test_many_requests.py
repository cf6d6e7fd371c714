"""Thousands of requests under way: what moves costs what it costs alone, as no step looks at all of them."""

from __future__ import annotations

import time

import torch

from hetkv import Receiver, Sender, TransferConfig
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from tests.transport.peers import WAIT_S, connected, randomise, settled

SPEC = KVSpec.uniform(2, 1, 32)
UNDER_WAY = 4096
MOVED = 60


def cpu_s(sender: Sender, receiver: Receiver, name: str) -> float:
    """Processor time of moving some small requests, one after the other."""
    began = time.process_time()
    for number in range(MOVED):
        rx, tx = receiver.receive(f"{name}-{number}", [1], 16), sender.send(f"{name}-{number}", [1], 16)
        tx.send_layers()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        receiver.poll()
        sender.poll()
    return time.process_time() - began


def test_idle_requests_cost_the_others_nothing() -> None:
    source = randomise(KVPool.allocate(SPEC, 4, layout="nhd", block_size=16, dtype="bf16"), 1)
    destination = KVPool.allocate(SPEC, 4, layout="nhd", block_size=16, dtype="bf16")
    config = TransferConfig(spin_us=0)  # so that processor time is work
    with connected([source], [destination], config) as ([sender], [receiver]):
        cpu_s(sender, receiver, "warm")
        alone = min(cpu_s(sender, receiver, f"alone{turn}") for turn in range(3))
        asked = [receiver.receive(f"idle-{number}", [2], 16) for number in range(UNDER_WAY)]
        sent = [sender.send(f"idle-{number}", [2], 16) for number in range(UNDER_WAY)]
        assert sender.engine.open_requests == receiver.engine.open_requests == UNDER_WAY
        among = min(cpu_s(sender, receiver, f"among{turn}") for turn in range(3))
        # A turn that walked them all would take some 40 us more, and a request has a dozen turns.
        assert among < 2.5 * alone, (among, alone)
        sender.batch(sent).send_layers()
        for handle in asked + sent:
            handle.wait(WAIT_S)
        for layer in range(2):
            for name in "kv":
                here, there = (pool.view(layer, name)[2].view(torch.int16) for pool in (source, destination))
                assert here.equal(there)
        settled(sender, receiver)
