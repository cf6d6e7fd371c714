"""A peer that has the secret and writes to slots which it has given back: what others send is never wrong without an
error, and with `isolate_peers` not even disturbed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hetkv.errors import ChecksumError, InputError
from hetkv.kv.pool import KVPool
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import randomise
from tests.transport.scribbler import REQUESTS
from tests.transport.worker import BLOCKS, SECRET, SPEC, TOKENS

WAIT_S = 20.0
SLOT = 1 << 16


def same(source: KVPool, destination: KVPool) -> bool:
    views = [(layer, name) for layer in source.layers for name in ("k", "v")]
    bits = [[pool.view(*at)[BLOCKS].view(torch.int16) for at in views] for pool in (source, destination)]
    return all(torch.equal(one, other) for one, other in zip(*bits, strict=True))


@pytest.mark.parametrize("isolated", [False, True])
def test_a_peer_that_writes_to_slots_which_it_gave_back(isolated: bool) -> None:
    config = TransferConfig(slot_bytes=SLOT, window_bytes=2 * SLOT, isolate_peers=isolated)
    source, destination = randomise(KVPool.allocate(SPEC, 16), 1), KVPool.allocate(SPEC, 16)
    with Receiver(destination, secret=SECRET, instance="d", config=config) as receiver:
        command = [sys.executable, "-m", "tests.transport.scribbler", receiver.listen()]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with Sender(source, secret=SECRET, instance="honest") as honest, subprocess.Popen(command, **pipes) as hostile:
            receiver.connect(honest.listen())
            while len(receiver.peers) < 2:
                assert hostile.poll() is None
            for number in range(REQUESTS):
                theirs = f"scribbler-{number}"
                receiver.receive(theirs, BLOCKS, TOKENS, src_instance="scribbler").wait(WAIT_S)
            assert hostile.stdout.readline() == b"writes\n"
            failed = 0
            for number in range(200):
                sent = honest.send(f"{number}", BLOCKS, TOKENS)
                asked = receiver.receive(f"{number}", BLOCKS, TOKENS, src_instance="honest")
                sent.send_layers()
                try:
                    asked.wait(WAIT_S)
                except ChecksumError:
                    failed += 1
                    continue
                sent.wait(WAIT_S)
                assert same(source, destination)
            hostile.stdin.close()
            hostile.wait(WAIT_S)
        assert (failed == 0) == isolated
        assert receiver.stats()["quarantined_slots"] == 0


def test_slots_in_a_devices_memory_cannot_be_replaced() -> None:
    with pytest.raises(InputError, match="isolate_peers"):
        TransferConfig(isolate_peers=True, window="device")
