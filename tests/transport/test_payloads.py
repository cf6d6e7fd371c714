"""Payloads of requests and notifications: what two linked sides say besides KV."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from hetkv.control import handshake
from hetkv.control.payloads import MAX_NOTIFICATIONS, Ask, Notice, Payload, Taken
from hetkv.errors import (
    AbortedError,
    ClosedError,
    InputError,
    LeaseExpiredError,
    PeerLostError,
    PoolFullError,
    UnsupportedError,
    WaitTimeoutError,
)
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec, Shard
from hetkv.transport import payloads
from hetkv.transport.content import content_digest
from hetkv.transport.payloads import MAX_ASKED
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, WAIT_S, connected, settled, until

SPEC = KVSpec.uniform(2, 2, 64)
BLOCKS, TOKENS = [5, 3], 30
LARGEST = bytes(range(256)) * 256
Pair = tuple[Sender, Receiver]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with connected([KVPool.allocate(SPEC, 12)], [KVPool.allocate(SPEC, 12)]) as ([sender], [receiver]):
        yield sender, receiver
        settled(sender, receiver)


@pytest.mark.parametrize("when", ["with the request", "before the ticket", "after the ticket", "after the end"])
@pytest.mark.parametrize("data", [b"", b"first token", LARGEST], ids=len)
def test_a_payload(pair: Pair, when: str, data: bytes) -> None:
    sender, receiver = pair
    tx = sender.send("r", BLOCKS, TOKENS, payload=data if when == "with the request" else None)
    if when == "before the ticket":
        tx.carry(data)
    rx = receiver.receive("r", BLOCKS, TOKENS, payload=True)
    if when == "after the ticket":
        with pytest.raises(WaitTimeoutError):
            rx.payload(0.05)
        tx.carry(data)
    tx.send_layers()
    rx.wait(WAIT_S)
    tx.wait(WAIT_S)
    if when == "after the end":
        tx.carry(bytearray(data))
    assert rx.payload(WAIT_S) == data == rx.payload()
    with pytest.raises(InputError, match="carries a payload already"):
        tx.carry(b"")


def test_many_at_once(pair: Pair) -> None:
    """More bytes than sockets hold, to a receiver that was first."""
    sender, receiver = pair
    count = 200
    received = [receiver.receive(f"r{i}", BLOCKS, TOKENS, payload=True) for i in range(count)]
    for i in range(count):
        tx = sender.send(f"r{i}", BLOCKS, TOKENS)
        tx.send_layers()
        tx.carry(i.to_bytes(2, "little") + LARGEST[2:])
    for i, rx in enumerate(received):
        assert rx.payload(WAIT_S) == i.to_bytes(2, "little") + LARGEST[2:]
        rx.wait(WAIT_S)


def test_one_that_is_kept_for_a_while(pair: Pair) -> None:
    sender, receiver = pair
    tx = sender.send("r", BLOCKS, TOKENS)
    with pytest.raises(InputError, match="keep_s"):
        tx.carry(b"x", keep_s=0)
    tx.carry(b"x", keep_s=0.001)
    time.sleep(0.01)
    rx = receiver.receive("r", BLOCKS, TOKENS, payload=True)
    with pytest.raises(WaitTimeoutError):
        rx.payload(0.05)
    tx.send_layers()
    rx.wait(WAIT_S)


def test_wakes_who_waits(pair: Pair) -> None:
    sender, receiver = pair
    rx = receiver.receive("r", BLOCKS, TOKENS, payload=True)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(rx.payload(WAIT_S)))
    thread.start()
    tx = sender.send("r", BLOCKS, TOKENS, payload=b"x")
    thread.join(WAIT_S)
    assert found == [b"x"]
    tx.send_layers()
    rx.wait(WAIT_S)


def test_only_of_the_same_content(pair: Pair) -> None:
    """An id that is used again: what the earlier request carried is not given to the later one."""
    sender, receiver = pair
    mine, other = content_digest([1]), content_digest([2])
    for content, data in ((mine, b"mine"), (other, b"other")):
        rx = receiver.receive("r", BLOCKS, TOKENS, content=content, payload=True)
        with pytest.raises(WaitTimeoutError):
            rx.payload(0.05)
        tx = sender.send("r", BLOCKS, TOKENS, content=content, payload=data)
        assert rx.payload(WAIT_S) == data
        tx.send_layers()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
    tx = sender.send("r", BLOCKS, TOKENS, content=other)  # what it carried the last time is over
    rx = receiver.receive("r", BLOCKS, TOKENS, content=other, payload=True)
    with pytest.raises(WaitTimeoutError):
        rx.payload(0.05)
    tx.send_layers()
    rx.wait(WAIT_S)


def test_what_ends_the_wait(pair: Pair) -> None:
    sender, receiver = pair
    rx = receiver.receive("aborted", BLOCKS, TOKENS, payload=True)
    threading.Timer(0.05, sender.reject, ("aborted", "no such prompt")).start()
    with pytest.raises(AbortedError, match="no such prompt"):
        rx.payload(WAIT_S)
    rx = receiver.receive("late", BLOCKS, TOKENS, payload=True, lease_s=0.2)
    tx = sender.send("late", BLOCKS, TOKENS)
    tx.send_layers()
    rx.wait(WAIT_S)
    with pytest.raises(LeaseExpiredError, match=r"p0/0 has given no payload"):
        rx.payload()
    rx = receiver.receive("unasked", BLOCKS, TOKENS)
    with pytest.raises(InputError, match="not asked for"):
        rx.payload()
    rx.abort()


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_node_that_closes(who: str) -> None:
    with connected([KVPool.allocate(SPEC, 12)], [KVPool.allocate(SPEC, 12)]) as ([sender], [receiver]):
        rx = receiver.receive("r", BLOCKS, TOKENS, payload=True)
        tx = sender.send("r", BLOCKS, TOKENS)
        tx.send_layers()
        rx.wait(WAIT_S)
        threading.Timer(0.05, (sender if who == "sender" else receiver).close).start()
        with pytest.raises(PeerLostError if who == "sender" else ClosedError):
            rx.payload(WAIT_S)


def test_a_sender_that_closes_at_once_has_said_it() -> None:
    with connected([KVPool.allocate(SPEC, 12)], [KVPool.allocate(SPEC, 12)]) as ([sender], [receiver]):
        received = [receiver.receive(f"r{i}", BLOCKS, TOKENS, payload=True) for i in range(50)]
        sent = [sender.send(f"r{i}", BLOCKS, TOKENS) for i in range(50)]
        for tx in sent:
            tx.send_layers()
        for rx in received:
            rx.wait(WAIT_S)
        for tx in sent:
            tx.carry(LARGEST)
        sender.close()
        assert all(rx.payload(WAIT_S) == LARGEST for rx in received)


def test_ranks() -> None:
    """Each of two receivers of halves asks the lower one of the senders that it needs."""
    shards = Shard.ranks(SPEC, tp=2)
    sources = [KVPool.allocate(SPEC, 12, shard=shard) for shard in shards]
    destinations = [KVPool.allocate(SPEC, 12, shard=shard) for shard in shards]
    with connected(sources, destinations, sharded=True) as (senders, receivers):
        for rank, sender in enumerate(senders):
            sender.send("r", BLOCKS, TOKENS, payload=f"of {rank}".encode()).send_layers()
        for rank, receiver in enumerate(receivers):
            rx = receiver.receive("r", BLOCKS, TOKENS, payload=True)
            assert rx.payload(WAIT_S) == f"of {rank}".encode()
            rx.wait(WAIT_S)


@pytest.mark.parametrize("data", [LARGEST + b"x", memoryview(LARGEST + b"x"), "text", 7, None])
def test_what_is_no_payload(pair: Pair, data: object) -> None:
    sender = pair[0]
    tx = sender.send("r", BLOCKS, TOKENS)
    for call in (tx.carry, lambda data: sender.notify(sender.peers[0], data)):
        with pytest.raises(InputError, match="a payload "):
            call(data)
    if data is not None:
        with pytest.raises(InputError, match="a payload "):
            sender.send("other", BLOCKS, TOKENS, payload=data)
    tx.abort()


def take(node: Sender | Receiver, count: int) -> list[bytes]:
    """What so many notifications say."""
    found: list[bytes] = []
    deadline = time.monotonic() + WAIT_S
    while len(found) < count:
        assert time.monotonic() < deadline
        found += [data for _, data in node.notifications(0.1)]
    return found


def all_taken(node: Sender | Receiver) -> None:
    """Wait until a node knows that its peer has taken all."""
    until(lambda: not any(node._notifications._out.values()))


def test_notifications(pair: Pair) -> None:
    """In order, both ways, more of them than may wait."""
    for node, other in (pair, pair[::-1]):
        assert node.notifications() == []
        for number in range(1000):
            node.notify(node.peers[0], number.to_bytes(2, "little"))
            if number % 200 == 199:
                assert take(other, 200) == [at.to_bytes(2, "little") for at in range(number - 199, number + 1)]
                all_taken(node)
        node.notify(node.peers[0], LARGEST)
        ((peer, data),) = other.notifications(WAIT_S)
        assert data == LARGEST
        assert peer is other.peers[0]


def test_a_program_that_takes_no_notifications(pair: Pair) -> None:
    sender, receiver = pair
    for number in range(MAX_NOTIFICATIONS):
        sender.notify(sender.peers[0], bytes([number % 256]))
    with pytest.raises(PoolFullError, match="has not taken the last 256"):
        sender.notify(sender.peers[0], b"")
    assert len(take(receiver, MAX_NOTIFICATIONS)) == MAX_NOTIFICATIONS
    all_taken(sender)
    sender.notify(sender.peers[0], b"again")
    assert [data for _, data in receiver.notifications(WAIT_S)] == [b"again"]


def test_peer_of_the_last_minor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2.5 has neither: an error says so to who needs them, all else goes on."""
    monkeypatch.setattr(handshake, "MINOR", 5)
    with connected([KVPool.allocate(SPEC, 12)], [KVPool.allocate(SPEC, 12)]) as ([sender], [receiver]):
        with pytest.raises(UnsupportedError, match=r"p0/0 speaks version 2\.5, which has no payloads"):
            receiver.receive("r", BLOCKS, TOKENS, payload=True)
        for node in (sender, receiver):
            with pytest.raises(UnsupportedError, match=r"speaks version 2\.5, which has no notifications"):
                node.notify(node.peers[0], b"")
        rx = receiver.receive("r", BLOCKS, TOKENS)
        sender.send("r", BLOCKS, TOKENS, payload=b"nobody asks").send_layers()
        rx.wait(WAIT_S)
        settled(sender, receiver)


@pytest.mark.parametrize(
    ("role", "messages", "text"),
    [
        ("sender", [Ask(bytes(16))], "a sender asks"),
        ("receiver", [Payload(bytes(16), b"")], "a payload from a receiver"),
        ("receiver", [Taken(1)], "took 1 notifications of 0"),
        ("sender", [Notice(b"")] * (MAX_NOTIFICATIONS + 1), "more than 256 notifications"),
    ],
)
def test_a_peer_that_says_what_it_may_not(pair: Pair, role: str, messages: list[Notice], text: str) -> None:
    liar, victim = pair if role == "sender" else pair[::-1]
    (peer,) = victim.peers
    for message in messages:
        liar.peers[0].connection.post(message)
    until(lambda: peer.lost is not None)
    assert text in str(peer.lost)


def test_a_peer_that_asks_for_everything(pair: Pair) -> None:
    """What it asked for first is forgotten; a payload that nobody awaits is dropped."""
    sender, receiver = pair
    (peer,) = sender.peers
    for number in range(MAX_ASKED + 10):
        receiver.peers[0].connection.post(Ask(number.to_bytes(16, "little")))
    until(lambda: (number.to_bytes(16, "little")) in sender._payloads._asked.get(peer, {}), seconds=20)
    assert len(sender._payloads._asked[peer]) == MAX_ASKED
    for _ in range(3):
        peer.connection.post(Payload(bytes(16), b"unasked"))
    rx = receiver.receive("r", BLOCKS, TOKENS, payload=True)
    sender.send("r", BLOCKS, TOKENS, payload=b"asked").send_layers()
    assert rx.payload(WAIT_S) == b"asked"
    rx.wait(WAIT_S)


def test_an_answer_that_comes_after_another_question(pair: Pair) -> None:
    """An id that is used again while the payload of the request before is on its way: it is not the later one's."""
    sender, receiver = pair
    mine, other = content_digest([1]), content_digest([2])
    taken, take = threading.Event(), receiver.payloads.take
    late: list[Payload] = []
    receiver.payloads.take = lambda peer, payload: (late.append(payload), taken.set())
    tx = sender.send("r", BLOCKS, TOKENS, content=mine, payload=b"mine")
    first = receiver.receive("r", BLOCKS, TOKENS, content=mine, payload=True)
    assert taken.wait(WAIT_S)
    first.abort()
    until(lambda: first.done() and tx.done())
    receiver.payloads.take = take
    rx = receiver.receive("r", BLOCKS, TOKENS, content=other, payload=True)
    take(receiver.peers[0], late[0])
    with pytest.raises(WaitTimeoutError):
        rx.payload(0.05)
    sender.send("r", BLOCKS, TOKENS, content=other, payload=b"other").send_layers()
    assert rx.payload(WAIT_S) == b"other"
    rx.wait(WAIT_S)


def test_empty_payloads_take_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "MAX_KEPT_BYTES", 100 * payloads.KEPT_BYTES)
    offered = payloads.OfferedPayloads()
    for number in range(1000):
        offered.give(number.to_bytes(16, "little"), b"", b"", 1e6)
    assert len(offered._kept) == 100
    offered.begin((999).to_bytes(16, "little"))
    assert offered._bytes == 99 * payloads.KEPT_BYTES


def test_what_peers_that_are_gone_have_said_is_bounded() -> None:
    """Each may have left 256; those of all that are gone are as many, the latest ones."""
    source = KVPool.allocate(SPEC, 12)
    with Receiver(KVPool.allocate(SPEC, 12), secret=SECRET, instance="d") as receiver:
        address = receiver.listen()
        for turn in range(3):
            with Sender(source, secret=SECRET, instance="p") as sender:
                peer = sender.connect(address)
                for number in range(MAX_NOTIFICATIONS - 56):
                    sender.notify(peer, bytes([turn, number]))
            until(lambda: not receiver.peers)
        with Sender(source, secret=SECRET, instance="p") as sender:
            sender.notify(sender.connect(address), b"here")
            until(lambda: receiver._notifications._unread[-1].data == b"here")
            found = [data for _, data in receiver.notifications()]
            assert len(found) == MAX_NOTIFICATIONS + 1
            assert found[0] == bytes([1, 144])
            assert found[-2:] == [bytes([2, 199]), b"here"]


def test_a_wait_for_notifications_ends_with_the_node() -> None:
    with Receiver(KVPool.allocate(SPEC, 12), secret=SECRET, instance="d") as receiver:
        threading.Timer(0.05, receiver.close).start()
        start = time.monotonic()
        assert receiver.notifications(WAIT_S) == []
        assert time.monotonic() - start < WAIT_S / 2
