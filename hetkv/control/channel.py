"""Bytes over one TCP or TLS socket with deadlines (`Channel`), and authenticated records on top of it (`Records`).

What reads or writes is `Steps` of `hetkv/control/reactor.py`."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from hetkv.control.reactor import Steps, Wait
from hetkv.control.tls import names_of, tls_error
from hetkv.errors import AuthenticationError, ControlError, MessageError, PeerLostError

MAX_MESSAGE_BYTES = 1 << 20
"""Largest payload of one control record. A description of 128 different layers with 128 scales each takes 0.4 MiB."""

_HEADER = struct.Struct("<IIQ")
MAC_BYTES = 32
_PROBES = 3
_T = TypeVar("_T")


class Channel:
    """A connected socket that it owns. Deadlines are `time.monotonic()` seconds, or `None` for no limit.

    One thread may read while another writes, and any may call `wake`. The socket is non-blocking and every OpenSSL call
    is under a lock, because an `SSL` object is not thread-safe.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.peer = peer
        self.family = sock.family
        self.remote: object = sock.getpeername()
        """The peer's address, as the family has it."""
        self._sock = sock
        self._tls: ssl.SSLSocket | None = None
        self._lock = threading.Lock()
        self._life = threading.Lock()

    def end_when_silent(self, seconds: float) -> None:
        """The kernel ends the connection where the peer's host has not answered for about so long: it lost its power,
        or the network its way."""
        step = max(1, round(seconds / (_PROBES + 1)))
        with self._life, contextlib.suppress(OSError):  # the peer may have ended it already
            for option, value in (
                (socket.TCP_KEEPIDLE, step),
                (socket.TCP_KEEPINTVL, step),
                (socket.TCP_KEEPCNT, _PROBES),
                (socket.TCP_USER_TIMEOUT, round(seconds * 1000)),
            ):
                socket.socket.setsockopt(self._sock, socket.IPPROTO_TCP, option, value)

    def start_tls(self, context: ssl.SSLContext, host: str | None, deadline: float | None) -> Steps[None]:
        """TLS handshake, as a client where `host` is given, the name that the certificate may have to be of. Raises
        `CertificateError`, or `AuthenticationError` where the two sides' versions do not fit."""
        try:
            with self._life:
                sock = context.wrap_socket(
                    self._sock,
                    server_side=host is None,
                    server_hostname=host if context.check_hostname else None,
                    do_handshake_on_connect=False,
                )
                self._sock = self._tls = sock
        except OSError as error:
            raise PeerLostError(f"{self.peer}: {error.strerror or error}") from None
        yield from self._until(sock.do_handshake, select.POLLIN, deadline, "TLS handshake")

    def certificate(self) -> tuple[bytes, tuple[str, ...]]:
        """SHA-256 and the names of the peer's certificate, after `start_tls`."""
        assert self._tls is not None
        with self._lock:
            whole, read = self._tls.getpeercert(binary_form=True), self._tls.getpeercert()
        return hashlib.sha256(whole or b"").digest(), names_of(read)

    def read(self, size: int, deadline: float | None, what: str) -> Steps[bytes]:
        """Exactly `size` bytes; `PeerLostError` at the end, `ControlTimeoutError` when late. `what` is for the text."""
        data = bytearray()
        while len(data) < size:
            part = yield from self._until(partial(self._sock.recv, size - len(data)), select.POLLIN, deadline, what)
            if not part:
                raise PeerLostError(
                    f"{self.peer}: connection closed" + (f" inside its {what}" if data else f" before its {what}")
                )
            data += part
        return bytes(data)

    def write(self, data: bytes, deadline: float | None) -> Steps[None]:
        """All of `data`, or `PeerLostError`, or `ControlTimeoutError` where the peer does not take it in time."""
        view = memoryview(data)
        while view:
            sent = yield from self._until(partial(self._sock.send, view), select.POLLOUT, deadline, "reading")
            view = view[sent:]

    def first_byte(self, deadline: float | None, what: str) -> Steps[bytes]:
        """The next byte, which stays to be read; empty at the end."""
        return self._until(lambda: self._sock.recv(1, socket.MSG_PEEK), select.POLLIN, deadline, what)

    def linger(self, seconds: float) -> Steps[None]:
        """End writing; discard what comes until the peer ends too, as unread bytes would reset the last message."""
        deadline = time.monotonic() + seconds
        try:
            # The TCP half alone: a TLS close_notify is a courtesy, and unwrap() would wait for the peer's.
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            receive = partial(socket.socket.recv, self._sock, 4096)
            while (yield from self._until(receive, select.POLLIN, deadline, "end")):
                pass
        except (OSError, ControlError):
            pass  # the peer has gone, or takes too long

    def wake(self) -> None:
        """End both directions, so that a thread inside `read` or `write` returns with `PeerLostError`. Any thread."""
        with self._life, contextlib.suppress(OSError):  # the peer may have been first
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def release(self) -> socket.socket:
        """The socket, which is the caller's from now on."""
        with self._life:
            sock, self._sock = self._sock, socket.socket()
            self._sock.close()
        return sock

    def close(self) -> None:
        """Give the descriptor back. No other thread may be inside `read` or `write`."""
        with self._life:
            self._sock.close()

    def _until(self, operation: Callable[[], _T], event: int, deadline: float | None, what: str) -> Steps[_T]:
        """Try a non-blocking operation, waiting in between, until it succeeds or the deadline passes."""
        while True:
            try:
                with self._lock:
                    return operation()
            except ssl.SSLWantReadError:
                wait = select.POLLIN
            except ssl.SSLWantWriteError:
                wait = select.POLLOUT
            except BlockingIOError:
                wait = event
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                raise PeerLostError(f"{self.peer}: connection closed before its {what}") from None
            except ssl.SSLError as error:
                raise tls_error(self.peer, error) from None
            except OSError as error:
                raise PeerLostError(f"{self.peer}: {error.strerror or error}", errno=error.errno) from None
            descriptor = self._sock.fileno()
            if descriptor < 0:
                raise PeerLostError(f"{self.peer}: this side closed the connection")
            yield Wait(descriptor, wait, deadline, f"{self.peer}: timed out waiting for its {what}")


class Records:
    """Length, sequence number, payload and HMAC-SHA256, one key per direction (`docs/control-channel.md`).

    Reads and writes are each for one thread at a time; they do not disturb each other.
    """

    def __init__(self, channel: Channel, send_key: bytes, receive_key: bytes) -> None:
        self._channel = channel
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0
        self.limit = MAX_MESSAGE_BYTES
        """Of a payload that is read; a larger one is rejected before it is."""

    def write(self, payload: bytes, deadline: float | None) -> Steps[None]:
        """One record. Raises `MessageError` where the payload is larger than `MAX_MESSAGE_BYTES`."""
        if len(payload) > MAX_MESSAGE_BYTES:
            raise MessageError(f"a control message of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
        body = _HEADER.pack(len(payload), 0, self._sent) + payload
        self._sent += 1
        yield from self._channel.write(body + hmac.digest(self._send_key, body, "sha256"), deadline)

    def read(self, deadline: float | None, what: str = "next message") -> Steps[bytes]:
        """Payload of the next record, once its length, sequence number and MAC are right."""
        peer = self._channel.peer
        header = yield from self._channel.read(_HEADER.size, deadline, what)
        length, reserved, sequence = _HEADER.unpack(header)
        if length > self.limit:
            raise MessageError(f"{peer}: control message of {length} bytes is over the limit of {self.limit}")
        rest = yield from self._channel.read(length + MAC_BYTES, deadline, what)
        payload, mac = rest[:length], rest[length:]
        if not hmac.compare_digest(mac, hmac.digest(self._receive_key, header + payload, "sha256")):
            raise AuthenticationError(f"{peer}: control message {self._received} has a wrong MAC")
        if sequence != self._received or reserved != 0:
            raise MessageError(f"{peer}: control message has sequence number {sequence}, expected {self._received}")
        self._received += 1
        return payload
