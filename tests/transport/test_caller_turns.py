"""Callers that wait take the turns of their engine (`csrc/engine/turns.h`): what they move, what they leave to the
progress thread, and what they must not touch."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

from hetkv import Receiver, Sender, TransferConfig
from hetkv.errors import ClosedError, HetkvError, WaitTimeoutError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from tests.transport.peers import WAIT_S, connected, deliver, duplicate, randomise, same_bytes, settled, until

SPEC = KVSpec.uniform(3, 2, 32)
SLEEPY, SPINNING = TransferConfig(spin_us=0), TransferConfig(spin_us=200_000)


def pools() -> tuple[KVPool, KVPool]:
    source = KVPool.allocate(SPEC, 8, layout="nhd", block_size=16, dtype="bf16")
    return randomise(source, 1), randomise(KVPool.allocate(SPEC, 8, layout="hnd", block_size=64, dtype="bf16"), 2)


def turns(node: Sender | Receiver) -> int:
    return node.stats()["caller_turns"]


def test_callers_that_wait_move_their_requests() -> None:
    source, destination = pools()
    expected = duplicate(destination)
    with connected([source], [destination], SPINNING) as ([sender], [receiver]):
        for number in range(200):  # where the caller is slow the thread takes the turns
            block = number % 8
            rx, tx = receiver.receive(f"{number}", [block], 16), sender.send(f"{number}", [7 - block], 16)
            later = threading.Timer(0.01, tx.send_layers)
            later.start()
            rx.wait_layer(2, WAIT_S)
            rx.wait(WAIT_S)
            tx.wait(WAIT_S)
            later.join()
            if number < 8:
                deliver([(source, [[7 - block]])], expected, [[block]], [(0, 16)])
            elif turns(receiver) > 0 and turns(sender) > 0:
                break
        assert turns(receiver) > 0
        assert turns(sender) > 0
        settled(sender, receiver)
    assert same_bytes(destination, expected)


def test_a_caller_that_sleeps_takes_none() -> None:
    source, destination = pools()
    with connected([source], [destination], SLEEPY) as ([sender], [receiver]):
        rx, tx = receiver.receive("r", [1], 16), sender.send("r", [2], 16)
        threading.Timer(0.01, tx.send_layers).start()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        assert turns(receiver) == turns(sender) == 0


@pytest.mark.parametrize("gap_s", [0.0, 0.0003, 0.005])
def test_what_a_caller_leaves_goes_on(gap_s: float) -> None:
    source, destination = pools()
    with connected([source], [destination], SPINNING) as ([sender], [receiver]):
        for number in range(20):
            first, second = (receiver.receive(f"{number}{name}", [1 + at], 16) for at, name in enumerate("ab"))
            one, two = (sender.send(f"{number}{name}", [3 + at], 16) for at, name in enumerate("ab"))
            one.send_layers()
            first.wait(WAIT_S)
            time.sleep(gap_s)
            two.send_layers()
            until(second.done)  # nobody waits for it
            until(two.done)
            time.sleep(gap_s)
            alone = receiver.receive(f"{number}c", [1], 16)  # the last wait left nothing under way
            sender.send(f"{number}c", [2], 16).send_layers()
            until(alone.done)
        settled(sender, receiver)


def test_callers_in_many_threads_take_turns() -> None:
    source, destination = pools()
    expected = duplicate(destination)
    failed: list[BaseException] = []
    with connected([source], [destination], TransferConfig(spin_us=300)) as ([sender], [receiver]):

        def move(block: int) -> None:
            try:
                for number in range(25):
                    rx, tx = (
                        receiver.receive(f"{block}-{number}", [block], 16),
                        sender.send(f"{block}-{number}", [7 - block], 16),
                    )
                    for layer in source.layers:
                        tx.send_layer(layer)
                    rx.wait_layer(number % 3, WAIT_S)
                    (rx if number % 2 else tx).wait(WAIT_S)
                    (tx if number % 2 else rx).wait(WAIT_S)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=move, args=(block,)) for block in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert failed == []
        settled(sender, receiver)
    for block in range(8):
        deliver([(source, [[7 - block]])], expected, [[block]], [(0, 16)])
    assert same_bytes(destination, expected)


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.002, 0.005, 0.03])
def test_a_node_closes_under_callers_that_take_turns(after_s: float) -> None:
    source, destination = pools()
    with connected([source], [destination], SPINNING) as ([sender], [receiver]):
        handles: list[Any] = [receiver.receive("a", [1], 16), receiver.receive("b", [2], 16)]
        handles.append(sender.send("a", [1], 16))
        ended: list[HetkvError] = []

        def wait(handle: Any) -> None:
            try:
                handle.wait(WAIT_S)
            except HetkvError as failure:
                ended.append(failure)

        threads = [threading.Thread(target=wait, args=(handle,)) for handle in handles]
        for thread in threads:
            thread.start()
        time.sleep(after_s)
        receiver.close()
        sender.close()
        for thread in threads:
            thread.join(WAIT_S)
        assert len(ended) == 3
        assert any(isinstance(failure, ClosedError) for failure in ended)


def test_links_live_while_callers_take_turns_and_leave() -> None:
    source, destination = pools()
    config = TransferConfig(spin_us=10_000, heartbeat_s=0.05, peer_timeout_s=0.4)
    with connected([source], [destination], config) as ([sender], [receiver]):
        rx, tx = receiver.receive("r", [1], 16), sender.send("r", [2], 16)
        until_s = time.monotonic() + 1.0
        while time.monotonic() < until_s:
            with pytest.raises(WaitTimeoutError):
                rx.wait(0.008)
            with pytest.raises(WaitTimeoutError):
                tx.wait(0.008)
        assert len(sender.peers) == len(receiver.peers) == 1
        tx.send_layers()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        time.sleep(0.6)  # both callers have left, and nothing is under way
        assert len(sender.peers) == len(receiver.peers) == 1


def test_a_forked_child_takes_none_of_its_parents() -> None:
    source, destination = pools()
    with connected([source], [destination], SPINNING) as ([sender], [receiver]):
        rx, tx = receiver.receive("r", [1], 16), sender.send("r", [2], 16)
        tx.send_layer(0)
        until(lambda: rx.outcome.arrived(0))
        before = turns(receiver)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if not rx.outcome.wait(0.1) and turns(receiver) == before else 2
            finally:
                os._exit(code)
        for layer in (1, 2):
            tx.send_layer(layer)
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        settled(sender, receiver)
