"""What a peer with the secret, or the process's own doings, must not be able to do to a node."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from array import array
from collections.abc import Callable

import pytest

from hetkv.errors import ClosedError, HetkvError, InputError, TransportError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec, LayerSpec
from hetkv.reference import wire
from hetkv.reference.messages import Abort, Heartbeat, Prelude, Type
from hetkv.transport.config import TransferConfig
from hetkv.transport.handle import request_key
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, connected, randomise, until

SLIDING = KVSpec((LayerSpec.kv(2, 64, sliding_window=32),) * 2)


def test_a_ticket_for_tokens_before_the_sliding_window_is_rejected() -> None:
    """Ids of blocks that the window does not reach are placeholders: nothing may be read through them."""
    source = randomise(KVPool.allocate(SLIDING, 64), 1)
    with connected([source], [KVPool.allocate(SLIDING, 64)], TransferConfig()) as ([sender], [receiver]):
        tx = sender.send("w", [-1] * 6 + [5, 6], 128)
        tx.extend([7])
        tx.send_layers()
        link = receiver.peers[0].link
        receiver.engine.receive(request_key("w"), [(0, 128)], [array("i", range(8))], [link], 5000)
        until(lambda: receiver.stats()["failed_requests"] == 1)
        assert sender.stats()["frames"] == 0
        with pytest.raises(HetkvError, match=r"asks for tokens \[0, 128\) of cache group 0, the request has"):
            tx.wait(5)


def test_a_chunk_before_the_window_does_not_stand_for_one_inside() -> None:
    """A request that is complete, as nothing of it was wanted, whose prefill hands over chunk after chunk."""
    source = randomise(KVPool.allocate(SLIDING, 64), 1)
    with connected([source], [KVPool.allocate(SLIDING, 64)], TransferConfig()) as ([sender], [receiver]):
        tx = sender.send("w", list(range(8)), 128)
        receiver.receive("w", list(range(8)), 128, num_cached_tokens=128).wait(5)
        tx.wait(5)
        for start in range(0, 128, 32):
            tx.send_layer(0, (start, start + 32))
            tx.send_layer(1, (96 - start, 128 - start))
        with pytest.raises(InputError, match="every layer of it was sent"):
            tx.send_layer(0, (96, 128))


def test_a_peer_cannot_give_up_the_request_of_another() -> None:
    """Not even one that knows its id and its epoch."""
    source = randomise(KVPool.allocate(SLIDING, 16), 1)
    quiet = TransferConfig(heartbeat_s=60, peer_timeout_s=600)  # numbers of injected messages are known
    with connected([source, source], [KVPool.allocate(SLIDING, 16)], quiet) as ([honest, hostile], [receiver]):
        rx = receiver.receive("theirs", [1, 2], 32, src_instance="p0")
        [peer] = hostile.peers
        for _ in range(1000):  # a link begins with a heartbeat, which must not come in between
            if hostile.engine.next_sequence(peer.link) > 0:
                break
            time.sleep(0.001)
        for kind, body in ((Type.ABORT, Abort(9, "hostile")), (Type.HEARTBEAT, Heartbeat(1))):
            named = (request_key("theirs"), receiver.engine.epoch(rx.handle)) if kind is Type.ABORT else (bytes(16), 0)
            prelude = Prelude(kind, hostile.engine.next_sequence(peer.link), *named)
            hostile.engine.inject(peer.link, wire.encode(prelude, body, peer.connection.data_keys.send))
        mine = receiver.receive("its own", [3], 16, src_instance="p1")  # comes after what was injected
        hostile.send("its own", [0], 16).send_layers()
        mine.wait(5)
        tx = honest.send("theirs", [4, 5], 32)
        tx.send_layers()
        rx.wait(5)
        tx.wait(5)


def in_forked_child(work: Callable[[], None]) -> None:
    """Run `work` in a forked child, which must end well and soon."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(20)
    child.kill()
    child.join()
    assert child.exitcode == 0


def test_a_forked_child_leaves_its_parents_nodes_alone() -> None:
    """It may close and collect them, also while it has threads of its own; it can have no node itself."""
    spec = KVSpec.uniform(2, 2, 64)
    source = randomise(KVPool.allocate(spec, 16), 1)
    with connected([source], [KVPool.allocate(spec, 16)], TransferConfig()) as ([sender], [receiver]):

        def child() -> None:
            sender.close()
            sender.engine.stop()
            resting = threading.Event()
            for _ in range(8):  # where the parent's threads had their stacks
                threading.Thread(target=resting.wait, daemon=True).start()
            for node in (sender, receiver):
                node.__dict__.clear()
            gc.collect()
            with pytest.raises(TransportError, match="forked from one with an open Sender or Receiver"):
                Sender(source, secret=SECRET, instance="p")

        in_forked_child(child)
        tx = sender.send("after", [0, 1], 32)
        tx.send_layers()
        receiver.receive("after", [3, 2], 32).wait(5)
        tx.wait(5)


def test_a_forked_child_transfers_where_its_parents_nodes_are_closed() -> None:
    spec = KVSpec.uniform(2, 2, 64)
    source, target = randomise(KVPool.allocate(spec, 16), 1), KVPool.allocate(spec, 16)

    def transfer() -> None:
        with connected([source], [target], TransferConfig()) as ([sender], [receiver]):
            tx = sender.send("again", [0, 1], 32)
            tx.send_layers()
            receiver.receive("again", [3, 2], 32).wait(5)
            tx.wait(5)

    transfer()
    in_forked_child(transfer)


def test_listen_after_close() -> None:
    spec = KVSpec.uniform(1, 1, 16)
    sender = Sender(KVPool.allocate(spec, 4), secret=SECRET, instance="p")
    sender.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ClosedError):
        sender.listen()
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # fewer where an earlier test's node was collected


def test_pools_that_cannot_be() -> None:
    spec = KVSpec.uniform(2, 2, 64)
    for blocks in (-4, 0, [], [3, 4]):
        with pytest.raises(InputError, match="num_blocks"):
            KVPool.allocate(spec, blocks)
    with pytest.raises(InputError, match="16 or more"):
        Receiver(KVPool.allocate(spec, 4), secret="a text of sixteen or more", instance="d")  # type: ignore[arg-type]
