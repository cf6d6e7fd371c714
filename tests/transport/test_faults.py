"""A peer that breaks the protocol: messages made by the independent codec and sent over a real, authenticated link."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch

from hetkv.errors import (
    AbortedError,
    AuthenticationError,
    ChecksumError,
    HetkvError,
    MalformedError,
    PeerLostError,
    ProtocolError,
    UnsupportedError,
)
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.reference import wire
from hetkv.reference.messages import (
    Abort,
    Bundle,
    Done,
    Frame,
    Grant,
    Heartbeat,
    Prelude,
    Recall,
    Record,
    Release,
    SlotGrant,
    Ticket,
    Type,
)
from hetkv.reference.payload import payload_parts
from hetkv.transport.config import TransferConfig
from hetkv.transport.handle import request_key
from hetkv.transport.node import Node
from hetkv.transport.receiver import Receiver, RecvHandle
from hetkv.transport.sender import Sender, SendHandle
from tests.transport.peers import WAIT_S, check_transfer, connected, duplicate, randomise, settled, until

SPEC = KVSpec.uniform(2, 2, 64)
CONFIG = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384, heartbeat_s=60, peer_timeout_s=600)
"""No heartbeats, so that the sequence numbers of injected messages are known."""
REQUEST = "hostile"
BLOCKS = [5, 3]
TOKENS = 30


@dataclass
class Attack:
    """A request under way: the receiver has given its ticket and slots, the sender has sent layer 0."""

    sender: Sender
    receiver: Receiver
    tx: SendHandle
    rx: RecvHandle
    epoch: int

    def inject(self, node: Node[Any], build: Callable[[int, bytes], bytes]) -> None:
        """Send `build(sequence, key)` from `node` to its peer."""
        [peer] = node.peers
        sequence = node.engine.next_sequence(peer.link)
        node.engine.inject(peer.link, build(sequence, peer.connection.data_keys.send))

    def message(
        self, node: Node[Any], kind: Type, body: Any, *, request: bool = True, epoch: int | None = None
    ) -> None:
        """Send a well-formed message."""
        epoch = (self.epoch if epoch is None else epoch) if request else 0
        name = request_key(REQUEST) if request else bytes(16)
        self.inject(node, lambda sequence, key: wire.encode(Prelude(kind, sequence, name, epoch), body, key))


def frame(**changes: Any) -> Frame:
    """A good frame of layer 1 (its checksum aside), as changed; slots are what the test makes of them."""
    fields = {
        "group": 0, "segments": 3, "layer": 1, "head_start": 0, "head_stop": 2, "token_start": 0, "token_stop": TOKENS,
        "dtypes": (3, 3, 0, 0), "channels": (64, 64, 0, 0), "slot": 0, "generation": 0,
    }  # fmt: skip
    fields.update(changes)
    made = Frame(**fields)
    if "payload_length" not in changes:
        length = sum(-(-part.bytes // 8) * 8 for part in payload_parts(made))
        made = msgspec.structs.replace(made, payload_length=length)
    return made


@contextlib.contextmanager
def attacked(*, reconnect: bool = False) -> Iterator[Attack]:
    """An attack; at its end no byte outside the ticket's blocks has changed, and the next request works."""
    source, destination = randomise(KVPool.allocate(SPEC, 12), 1), randomise(KVPool.allocate(SPEC, 12, layout="hnd"), 2)
    before = duplicate(destination)
    with connected([source], [destination], CONFIG) as ([sender], [receiver]):
        tx = sender.send(REQUEST, BLOCKS, TOKENS)
        tx.send_layer(0)
        rx = receiver.receive(REQUEST, BLOCKS, TOKENS)
        rx.wait_layer(0, WAIT_S)
        epoch = receiver.engine.epoch(rx.handle)
        yield Attack(sender, receiver, tx, rx, epoch)
        for layer in (0, 1):
            for name in "kv":
                kept = [block for block in range(12) if block not in BLOCKS]
                now, then = (pool.view(layer, name).view(torch.int16)[kept] for pool in (destination, before))
                assert now.equal(then)
        if reconnect:
            for peer in receiver.peers:
                receiver.disconnect(peer)
            until(lambda: not sender.peers and not receiver.peers, lambda: f"{sender.peers} {receiver.peers}")
            ended(tx, rx)
            until(lambda: receiver.stats()["quarantined_slots"] == 0, lambda: f"{receiver.stats()}")
            receiver.connect(sender.listen())
            until(lambda: bool(sender.peers))
        else:
            tx.abort()
            rx.abort()
        check_transfer(source, destination, sender, receiver, 150, request="next")
        settled(sender, receiver)


def ended(*requests: Any) -> None:
    for pending in requests:
        with pytest.raises(HetkvError):
            pending.wait(WAIT_S)


def flip(message: bytes, at: int) -> bytes:
    return message[:at] + bytes([message[at] ^ 4]) + message[at + 1 :]


def heartbeat(sequence: int, key: bytes) -> bytes:
    return wire.encode(Prelude(Type.HEARTBEAT, sequence), Heartbeat(1), key)


def reseal(message: bytes, at: int, value: bytes, key: bytes) -> bytes:
    """The message with other bytes at one place and a MAC that fits."""
    return wire.seal(message[:at] + value + message[at + len(value) : -8], key)


FOREIGN_KEY = bytes(range(16))
ENDS_THE_LINK = {
    "empty": (lambda s, k: b"", MalformedError),
    "truncated": (lambda s, k: heartbeat(s, k)[:-8], MalformedError),
    "oversized": (lambda s, k: heartbeat(s, k) + bytes(1 << 17), MalformedError),
    "over the limit": (lambda s, k: reseal(heartbeat(s, k), 8, (1 << 20).to_bytes(4, "little"), k), MalformedError),
    "foreign": (lambda s, k: b"GET / HTTP/1.1" + bytes(50), MalformedError),
    "bit flipped in the sequence": (lambda s, k: flip(heartbeat(s, k), 16), AuthenticationError),
    "bit flipped in the body": (lambda s, k: flip(heartbeat(s, k), 50), AuthenticationError),
    "bit flipped in the MAC": (lambda s, k: flip(heartbeat(s, k), 60), AuthenticationError),
    "wrong key": (lambda s, k: heartbeat(s, FOREIGN_KEY), AuthenticationError),
    "replayed": (lambda s, k: heartbeat(s - 1, k), AuthenticationError),
    "number left out": (lambda s, k: heartbeat(s + 1, k), AuthenticationError),
    "major version": (lambda s, k: reseal(heartbeat(s, k), 4, b"\x02", k), UnsupportedError),
    "unknown type": (lambda s, k: reseal(heartbeat(s, k), 6, b"\x63\x00", k), UnsupportedError),
}


@pytest.mark.parametrize("from_sender", [True, False])
@pytest.mark.parametrize("name", ENDS_THE_LINK)
def test_bad_bytes_end_the_link_on_both_sides_at_once(name: str, from_sender: bool) -> None:
    build, error = ENDS_THE_LINK[name]
    with attacked(reconnect=True) as attack:
        attack.inject(attack.sender if from_sender else attack.receiver, build)
        victim, other = (attack.rx, attack.tx) if from_sender else (attack.tx, attack.rx)
        with pytest.raises(error):
            victim.wait(WAIT_S)
        with pytest.raises(PeerLostError):
            other.wait(WAIT_S)


@pytest.mark.parametrize(
    ("from_sender", "kind", "body", "request_"),
    [
        (True, Type.TICKET, Ticket(1000, ((0, 1),)), True),
        (True, Type.RECALL, Recall(), False),
        (True, Type.RELEASE, Release(((77, 0),)), False),
        (False, Type.FRAME, None, True),
        (False, Type.WANT, None, False),
        (False, Type.GRANT, Grant((SlotGrant(0, 0, 4096, 16384),)), False),
        (False, Type.GRANT, Grant((SlotGrant(9, 0, 4096, 16384),)), False),
        (False, Type.GRANT, Grant((SlotGrant(9, 0, 4096, 8, b"key"),)), False),
    ],
)
def test_messages_that_the_state_does_not_allow_end_the_link(
    from_sender: bool, kind: Type, body: Any, request_: bool
) -> None:
    with attacked(reconnect=True) as attack:
        body = frame() if kind is Type.FRAME else body
        attack.message(attack.sender if from_sender else attack.receiver, kind, body, request=request_)
        victim, other = (attack.rx, attack.tx) if from_sender else (attack.tx, attack.rx)
        with pytest.raises(ProtocolError):
            victim.wait(WAIT_S)
        with pytest.raises(PeerLostError):
            other.wait(WAIT_S)


BAD_FRAMES = {
    "wrong checksum": ({"checksum": 1}, ChecksumError),
    "tokens outside the ticket": ({"token_start": 8, "token_stop": TOKENS + 1}, ProtocolError),
    "tokens far outside": ({"token_start": 1 << 40, "token_stop": (1 << 40) + 1}, ProtocolError),
    "layer of no route": ({"layer": 2}, ProtocolError),
    "other heads": ({"head_start": 1, "head_stop": 2}, ProtocolError),
    "heads that do not exist": ({"head_start": 2, "head_stop": 4}, ProtocolError),
    "other cache group": ({"group": 1}, ProtocolError),
    "wrong dtype": ({"dtypes": (2, 3, 0, 0)}, ProtocolError),
    "wrong channels": ({"channels": (64, 32, 0, 0)}, ProtocolError),
    "segment left out": ({"segments": 1, "dtypes": (3, 0, 0, 0), "channels": (64, 0, 0, 0)}, ProtocolError),
    "layer that came before": ({"layer": 0, "token_start": 4, "token_stop": 9}, ProtocolError),
    "slot that does not exist": ({"slot": 4}, ProtocolError),
    "slot that does not exist at all": ({"slot": 2**32 - 1}, ProtocolError),
    "slot of another generation": ({"generation": 1}, ProtocolError),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames_fail_their_request_alone(name: str) -> None:
    changes, error = BAD_FRAMES[name]
    with attacked(reconnect=not name.startswith("slot")) as attack:
        attack.message(attack.sender, Type.FRAME, frame(**changes))
        with pytest.raises(error):
            attack.rx.wait(WAIT_S)
        with pytest.raises(error, match="receiver gave the request up"):
            attack.tx.wait(WAIT_S)
        if name.startswith("slot"):  # elsewhere the real sender does not know that its slot is spent
            assert attack.sender.peers
            assert attack.receiver.peers


def payload_of(frame_: Frame, at: int = 0, *, request: str = REQUEST, epoch: int) -> Record:
    """A frame as a bundle's record."""
    named = msgspec.structs.replace(frame_, slot=0, generation=0)
    return Record(request_key(request), epoch, named, at)


def test_a_record_that_is_stale_or_bad_fails_alone() -> None:
    """One bundle: a frame of an earlier attempt, one of a request that is not under way, one of a layer that does not
    exist. Only the request of the last one fails, and its neighbour with a damaged payload for its own reason."""
    with attacked(reconnect=True) as attack:
        other = attack.receiver.receive("other", [5], 16)
        attack.sender.send("other", [0], 16)
        until(lambda: attack.receiver.stats()["open_requests"] == 2)
        epoch = attack.receiver.engine.epoch(other.handle)
        one = frame(token_stop=1)
        records = (
            payload_of(one, 0, epoch=attack.epoch - 1),
            payload_of(one, 4096, request="nobody", epoch=1),
            payload_of(frame(layer=2, token_stop=1), 8192, epoch=attack.epoch),
            payload_of(one, 12288, request="other", epoch=epoch),
        )
        attack.message(attack.sender, Type.BUNDLE, Bundle(0, 0, records), request=False)
        with pytest.raises(ProtocolError, match="of no route"):
            attack.rx.wait(WAIT_S)
        with pytest.raises(ChecksumError):
            other.wait(WAIT_S)
        assert attack.receiver.stats()["stale_frames"] == 2


def test_a_bundle_past_its_slot_fails_its_requests() -> None:
    with attacked(reconnect=True) as attack:
        record = payload_of(frame(token_stop=1), 16384, epoch=attack.epoch)
        attack.message(attack.sender, Type.BUNDLE, Bundle(0, 0, (record,)), request=False)
        with pytest.raises(ProtocolError, match="bytes at 16384"):
            attack.rx.wait(WAIT_S)


@pytest.mark.parametrize("epoch", [0, 1, 2**64 - 1])
def test_frames_of_another_attempt_are_dropped(epoch: int) -> None:
    with attacked() as attack:
        attack.message(attack.sender, Type.FRAME, frame(slot=9), epoch=epoch)
        until(lambda: attack.receiver.stats()["stale_frames"] == 1)
        assert not attack.rx.done()
        assert not attack.tx.done()


@pytest.mark.parametrize("from_sender", [True, False])
def test_aborts(from_sender: bool) -> None:
    with attacked() as attack:
        node = attack.sender if from_sender else attack.receiver
        attack.message(node, Type.ABORT, Abort(9, "of another attempt"), epoch=attack.epoch - 1)
        attack.message(node, Type.ABORT, Abort(9, "\N{SNOWMAN}" * 170))
        with pytest.raises(AbortedError, match="\N{SNOWMAN}" * 170):
            (attack.rx if from_sender else attack.tx).wait(WAIT_S)


@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (1 << 60, 1 << 60)])
def test_a_receiver_that_is_done_too_early(counts: tuple[int, int]) -> None:
    with attacked() as attack:
        attack.message(attack.receiver, Type.DONE, Done(*counts))
        with pytest.raises(ProtocolError, match="the receiver says"):
            attack.tx.wait(WAIT_S)
        with pytest.raises(ProtocolError):
            attack.rx.wait(WAIT_S)


@pytest.mark.parametrize("groups", [((0, TOKENS + 1),), ((0, 1 << 62),), ((0, 1), (0, 1))])
def test_a_ticket_that_asks_for_more_than_there_is(groups: tuple[tuple[int, int], ...]) -> None:
    with attacked() as attack:
        attack.message(attack.receiver, Type.TICKET, Ticket(60_000, groups))
        with pytest.raises(ProtocolError, match="the ticket"):
            attack.rx.wait(WAIT_S)
        with pytest.raises(ProtocolError, match="the ticket"):
            attack.tx.wait(WAIT_S)  # the sender learns it at once, too


def test_an_honest_receiver_that_asks_for_too_much() -> None:
    with attacked() as attack:
        attack.sender.send("short", [0], 10)
        rx = attack.receiver.receive("short", [5], 16)
        with pytest.raises(ProtocolError, match=r"the request has \[0, 10\)"):
            rx.wait(WAIT_S)
        again = attack.receiver.receive("short", [5], 10)
        again.abort()
        ended(again)


def test_an_id_that_will_not_be_sent_again_is_rejected() -> None:
    """The ticket that waits and those that come, until the id is sent after all."""
    with attacked() as attack:
        sender, receiver = attack.sender, attack.receiver
        waiting = receiver.receive("over", [5], 16)
        until(lambda: sender.stats()["pending_tickets"] == 1)
        sender.reject("over", "all of it was sent")
        for _ in range(3):
            with pytest.raises(AbortedError, match="all of it was sent"):
                waiting.wait(WAIT_S)
            waiting = receiver.receive("over", [5], 16)
        ended(waiting)
        assert sender.stats()["pending_tickets"] == 0
        tx, rx = sender.send("over", [0], 16), receiver.receive("over", [5], 16)
        sender.reject("over", "it is under way")
        tx.send_layers()
        rx.wait(WAIT_S)


@pytest.mark.parametrize("sender_aborts", [True, False])
@pytest.mark.parametrize("stage", ["alone", "ticket", "half", "packed"])
def test_abort_on_either_side_at_every_stage(stage: str, sender_aborts: bool) -> None:
    with attacked() as attack:
        sender, receiver = attack.sender, attack.receiver
        if stage == "alone":
            pending = sender.send("stage", [0], 16) if sender_aborts else receiver.receive("stage", [5], 16)
            pending.abort("why not")
            with pytest.raises(AbortedError, match="why not"):
                pending.wait(WAIT_S)
            return
        rx = receiver.receive("stage", [5], 16)
        until(lambda: sender.stats()["pending_tickets"] == 1)
        tx = sender.send("stage", [0], 16)
        if stage in ("half", "packed"):
            tx.send_layer(0)
            rx.wait_layer(0, WAIT_S)
        if stage == "packed":
            tx.send_layer(1)
            tx.wait_packed(WAIT_S)
            for pending in (tx, rx):
                pending.wait(WAIT_S)
                pending.abort()  # too late: the answer stands
                pending.wait(WAIT_S)
            return
        (tx if sender_aborts else rx).abort("why not")
        for pending in (tx, rx):
            with pytest.raises(AbortedError, match="why not"):
                pending.wait(WAIT_S)
