"""What a peer with the secret, or the process's own doings, must not be able to do to a node."""

from __future__ import annotations

import os
from array import array

import pytest
from transfer_peers import SECRET, connected, randomise, until

from hetkv.config import TransferConfig
from hetkv.errors import ClosedError, InputError
from hetkv.pending import request_key
from hetkv.pool import KVPool
from hetkv.spec import KVSpec, LayerSpec
from hetkv.transfer import Receiver, Sender

WINDOWED = KVSpec((LayerSpec.kv(2, 64, window=32),) * 2)


def test_a_ticket_for_tokens_before_the_window_is_refused() -> None:
    """Ids of blocks that the window does not reach are placeholders: nothing may be read through them."""
    source = randomise(KVPool.allocate(WINDOWED, 64), 1)
    with connected([source], [KVPool.allocate(WINDOWED, 64)], TransferConfig()) as ([sender], [receiver]):
        tx = sender.send("w", [-1] * 6 + [5, 6], 128)
        tx.extend([7])
        tx.send_layers()
        link = receiver.peers[0].link
        receiver.engine.receive(request_key("w"), [(0, 128)], [array("i", range(8))], [link], 5000)
        until(lambda: receiver.stats()["failed_requests"] == 1)
        assert sender.stats()["frames"] == 0
        receiver.receive("w", list(range(8)), 128).wait(5)
        tx.wait(5)


def test_a_forked_child_that_exits_leaves_its_parents_links_alone() -> None:
    spec = KVSpec.uniform(2, 2, 64)
    source = randomise(KVPool.allocate(spec, 16), 1)
    with connected([source], [KVPool.allocate(spec, 16)], TransferConfig()) as ([sender], [receiver]):
        child = os.fork()
        if child == 0:
            sender.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        tx = sender.send("after", [0, 1], 32)
        tx.send_layers()
        receiver.receive("after", [3, 2], 32).wait(5)
        tx.wait(5)


def test_listen_after_close() -> None:
    spec = KVSpec.uniform(1, 1, 16)
    sender = Sender(KVPool.allocate(spec, 4), secret=SECRET, instance="p")
    sender.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ClosedError):
        sender.listen()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_pools_that_cannot_be() -> None:
    spec = KVSpec.uniform(2, 2, 64)
    for blocks in (-4, 0, [], [3, 4]):
        with pytest.raises(InputError, match="num_blocks"):
            KVPool.allocate(spec, blocks)
    with pytest.raises(InputError, match="16 or more"):
        Receiver(KVPool.allocate(spec, 4), secret="a text of sixteen or more", instance="d")  # type: ignore[arg-type]
