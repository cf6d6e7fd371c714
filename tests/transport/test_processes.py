"""Two real processes: one of them killed, stopped, continued, left without `close`; CPU at rest; cost of a call."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Iterator

import pytest

from hetkv.bench.child import Child
from hetkv.errors import HetkvError
from hetkv.kv.pool import KVPool
from hetkv.transport.config import TransferConfig
from hetkv.transport.node import Node
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import WAIT_S, check_transfer, connected, randomise, settled, until
from tests.transport.worker import BLOCKS, CONFIG, SECRET, SPEC, TOKENS, Worker

REPORTED_S = 5.0


@contextlib.contextmanager
def here(role: str) -> Iterator[tuple[Node, str]]:
    """This process's node and its address."""
    kind = Sender if role == "sender" else Receiver
    pool = randomise(KVPool.allocate(SPEC, 16), 1)
    with kind(pool, secret=SECRET, instance=f"{role}-here", config=CONFIG) as node:
        yield node, node.listen()


@contextlib.contextmanager
def worker(role: str, address: str) -> Iterator[Child]:
    """Another process, linked to `address`."""
    child = Child(role, Worker, (role, address))
    try:
        child.answer()
        yield child
    finally:
        child.kill()


def start(node: Node, other: Child, request: str) -> object:
    """A request that is half done: layer 0 is there, layer 1 is not."""
    until(lambda: bool(node.peers))
    if node.role == "sender":
        other.ask("receive", request)
        tx = node.send(request, BLOCKS, TOKENS)
        tx.send_layer(0)
        until(lambda: node.stats()["frames"] > 0, seconds=WAIT_S)
        return tx
    rx = node.receive(request, BLOCKS, TOKENS)
    other.ask("send", request)
    rx.wait_layer(0, WAIT_S)
    return rx


def finish(node: Node, other: Child, request: str) -> None:
    pending = start(node, other, request)
    if node.role == "sender":
        pending.send_layer(1)
    else:
        other.ask("send_rest", request)
    pending.wait(WAIT_S)
    assert other.ask("wait", request) == "complete"


@pytest.mark.parametrize("role", ["sender", "receiver"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_killed_or_stopped_in_mid_transfer(role: str, how: signal.Signals) -> None:
    """`role` is the peer's. A lost sender's slots are free once its link is closed."""
    other = "receiver" if role == "sender" else "sender"
    with here(other) as (node, address), worker(role, address) as peer:
        pending = start(node, peer, "lost")
        peer.signal(how)
        begin = time.monotonic()
        with pytest.raises(HetkvError) as caught:
            pending.wait(WAIT_S)
        assert time.monotonic() - begin < REPORTED_S
        assert type(caught.value).__name__ == "PeerLostError"
        assert f"{role}-process/0" in str(caught.value)
        until(lambda: not node.peers)
        with worker(role, address) as fresh:  # a stopped peer keeps no new one away
            finish(node, fresh, "next")
            if how == signal.SIGSTOP:
                peer.signal(signal.SIGCONT)
                assert peer.ask("wait", "lost") == "PeerLostError"
            until(lambda: node.stats()["quarantined_slots"] == 0, lambda: f"{node.stats()}")
            finish(node, fresh, "after")
            settled(node)


def test_a_stopped_senders_slots_are_free_once_its_link_is_closed() -> None:
    """Its streams are closed, and its mapping keeps pages of its own: nothing of it can arrive."""
    with here("receiver") as (node, address), worker("sender", address) as peer:
        rx = start(node, peer, "lost")
        peer.signal(signal.SIGSTOP)
        with pytest.raises(HetkvError):
            rx.wait(WAIT_S)
        until(lambda: node.stats()["quarantined_slots"] == 0)
        with worker("sender", address) as fresh:  # while the other still is stopped
            finish(node, fresh, "meanwhile")
        peer.signal(signal.SIGKILL)
        with worker("sender", address) as fresh:
            finish(node, fresh, "next")


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_exit_without_close(role: str) -> None:
    with here("receiver" if role == "sender" else "sender") as (node, address), worker(role, address) as peer:
        pending = start(node, peer, "left")
        begin = time.monotonic()
        peer.pipe.send(("exit",))
        peer.process.join(10)
        assert peer.process.exitcode == 0
        with pytest.raises(HetkvError):
            pending.wait(WAIT_S)
        assert time.monotonic() - begin < REPORTED_S


def test_rest_costs_less_than_a_hundredth_of_a_core() -> None:
    with here("receiver") as (node, address), worker("sender", address) as peer:
        finish(node, peer, "first")
        time.sleep(0.2)
        begin = time.process_time()
        other = peer.ask("cpu", 3.0)
        assert (time.process_time() - begin) / 3 < 0.01
        assert other < 0.01


def test_send_layer_costs_microseconds() -> None:
    """Median over 1,000 calls, without a ticket and while the progress thread works."""
    source, destination = KVPool.allocate(SPEC, 1100), KVPool.allocate(SPEC, 1100)
    with connected([source], [destination], TransferConfig()) as ([sender], [receiver]):
        for ticket in (False, True):
            blocks = list(range(1000))
            if ticket:
                rx = receiver.receive("cost", blocks, 16000)
            tx = sender.send("cost" if ticket else "held", blocks, 16000)
            costs = []
            for call in range(1000):
                begin = time.perf_counter_ns()
                tx.send_layer(0, (call * 16, call * 16 + 16))
                costs.append(time.perf_counter_ns() - begin)
            median = statistics.median(costs) / 1000
            print(f"send_layer, ticket {ticket}: median {median:.1f} us")
            assert median <= 20
        tx.send_layer(1)
        rx.wait(WAIT_S)
        check_transfer(source, destination, sender, receiver, 16, request="next")
