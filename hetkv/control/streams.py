"""The sockets of the data plane, dialled by the side that connected: `dial`, and `Desk` of the side that listens.

They reach the listener's own port, or a unix socket next to it where both processes run under one kernel and can. Each
is tied to its control connection by a key of that connection (`docs/control-channel.md`, "Streams").
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from hetkv.control.channel import Channel
from hetkv.control.handshake import MAJOR, MINOR, STREAM_MAGIC, Keys, read_hello
from hetkv.control.reactor import Steps, run
from hetkv.errors import (
    AuthenticationError,
    ControlError,
    ControlTimeoutError,
    HandshakeError,
    ListenerBusyError,
    PeerLostError,
)

Kind = Literal["unix", "tcp"]

_CALL = struct.Struct("<HHIQH6x")
"""What follows the magic of a call: major, minor, length of the whole call, number of the link, index of the stream."""
_TAG_BYTES = 32
CALL_BYTES = len(STREAM_MAGIC) + _CALL.size + _TAG_BYTES


class Streams:
    """Connected sockets of one link, and the keys of each. Owns the sockets until `close`."""

    def __init__(
        self, kind: Kind, sockets: Sequence[socket.socket], keys: Keys, cipher: str = "", tried: Sequence[str] = ()
    ) -> None:
        """`cipher`: what both sides agreed on for streams that leave the host; empty: none."""
        self.cipher = cipher if kind == "tcp" else ""
        """Of the frames of each stream; empty: they are not encrypted."""
        self.kind: Kind = kind
        """`unix`: the peer is on this host, and slots can be passed to it as descriptors."""
        self.tried = tuple(tried)
        """What was not to be had before that, and why."""
        self._sockets, self._keys = list(sockets), keys

    def config(self) -> list[tuple[int, bytes, bytes, str]]:
        """Descriptor, send key, receive key and cipher of each, for the engine, which duplicates the descriptors."""
        keys = self._keys.seals if self.cipher else self._keys.streams
        return [(sock.fileno(), *pair, self.cipher) for sock, pair in zip(self._sockets, keys, strict=False)]

    def __len__(self) -> int:
        return len(self._sockets)

    def close(self) -> None:
        """Give the descriptors back; the engine's duplicates stay."""
        for sock in self._sockets:
            sock.close()
        self._sockets = []


class Desk:
    """Where a listener's streams wait for the handshakes that they belong to. For the reactor's thread alone."""

    def __init__(self) -> None:
        self._expected: dict[int, tuple[Keys, dict[int, Channel]]] = {}

    @contextmanager
    def expecting(self, keys: Keys) -> Iterator[None]:
        """Take streams of this connection, from before its peer can call until its handshake has ended."""
        came: dict[int, Channel] = {}
        self._expected[keys.link_id] = keys, came
        try:
            yield
        finally:
            del self._expected[keys.link_id]
            for channel in came.values():
                channel.close()

    def accept(self, channel: Channel, sent: bytes, timeout: float) -> Steps[None]:
        """Check a call, keep its channel and answer. `sent` is the hello that this side has sent to it."""
        call = yield from channel.read(CALL_BYTES - len(STREAM_MAGIC), time.monotonic() + timeout, "call")
        major, minor, length, link, index = _CALL.unpack(call[: _CALL.size])
        if (major, length) != (MAJOR, CALL_BYTES):
            raise HandshakeError(f"{channel.peer}: call of version {major}.{minor} and {length} bytes")
        keys, came = self._expected.get(link, (None, {}))
        if keys is None or index >= len(keys.streams):
            raise AuthenticationError(f"{channel.peer}: a stream of a connection that is not in its handshake")
        head = STREAM_MAGIC + call[: _CALL.size]
        if not hmac.compare_digest(call[_CALL.size :], _tag(keys.call_receive, sent, head)):
            raise AuthenticationError(f"{channel.peer}: a stream without the key of its connection")
        if index in came:
            raise AuthenticationError(f"{channel.peer}: stream {index} of its connection came twice")
        came[index] = channel  # before the answer, after which the peer may say that all are there
        yield from channel.write(_tag(keys.call_send, sent, head), time.monotonic() + timeout)

    def collect(self, keys: Keys, kind: Kind, count: int, peer: str, cipher: str) -> Streams:
        """The connection's streams. Raises `HandshakeError` where some are missing."""
        if kind == "unix" and any(came.family != socket.AF_UNIX for came in self._expected[keys.link_id][1].values()):
            raise HandshakeError(f"{peer}: its streams are not the unix sockets that it says they are")
        came = self._expected[keys.link_id][1]
        if sorted(came) != list(range(count)):
            raise HandshakeError(f"{peer}: of {count} streams came {sorted(came)}")
        sockets = [came[index].release() for index in range(count)]
        came.clear()
        return Streams(kind, sockets, keys, cipher)


def dial(keys: Keys, target: Channel, names: Sequence[str], count: int, timeout: float, cipher: str = "") -> Streams:
    """Streams to the listener that `target` is connected to: over the first of its unix sockets that works, else TCP.

    Raises the `ControlError` of the last one tried.
    """
    tried: list[str] = []
    for name in names:
        address = "\0" + name[1:] if name.startswith("@") else name
        try:
            return Streams("unix", [_dial(keys, 0, socket.AF_UNIX, address, name, timeout)], keys, cipher, tried)
        except ControlError as error:
            tried.append(str(error))
    sockets: list[socket.socket] = []
    try:
        for index in range(count):
            sockets.append(_dial(keys, index, target.family, target.remote, target.peer, timeout))
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return Streams("tcp", sockets, keys, cipher, tried)


def _dial(keys: Keys, index: int, family: int, address: object, name: str, timeout: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(address)  # type: ignore[arg-type]  # of the family
        channel = Channel(sock, name)
    except TimeoutError:
        sock.close()
        raise ControlTimeoutError(f"{name}: no connection within {timeout:g} s") from None
    except OSError as error:
        sock.close()
        raise PeerLostError(f"{name}: cannot connect: {error.strerror or error}") from None
    try:
        run(_call(channel, keys, index, timeout))
    except PeerLostError as error:
        channel.close()
        raise ListenerBusyError(str(error), errno=error.errno) from None
    except BaseException:
        channel.close()
        raise
    return channel.release()


def _call(channel: Channel, keys: Keys, index: int, timeout: float) -> Steps[None]:
    head = STREAM_MAGIC + _CALL.pack(MAJOR, MINOR, CALL_BYTES, keys.link_id, index)
    yield from channel.write(STREAM_MAGIC, time.monotonic() + timeout)
    _, hello = yield from read_hello(channel, time.monotonic() + timeout)
    rest = head[len(STREAM_MAGIC) :] + _tag(keys.call_send, hello, head)
    yield from channel.write(rest, time.monotonic() + timeout)
    answer = yield from channel.read(_TAG_BYTES, time.monotonic() + timeout, "answer")
    if not hmac.compare_digest(answer, _tag(keys.call_receive, hello, head)):
        raise AuthenticationError(f"{channel.peer}: another process answered in the peer's place")


def _tag(key: bytes, hello: bytes, head: bytes) -> bytes:
    """Proof of the connection's key: over the listener's hello, whose nonce makes every call another one."""
    return hmac.digest(key, hello + head, "sha256")
