"""The TCP control channel between two ranks: `connect`, `Listener`, `ControlConnection`.

It carries the handshake and both descriptions, then stays open so that its end tells of a dead process. Protocol:
`docs/control-channel.md`. Messages of requests go over the data plane with the keys that are agreed here.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from hetkv.control.agreement import Agreement
from hetkv.control.channel import Channel, Records
from hetkv.control.compat import check_minor
from hetkv.control.description import Accept, Bye, Description, Message, Ready, Rejection, decode, encode, for_minor
from hetkv.control.handshake import Keys, Role, authenticate, check_secret, other_role
from hetkv.errors import (
    ControlError,
    ControlTimeoutError,
    IncompatibleError,
    InputError,
    MessageError,
    PeerLostError,
)

DEFAULT_TIMEOUT_S = 10.0
MAX_UNREAD_MESSAGES = 256
LINGER_S = 1.0

Describe = Callable[[], Description]
_log = logging.getLogger(__name__)
_M = TypeVar("_M")


class Address(NamedTuple):
    """A host name or address literal, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """`host:port`, `[ipv6]:port`, or `:port` for all interfaces of a listener. Raises `InputError`."""
        host, colon, port = text.rpartition(":")
        if not colon:
            raise InputError(f"address {text!r} has no port; write host:port")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise InputError(f"address {text!r}: write an IPv6 address in brackets, [host]:port")
        if not (port.isascii() and port.isdigit() and int(port) <= 65535):
            raise InputError(f"address {text!r}: port {port!r} is not a number from 0 to 65535")
        return cls(host, int(port))


class DataKeys(NamedTuple):
    """SipHash keys of the data plane, 16 bytes each."""

    send: bytes
    receive: bytes


class ControlConnection:
    """An authenticated connection to one peer whose description fits. Owns its socket and one reading thread.

    Any thread may call any method. Call `close` when done, also after a loss.
    """

    def __init__(self, channel: Channel, records: Records, keys: Keys, agreement: Agreement, timeout: float) -> None:
        self.agreement = agreement
        """What both sides are and how they exchange KV."""
        self.peer = agreement.theirs
        """The peer's description."""
        self.peer_address = channel.peer
        self.data_keys = DataKeys(keys.data_send, keys.data_receive)
        self.link_id = keys.link_id
        """64-bit number of this connection, equal on both sides: names the link on the data plane. Not secret."""
        self.minor = keys.minor
        """Version of the link: the lower one of the two sides."""
        self._channel, self._records, self._timeout = channel, records, timeout
        self._sending = threading.Lock()
        self._state = threading.Condition()
        self._unread: deque[Message] = deque()
        self._callbacks: list[Callable[[ControlError], None]] = []
        self._lost: ControlError | None = None
        self._failed_send: ControlError | None = None
        self._closed = False
        self._reader = threading.Thread(target=self._read, name=f"hetkv-control-{channel.peer}", daemon=True)
        self._reader.start()

    @property
    def lost(self) -> ControlError | None:
        """Why the connection ended, or `None` while it stands."""
        return self._lost

    def send(self, message: Message) -> None:
        """Send one message. Raises the reason of the loss where the connection has ended; `ControlTimeoutError`."""
        with self._sending:
            with self._state:
                self._check_open()
            self._write(message, time.monotonic() + self._timeout)

    def recv(self, timeout: float | None = None) -> Message:
        """Next message; messages that came before a loss are handed out first, then the loss is raised.

        Raises `ControlTimeoutError` after `timeout` seconds (`None`: waits for ever).
        """
        with self._state:
            if not self._state.wait_for(lambda: self._unread or self._lost or self._closed, timeout):
                raise ControlTimeoutError(f"{self.peer_address}: no control message within {timeout:g} s")
            if self._unread:
                return self._unread.popleft()
            self._check_open()
            raise AssertionError("woken without a reason")

    def on_lost(self, callback: Callable[[ControlError], None]) -> None:
        """Call `callback` exactly once when the connection ends, with the reason; at once where it has ended already.

        It is called in the reading thread (or here) and may call `close`. A `close` of this side is no loss. The
        reason is a `PeerLostError` (`orderly` where the peer closed), a `MessageError`, an `AuthenticationError`, or
        the `ControlTimeoutError` of a `send` that stalled.
        """
        with self._state:
            if self._lost is None or self._closed:
                self._callbacks.append(callback)
                return
            lost = self._lost
        callback(lost)

    def close(self, reason: str = "") -> None:
        """Say goodbye, end the thread, free the descriptor. May be called again, and from an `on_lost` callback."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            standing = self._lost is None
            self._callbacks.clear()
            self._state.notify_all()
        if standing and self._sending.acquire(timeout=LINGER_S):
            try:
                self._write(Bye(reason[:512]), time.monotonic() + LINGER_S)
            except ControlError:
                pass  # the peer is gone: nothing left to tell it
            finally:
                self._sending.release()
        self._channel.wake()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        with self._sending:
            self._channel.close()

    def __enter__(self) -> ControlConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLostError(f"{self.peer_address}: this side closed the connection")
        if self._lost is not None:
            raise self._lost

    def _write(self, message: Message, deadline: float) -> None:
        """Under `_sending`. A record that was cut short makes the stream useless, so a failure ends the connection."""
        try:
            self._records.write(encode(message), deadline)
        except (PeerLostError, ControlTimeoutError) as error:
            self._failed_send = self._failed_send or error
            self._channel.wake()
            raise

    def _read(self) -> None:
        """Body of the reading thread."""
        try:
            while True:
                self._take(decode(self._records.read(None), self.peer_address))
        except ControlError as error:
            lost = error
        self._channel.wake()
        with self._state:
            if self._closed:
                return
            self._lost = lost = self._failed_send or lost
            callbacks, self._callbacks = self._callbacks, []
            self._state.notify_all()
        for callback in callbacks:
            try:
                callback(lost)
            except Exception:
                _log.exception("%s: on_lost callback failed", self.peer_address)

    def _take(self, message: Message) -> None:
        if isinstance(message, Bye):
            why = f": {message.reason}" if message.reason else ""
            raise PeerLostError(f"{self.peer_address}: the peer closed the connection{why}", orderly=True)
        if not isinstance(message, Ready):
            raise MessageError(f"{self.peer_address}: message {type(message).__name__} after the handshake")
        with self._state:
            if len(self._unread) == MAX_UNREAD_MESSAGES:
                raise MessageError(
                    f"{self.peer_address}: more than {MAX_UNREAD_MESSAGES} control messages that nobody read"
                )
            self._unread.append(message)
            self._state.notify_all()


def connect(
    address: str,
    *,
    role: Role,
    secret: bytes,
    describe: Describe,
    timeout: float = DEFAULT_TIMEOUT_S,
    tls: ssl.SSLContext | None = None,
    tls_hostname: str | None = None,
) -> ControlConnection:
    """Connect to a `Listener` and run the handshake, at most `timeout` seconds for each step of it.

    `describe` makes this side's description, after the peer is authenticated. With `tls` the certificate is checked as
    the context says, against `tls_hostname` (default: the address's host). Raises `InputError`, `PeerLostError` (nobody
    listens, or the peer ended), `ControlTimeoutError`, `AuthenticationError`, `MessageError`, `HandshakeError` with its
    subclasses `VersionError` and `IncompatibleError`.
    """
    check_secret(secret)
    target = Address.parse(address)
    if not target.host or not target.port:
        raise InputError(f"address {address!r}: to connect, name a host and a port")
    try:
        sock = socket.create_connection(target, timeout)
    except TimeoutError:
        raise ControlTimeoutError(f"{target}: no connection within {timeout:g} s") from None
    except (OSError, UnicodeError) as error:
        raise PeerLostError(f"{target}: cannot connect: {getattr(error, 'strerror', None) or error}") from None
    channel = _owned(sock, str(target))
    return establish(channel, role, secret, describe, True, timeout, tls, tls_hostname or target.host)


def establish(
    channel: Channel,
    role: Role,
    secret: bytes,
    describe: Describe,
    connecting: bool,
    timeout: float = DEFAULT_TIMEOUT_S,
    tls: ssl.SSLContext | None = None,
    tls_hostname: str | None = None,
) -> ControlConnection:
    """The whole handshake over a connected channel, which the connection then owns; it is closed on failure."""
    try:
        try:
            if tls is not None:
                channel.start_tls(tls, not connecting, tls_hostname if connecting else None, time.monotonic() + timeout)
            keys = authenticate(channel, secret, role, connecting, timeout)
            records = Records(channel, keys.control_send, keys.control_receive)
            mine = describe()
            if mine.role != role:
                raise InputError(f"this side is the {role}, but describes itself as {mine.role}")
            agreement = _agree(records, channel.peer, mine, connecting, timeout, keys.minor)
        except (PeerLostError, ControlTimeoutError):
            raise
        except ControlError:
            channel.linger(min(LINGER_S, timeout))
            raise
        return ControlConnection(channel, records, keys, agreement, timeout)
    except BaseException:
        channel.close()
        raise


def _agree(records: Records, peer: str, mine: Description, connecting: bool, timeout: float, minor: int) -> Agreement:
    """Exchange descriptions and verdicts. The connecting side describes first, so that no two large writes meet."""

    def write(message: Message) -> None:
        records.write(encode(message), time.monotonic() + timeout)

    def read(kind: type[_M], what: str) -> _M:
        message = decode(records.read(time.monotonic() + timeout, what), peer)
        if isinstance(message, Rejection):
            raise IncompatibleError(message.field, message.theirs, message.mine, message.why)
        if not isinstance(message, kind):
            raise MessageError(f"{peer}: message {type(message).__name__} instead of its {what}")
        return message

    def describe() -> None:
        try:
            check_minor(mine, minor)
        except IncompatibleError as error:
            write(Rejection(error.field, error.mine, error.theirs, error.why))
            raise
        write(for_minor(mine, minor))

    if connecting:
        describe()
    try:
        theirs = read(Description, "description")
        if theirs.role != other_role(mine.role):
            raise MessageError(f"{peer}: authenticated as {other_role(mine.role)}, describes itself as {theirs.role}")
    except MessageError as error:
        write(Rejection("description", "a well-formed description expected", "a malformed one", str(error)))
        raise
    if not connecting:
        describe()
    try:
        agreement = Agreement.of(mine, theirs, minor)
    except IncompatibleError as error:
        write(Rejection(error.field, error.mine, error.theirs, error.why))
        raise
    write(Accept())
    read(Accept, "verdict")
    return agreement


def _owned(sock: socket.socket, peer: str) -> Channel:
    """A channel over the socket, which is closed where that fails: the peer may have reset it already."""
    try:
        return Channel(sock, peer)
    except OSError as error:
        sock.close()
        raise PeerLostError(f"{peer}: {error.strerror or error}") from None
