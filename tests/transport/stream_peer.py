"""A sender that speaks the control channel as it should, and whatever a test wants on its stream: `StreamPeer`."""

from __future__ import annotations

import os
import socket
import struct
from typing import Any

import pytest

from hetkv.control.connection import ControlConnection
from hetkv.control.description import Ready
from hetkv.control.establish import connect
from hetkv.core import core
from hetkv.errors import HetkvError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, WAIT_S, attacked

Attack = tuple[dict[str, Any], type[HetkvError], str]
"""Fields of a frame, and the error and its text that end the link."""


class StreamPeer:
    """`spec` and `config` are what it describes itself with."""

    spec: KVSpec
    config: TransferConfig

    def __init__(self, receiver: Receiver) -> None:
        pool = KVPool.allocate(self.spec, 16)
        with Sender(pool, secret=SECRET, instance="hostile", config=self.config) as honest:
            description = honest.description
        self.connection: ControlConnection = connect(
            receiver.listen(), role="sender", secret=SECRET, describe=lambda: description
        )
        self.connection.send(Ready())
        self.connection.recv(WAIT_S)
        [(descriptor, self.key, _, _)] = self.connection.streams.config()
        self.sock = socket.socket(fileno=os.dup(descriptor))
        self.sock.settimeout(WAIT_S)
        self.place = 0

    def framed(self, kind: int, body: bytes = b"", *, number: int = 0, slot: int = 0, generation: int = 0,
               offset: int = 0, length: int | None = None, key: bytes | None = None) -> bytes:  # fmt: skip
        """The next frame of the stream, with a right MAC unless `key` is another one."""
        length = len(body) if length is None else length
        head = struct.pack("<IB3xQIIQ", length, kind, number, slot, generation, offset)
        mac = core.siphash24(key or self.key, head + struct.pack("<Q", self.place))
        self.place += 1
        return head + struct.pack("<Q", mac) + body

    def frame(self, kind: int, body: bytes = b"", **fields: int | bytes) -> None:
        """Send one; fields as `framed` has them."""
        self.sock.sendall(self.framed(kind, body, **fields))  # type: ignore[arg-type]

    def close(self) -> None:
        self.sock.close()
        self.connection.close()


def check_attack(peer_class: type[StreamPeer], kind: int, attack: Attack) -> None:
    """One frame of the kind ends the link, and the request that waits, with the error."""
    arguments, error, text = attack
    with attacked(peer_class, peer_class.spec, peer_class.config) as (peer, want):
        peer.frame(kind, **arguments)
        with pytest.raises(error, match=text):
            want.wait(WAIT_S)
