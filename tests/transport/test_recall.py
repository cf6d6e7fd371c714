"""Slots that a receiver asks back, where its messages and a sender's answers cross."""

from __future__ import annotations

import socket

from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.reference import wire
from hetkv.reference.messages import Body, Grant, Prelude, Recall, Release, Type
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, WAIT_S, randomise
from tests.transport.stream_peer import StreamPeer
from tests.transport.test_faults import frame

SPEC = KVSpec.uniform(2, 2, 64)
ONE_SLOT = TransferConfig(slot_bytes=16384, window_bytes=16384, heartbeat_s=60, peer_timeout_s=600)


class SlowReader(StreamPeer):
    """Reads and answers its receiver's messages when the test says so."""

    spec, config = SPEC, ONE_SLOT

    def __init__(self, receiver: Receiver) -> None:
        super().__init__(receiver)
        self.sequence = 0

    def read(self, kind: type[Body]) -> Body:
        """The next message of that kind; others before it, and frames that are no messages, are dropped."""
        while True:
            head = self.sock.recv(40, socket.MSG_WAITALL)
            length, frame_kind = int.from_bytes(head[:4], "little"), head[4]
            if frame_kind != 1:
                continue
            _, body = wire.decode(self.sock.recv(length, socket.MSG_WAITALL), self.connection.data_keys.receive)
            if isinstance(body, kind):
                return body

    def say(self, kind: Type, body: Body, request: bytes = bytes(16), epoch: int = 0) -> None:
        prelude = Prelude(kind, self.sequence, request, epoch)
        self.sequence += 1
        self.frame(1, wire.encode(prelude, body, self.connection.data_keys.send))


def test_a_slot_that_was_granted_after_a_recall_is_recalled_too() -> None:
    """One slot. Its sender answers a recall with nothing, as it has just used the slot, and gets it once more before
    the receiver reads that: the answer does not stand for the slot that it has by then and does not use."""
    receiver = Receiver(KVPool.allocate(SPEC, 16), secret=SECRET, instance="d", config=ONE_SLOT)
    source = randomise(KVPool.allocate(SPEC, 16), 1)
    with receiver, Sender(source, secret=SECRET, instance="p", config=ONE_SLOT) as sender:
        slow = SlowReader(receiver)
        receiver.connect(sender.listen())
        receiver.receive("stalled", [1, 2], 32, src_instance="hostile")
        [grant] = slow.read(Grant).slots
        tx = sender.send("ready", [3, 4], 32)
        rx = receiver.receive("ready", [3, 4], 32, src_instance="p")
        slow.read(Recall)
        stale = frame(slot=grant.slot, generation=grant.generation, token_stop=32)
        slow.say(Type.FRAME, stale, bytes(15) + b"\1", 1)  # of a request that has ended: it gives the slot back
        tx.send_layer(0)
        rx.wait_layer(0, WAIT_S)
        [grant] = slow.read(Grant).slots
        slow.say(Type.RELEASE, Release())  # to the recall that came before the grant
        tx.send_layer(1)
        slow.read(Recall)
        slow.say(Type.RELEASE, Release(((grant.slot, grant.generation),)))
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        slow.close()
