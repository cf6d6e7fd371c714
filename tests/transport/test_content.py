"""Requests bound to a content: what the other side does not mean by the same id is never sent."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hetkv.control import handshake
from hetkv.errors import ContentError, InputError, ProtocolError, UnsupportedError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec, Shard
from hetkv.transport.content import content_digest
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import (
    WAIT_S,
    check_transfer,
    connected,
    deliver,
    duplicate,
    randomise,
    same_bytes,
    settled,
    until,
)

SPEC = KVSpec.uniform(2, 2, 64)
BLOCKS, TOKENS = [5, 3], 30
MINE, OTHER = content_digest(range(TOKENS)), content_digest(range(1, TOKENS + 1))


@pytest.fixture
def pair() -> Iterator[tuple[Sender, Receiver]]:
    """A sender and a receiver; after any test nothing is left on them, and the next request works."""
    source, destination = randomise(KVPool.allocate(SPEC, 12), 1), randomise(KVPool.allocate(SPEC, 12, layout="hnd"), 2)
    with connected([source], [destination]) as ([sender], [receiver]):
        yield sender, receiver
        check_transfer(source, destination, sender, receiver, 150, request="next")
        settled(sender, receiver)


def both(sender: Sender, receiver: Receiver, ticket_first: bool, sent: Any, asked: Any, name: str = "r") -> Any:
    """The two handles of one request."""
    if ticket_first:
        rx = receiver.receive(name, BLOCKS, TOKENS, content=asked)
        tx = sender.send(name, BLOCKS, TOKENS, content=sent)
    else:
        tx = sender.send(name, BLOCKS, TOKENS, content=sent)
        tx.send_layers()
        rx = receiver.receive(name, BLOCKS, TOKENS, content=asked)
    return tx, rx


@pytest.mark.parametrize("ticket_first", [True, False])
def test_equal_contents(pair: tuple[Sender, Receiver], ticket_first: bool) -> None:
    sender, receiver = pair
    expected = duplicate(receiver.pool)
    deliver([(sender.pool, [BLOCKS])], expected, [BLOCKS], [(0, TOKENS)])
    tx, rx = both(sender, receiver, ticket_first, MINE, bytes(MINE))
    if ticket_first:
        tx.send_layers()
    rx.wait(WAIT_S)
    tx.wait(WAIT_S)
    assert same_bytes(receiver.pool, expected)


@pytest.mark.parametrize("ticket_first", [True, False])
@pytest.mark.parametrize(("sent", "asked"), [(MINE, OTHER), (MINE, None), (None, OTHER)])
def test_other_content(pair: tuple[Sender, Receiver], ticket_first: bool, sent: Any, asked: Any) -> None:
    """Both sides fail with an error that names both contents; no byte is sent, nothing remains."""
    sender, receiver = pair
    before = duplicate(receiver.pool)
    tx, rx = both(sender, receiver, ticket_first, sent, asked)
    for handle in (tx, rx):
        with pytest.raises(ContentError) as error:
            handle.wait(WAIT_S)
        for content in (sent, asked):
            assert ("none" if content is None else content.hex()) in str(error.value)
    with pytest.raises(ContentError):
        tx.wait_packed(WAIT_S)
    settled(sender, receiver)
    assert sender.stats()["frames"] == receiver.stats()["frames"] == 0
    assert same_bytes(receiver.pool, before)


@pytest.mark.parametrize(("sent", "asked", "tokens"), [(MINE, OTHER, TOKENS), (MINE, MINE, TOKENS - 1)])
def test_slots_of_a_ticket_that_waited(pair: tuple[Sender, Receiver], sent: bytes, asked: bytes, tokens: int) -> None:
    """The sender has slots for it when it finds that it cannot serve it: they go back."""
    sender, receiver = pair
    rx = receiver.receive("r", BLOCKS, TOKENS, content=asked)
    until(lambda: sender.stats()["pending_tickets"] == 1 and receiver.stats()["granted_slots"] > 0)
    time.sleep(0.1)  # for the grant after the ticket
    tx = sender.send("r", BLOCKS, tokens, content=sent)
    with pytest.raises(ContentError if sent != asked else ProtocolError):
        rx.wait(WAIT_S)
    with pytest.raises(ContentError if sent != asked else ProtocolError):
        tx.wait(WAIT_S)
    settled(sender, receiver)


def test_id_is_free_again(pair: tuple[Sender, Receiver]) -> None:
    """After a rejected ticket the same id carries a request of equal contents."""
    sender, receiver = pair
    for handle in both(sender, receiver, True, MINE, OTHER):
        with pytest.raises(ContentError):
            handle.wait(WAIT_S)
    tx, rx = both(sender, receiver, False, OTHER, OTHER)
    rx.wait(WAIT_S)
    tx.wait(WAIT_S)


def test_one_of_many(pair: tuple[Sender, Receiver]) -> None:
    """Requests under way next to a rejected one are not touched."""
    sender, receiver = pair
    contents = [content_digest([number]) for number in range(24)]
    asked = list(contents)
    asked[3], asked[17] = asked[17], asked[3]
    pairs = [
        both(sender, receiver, number % 2 == 0, contents[number], asked[number], f"r/{number}") for number in range(24)
    ]
    for number, handles in enumerate(pairs):
        if number % 2 == 0:
            handles[0].send_layers()
        for handle in handles:
            if contents[number] == asked[number]:
                handle.wait(WAIT_S)
            else:
                with pytest.raises(ContentError):
                    handle.wait(WAIT_S)


def test_every_rank_hears_of_it() -> None:
    """Two ranks to two ranks: all four ends of the request fail, with the error that names the contents."""

    def pools(layout: str) -> list[KVPool]:
        shards = [Shard.of(SPEC, tp=2, tp_rank=rank) for rank in range(2)]
        return [KVPool.allocate(SPEC, 12, shard=shard, layout=layout) for shard in shards]

    with connected(pools("nhd"), pools("hnd"), sharded=True) as (senders, receivers):
        asked = [receiver.receive("r", BLOCKS, TOKENS, content=OTHER) for receiver in receivers]
        sent = [sender.send("r", BLOCKS, TOKENS, content=MINE) for sender in senders]
        for handle in (*asked, *sent):
            with pytest.raises(ContentError, match=f"{OTHER.hex()}.*{MINE.hex()}"):
                handle.wait(WAIT_S)
        settled(*senders, *receivers)


def test_ticket_of_another_instance() -> None:
    """A request that is on its way to the instance with its content is not ended by one that means something else."""
    source, *destinations = (KVPool.allocate(SPEC, 12) for _ in range(3))
    with connected([source], destinations) as ([sender], [right, wrong]):
        tx = sender.send("r", BLOCKS, TOKENS, content=MINE)
        rx = right.receive("r", BLOCKS, TOKENS, content=MINE)
        tx.send_layer(0)
        rx.wait_layer(0, WAIT_S)
        with pytest.raises(ProtocolError, match="on its way to instance d0"):
            wrong.receive("r", BLOCKS, TOKENS, content=OTHER).wait(WAIT_S)
        tx.send_layer(1)
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        settled(sender, right, wrong)


def test_peer_of_the_last_minor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1.1 has no contents: a receiver cannot ask for one, and a sender that has one rejects its ticket."""
    monkeypatch.setattr(handshake, "MINOR", 1)
    with connected([KVPool.allocate(SPEC, 12)], [KVPool.allocate(SPEC, 12)]) as ([sender], [receiver]):
        with pytest.raises(UnsupportedError, match=r"p0/0 speaks version 1\.1"):
            receiver.receive("r", BLOCKS, TOKENS, content=MINE)
        tx, rx = both(sender, receiver, True, MINE, None)
        with pytest.raises(ContentError):
            tx.wait(WAIT_S)
        with pytest.raises(ProtocolError, match=MINE.hex()):  # the code that 1.1 knows
            rx.wait(WAIT_S)
        settled(sender, receiver)


@pytest.mark.parametrize("content", [b"", bytes(15), bytes(16), bytes(17)])
def test_what_is_no_digest(pair: tuple[Sender, Receiver], content: bytes) -> None:
    sender, receiver = pair
    for call in (sender.send, receiver.receive):
        with pytest.raises(InputError, match="16 bytes that are not all zero"):
            call("r", BLOCKS, TOKENS, content=content)


def test_digests_differ() -> None:
    """Of all that goes in, and where one part ends and the next begins."""
    parts: list[tuple[list[int], tuple[Any, ...]]] = [
        ([], ()), ([0], ()), ([0, 0], ()), ([1, 2, 3], ()), ([1, 3, 2], ()), ([1 << 33], ()), ([-1], ()),
        ([1, 2], (3,)), ([1, 2, 3], ("",)), ([1, 2, 3], ("a", "b")), ([1, 2, 3], ("ab",)), ([1, 2, 3], (("a", "b"),)),
        ([1, 2, 3], (b"a", b"b")), ([1, 2, 3], ({"image": "a", "at": 1},)),
    ]  # fmt: skip
    digests = [content_digest(tokens, extra) for tokens, extra in parts]
    assert all(a != b for a, b in itertools.combinations(digests, 2))
    assert content_digest([1], ({"a": 1, "b": 2},)) == content_digest((1,), [{"b": 2, "a": 1}])
    for tokens, extra in (([1.5], ()), ([1 << 63], ()), ([1], (object(),))):
        with pytest.raises(InputError, match="content"):
            content_digest(tokens, extra)  # type: ignore[arg-type]


def test_digest_is_the_same_in_every_process() -> None:
    program = (
        "from hetkv.transport.content import content_digest as d; print(d([7, 8], ['x', {'k': 1, 'a': b'z'}]).hex())"
    )
    lines = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert lines == {content_digest([7, 8], ["x", {"a": b"z", "k": 1}]).hex() + "\n"}
