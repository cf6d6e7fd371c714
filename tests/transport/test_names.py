"""Names of instances and ranks are unique among live peers; a link that is lost at once leaves nothing;
callbacks of the user's harm nobody."""

from __future__ import annotations

import asyncio
import contextlib
import sys

import pytest

from hetkv.errors import ClosedError, IncompatibleError, PeerLostError, to_code
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, WAIT_S, connected, settled, until

SPEC = KVSpec.uniform(2, 2, 64)


def pool() -> KVPool:
    return KVPool.allocate(SPEC, 8)


@pytest.mark.parametrize("sender_listens", [True, False])
def test_a_second_peer_of_one_name_is_rejected_while_the_first_one_lives(sender_listens: bool) -> None:
    with Sender(pool(), secret=SECRET, instance="p") as sender:
        first = Receiver(pool(), secret=SECRET, instance="d")
        with Receiver(pool(), secret=SECRET, instance="d") as second:

            def link(receiver: Receiver) -> None:
                if sender_listens:
                    receiver.connect(sender.listen())
                else:
                    sender.connect(receiver.listen())

            link(first)
            until(lambda: len(sender.peers) == len(first.peers) == 1)
            with pytest.raises(IncompatibleError, match="d/0 linked already, process"):
                link(second)
            assert len(sender.peers) == 1
            tx = sender.send("r", [0], 16)
            tx.send_layers()
            first.receive("r", [1], 16).wait(WAIT_S)
            first.close()
            until(lambda: not sender.peers)
            link(second)
            until(lambda: len(sender.peers) == len(second.peers) == 1)
            tx = sender.send("s", [0], 16)
            tx.send_layers()
            second.receive("s", [1], 16).wait(WAIT_S)


def test_a_peer_that_connects_again_replaces_its_link() -> None:
    with connected([pool()], [pool()]) as ([sender], [receiver]):
        old = receiver.receive("old", [1], 16)
        receiver.connect(sender.listen())
        with pytest.raises((ClosedError, PeerLostError)):
            old.wait(WAIT_S)
        until(lambda: len(sender.peers) == len(receiver.peers) == 1)
        tx = sender.send("r", [0], 16)
        tx.send_layers()
        receiver.receive("r", [1], 16).wait(WAIT_S)
        tx.wait(WAIT_S)
        until(lambda: len(sender._peers.all()) == len(receiver._peers.all()) == 1)
        until(lambda: receiver.stats()["quarantined_slots"] == 0)
        settled(sender, receiver)


def test_a_link_that_is_lost_before_its_peer_is_known_leaves_no_ghost(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"secret": SECRET, "rank": 0}
    with Sender(pool(), instance="p", **node) as sender, Receiver(pool(), instance="d", **node) as receiver:
        register = Receiver._register

        def late(node: Receiver, peer: object) -> None:
            node.engine.drop_link(peer.link, to_code(PeerLostError("")), "UCX lost it")  # type: ignore[attr-defined]
            node.engine.next_sequence(peer.link)  # type: ignore[attr-defined]  # the link's events have been handled
            register(node, peer)  # type: ignore[arg-type]

        monkeypatch.setattr(Receiver, "_register", late)
        address = sender.listen()
        with contextlib.suppress(PeerLostError):  # the peer may have seen the end already
            receiver.connect(address)
        until(lambda: not receiver.peers and not sender.peers, lambda: f"{receiver.peers} {sender.peers}")
        until(lambda: not receiver._peers.all() and not sender._peers.all())
        monkeypatch.undo()
        receiver.connect(address)
        until(lambda: len(sender.peers) == 1)


def test_a_callback_that_exits_harms_no_request() -> None:
    with connected([pool()], [pool()]) as ([sender], [receiver]):
        reached: list[str] = []
        rx = receiver.receive("a", [1], 16)
        rx.future.add_done_callback(lambda _: sys.exit(1))
        rx.future.add_done_callback(lambda _: reached.append("the next callback"))
        rx.layers[0].add_done_callback(lambda _: sys.exit(1))

        async def waits() -> None:
            tx = sender.send("a", [0], 16)
            tx.future.add_done_callback(lambda _: sys.exit(1))
            waiting = asyncio.ensure_future(asyncio.wait_for(asyncio.wrap_future(tx.future), WAIT_S))
            await asyncio.sleep(0)
            tx.send_layers()
            await waiting

        asyncio.run(waits())
        rx.wait(WAIT_S)
        until(lambda: reached == ["the next callback"])
        tx = sender.send("b", [0], 16)
        tx.send_layers()
        receiver.receive("b", [1], 16).wait(WAIT_S)
