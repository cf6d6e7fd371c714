"""The TCP control channel between two ranks: `connect`, `Listener`, `ControlConnection`.

It carries the handshake and both descriptions, then stays open so that its end tells of a dead process. Protocol:
`docs/control-channel.md`. Messages of requests go over the data plane with the keys that are agreed here.
"""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from hetkv.control.address import Address
from hetkv.control.agreement import Agreement
from hetkv.control.channel import Channel, Records
from hetkv.control.compat import check_minor
from hetkv.control.description import (
    Accept,
    Bye,
    Description,
    Message,
    Ready,
    Rejection,
    Streaming,
    decode,
    encode,
    for_minor,
    same_kernel,
)
from hetkv.control.handshake import Keys, Opening, Role, authenticate, check_secret, other_role
from hetkv.control.reactor import Steps, call, run, shared
from hetkv.control.streams import Desk, Streams, dial
from hetkv.errors import (
    ControlError,
    ControlTimeoutError,
    IncompatibleError,
    InputError,
    ListenerBusyError,
    MessageError,
    PeerLostError,
)

DEFAULT_TIMEOUT_S = 10.0
SILENCE_S = 10.0
MAX_UNREAD_MESSAGES = 256
LINGER_S = 1.0
RETRY_S, MAX_RETRY_S = 0.05, 1.0

Describe = Callable[[], Description]
Admit = Callable[[Description], None]
_M = TypeVar("_M")


class DataKeys(NamedTuple):
    """SipHash keys of the data plane, 16 bytes each."""

    send: bytes
    receive: bytes


class ControlConnection:
    """An authenticated connection to one peer whose description fits. Owns its socket; the process's `Reactor` reads.

    Any thread may call any method. Call `close` when done, also after a loss.
    """

    def __init__(
        self, channel: Channel, records: Records, keys: Keys, agreement: Agreement, timeout: float, streams: Streams
    ) -> None:
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
        self.streams = streams
        """The data plane's sockets. Closed with the connection; the engine has duplicates."""
        self._channel, self._records, self._timeout = channel, records, timeout
        self._sending = threading.Lock()
        self._state = threading.Condition()
        self._unread: deque[Message] = deque()
        self._callbacks: list[Callable[[ControlError], None]] = []
        self._lost: ControlError | None = None
        self._failed_send: ControlError | None = None
        self._closed = False
        self._reader = shared().start(self._read(), self._end)

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

        It is called in the reactor's thread (or here), must not wait, and may call `close`. A `close` of this side is
        no loss. The reason is a `PeerLostError` (`orderly` where the peer closed), a `MessageError`, an
        `AuthenticationError`, or the `ControlTimeoutError` of a `send` that stalled.
        """
        with self._state:
            if self._lost is None or self._closed:
                self._callbacks.append(callback)
                return
            lost = self._lost
        callback(lost)

    def close(self, reason: str = "") -> None:
        """Say goodbye, stop reading, free the descriptor. May be called again, and from an `on_lost` callback."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            standing = self._lost is None
            self._callbacks.clear()
            self._state.notify_all()
        linger = 0.0 if shared().in_thread() else LINGER_S
        if standing and self._sending.acquire(timeout=linger):
            try:
                self._write(Bye(reason[:512]), time.monotonic() + linger)
            except ControlError:
                pass  # the peer is gone: nothing left to tell it
            finally:
                self._sending.release()
        self._channel.wake()
        shared().stop(self._reader)
        with self._sending:
            self._channel.close()
        self.streams.close()

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
            run(self._records.write(encode(message), deadline))
        except (PeerLostError, ControlTimeoutError) as error:
            self._failed_send = self._failed_send or error
            self._channel.wake()
            raise

    def _read(self) -> Steps[None]:
        """What the reactor runs."""
        while True:
            payload = yield from self._records.read(None)
            self._take(decode(payload, self.peer_address))

    def _end(self, _: object, error: BaseException | None) -> None:
        """Reading has ended, and with it the connection."""
        lost = error if isinstance(error, ControlError) else MessageError(f"{self.peer_address}: {error!r}")
        self._channel.wake()
        with self._state:
            if self._closed:
                return
            self._lost = lost = self._failed_send or lost
            callbacks, self._callbacks = self._callbacks, []
            self._state.notify_all()
        for callback in callbacks:
            call(callback, lost)

    def _take(self, message: Message) -> None:
        if isinstance(message, Bye):
            why = f": {message.reason}" if message.reason else ""
            raise PeerLostError(f"{self.peer_address}: the peer closed the connection{why}", orderly=True)
        if not isinstance(message, Ready):
            raise MessageError(f"{self.peer_address}: message {type(message).__name__} after the handshake")
        with self._state:
            if len(self._unread) == MAX_UNREAD_MESSAGES:
                raise MessageError(f"{self.peer_address}: more than {MAX_UNREAD_MESSAGES} unread control messages")
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
    silence: float = SILENCE_S,
    admit: Admit | None = None,
    streams: int = 1,
) -> ControlConnection:
    """Connect to a `Listener` and run the handshake, at most `timeout` seconds for each step of it.

    A listener that has too many handshakes ends some: this tries again, with growing random pauses, for `timeout`
    seconds. `describe` makes this side's description, after the peer is authenticated. With `tls` the certificate is
    checked as the context says, against `tls_hostname` (default: the address's host). `silence` and `admit` are as for
    `Listener`. `streams`: how many connections of the data plane to make where they are TCP.

    Raises `InputError`, `PeerLostError` (no process listens there, or the peer ended), `ControlTimeoutError`,
    `AuthenticationError`, `MessageError`, `HandshakeError` with its subclasses `VersionError` and `IncompatibleError`.
    """
    check_secret(secret)
    target = Address.parse(address)
    if not target.host or not target.port:
        raise InputError(f"address {address!r}: to connect, name a host and a port")
    deadline, pause = time.monotonic() + timeout, RETRY_S
    while True:
        channel = _reach(target, timeout)
        steps = establish(
            channel, role, secret, describe, timeout, tls, tls_hostname or target.host, silence, admit, streams
        )
        try:
            return run(steps)
        except ListenerBusyError:
            wait = random.uniform(pause / 2, pause)
            if time.monotonic() + wait > deadline:
                raise
            time.sleep(wait)
            pause = min(2 * pause, MAX_RETRY_S)


def _reach(target: Address, timeout: float) -> Channel:
    """A TCP connection."""
    try:
        sock = socket.create_connection(target, timeout)
    except TimeoutError:
        raise ControlTimeoutError(f"{target}: no connection within {timeout:g} s") from None
    except (OSError, UnicodeError) as error:
        raise PeerLostError(f"{target}: cannot connect: {getattr(error, 'strerror', None) or error}") from None
    try:
        return Channel(sock, str(target))
    except OSError as error:  # the peer may have reset it already
        sock.close()
        raise PeerLostError(f"{target}: {error.strerror or error}") from None


def establish(
    channel: Channel,
    role: Role,
    secret: bytes,
    describe: Describe,
    timeout: float = DEFAULT_TIMEOUT_S,
    tls: ssl.SSLContext | None = None,
    tls_hostname: str | None = None,
    silence: float = SILENCE_S,
    admit: Admit | None = None,
    streams: int = 1,
) -> Steps[ControlConnection]:
    """The connecting side's handshake over a connected channel, which the connection then owns; closed on failure.

    It waits for its streams where it is run.
    """

    def steps() -> Steps[ControlConnection]:
        if tls is not None:
            yield from channel.start_tls(tls, False, tls_hostname, time.monotonic() + timeout)
        keys = yield from authenticate(channel, secret, role, True, timeout)
        channel.end_when_silent(silence)
        records = Records(channel, keys.control_send, keys.control_receive)
        agreement = yield from _agree(
            records, channel.peer, _description(describe, role), True, timeout, keys.minor, admit
        )
        near = same_kernel(agreement.mine.host, agreement.theirs.host)
        made = dial(keys, channel, agreement.theirs.sockets if near else (), streams, timeout)
        try:
            yield from records.write(encode(Streaming(made.kind, len(made))), time.monotonic() + timeout)
            return ControlConnection(channel, records, keys, agreement, timeout, made)
        except BaseException:
            made.close()
            raise

    return _owning(channel, timeout, steps())


def receive(
    channel: Channel,
    opening: Opening,
    desk: Desk,
    role: Role,
    secret: bytes,
    describe: Describe,
    timeout: float = DEFAULT_TIMEOUT_S,
    silence: float = SILENCE_S,
    admit: Admit | None = None,
    on_authenticated: Callable[[], None] = lambda: None,
) -> Steps[ControlConnection]:
    """The listening side's handshake after the hello, with the same fate of the channel."""

    def steps() -> Steps[ControlConnection]:
        keys = yield from authenticate(channel, secret, role, False, timeout, opening)
        on_authenticated()
        channel.end_when_silent(silence)
        records = Records(channel, keys.control_send, keys.control_receive)
        with desk.expecting(keys):
            agreement = yield from _agree(
                records, channel.peer, _description(describe, role), False, timeout, keys.minor, admit
            )
            said = decode((yield from records.read(time.monotonic() + timeout, "streams")), channel.peer)
            if not isinstance(said, Streaming):
                raise MessageError(f"{channel.peer}: message {type(said).__name__} instead of its streams")
            made = desk.collect(keys, said.kind, said.count, channel.peer)
        return ControlConnection(channel, records, keys, agreement, timeout, made)

    return _owning(channel, timeout, steps())


def _owning(channel: Channel, timeout: float, steps: Steps[ControlConnection]) -> Steps[ControlConnection]:
    """The steps, and the channel's end where they fail."""
    try:
        try:
            return (yield from steps)
        except (PeerLostError, ControlTimeoutError):
            raise
        except ControlError:
            yield from channel.linger(min(LINGER_S, timeout))
            raise
    except BaseException:
        channel.close()
        raise


def _description(describe: Describe, role: Role) -> Description:
    mine = describe()
    if mine.role != role:
        raise InputError(f"this side is the {role}, but describes itself as {mine.role}")
    return mine


def _agree(
    records: Records,
    peer: str,
    mine: Description,
    connecting: bool,
    timeout: float,
    minor: int,
    admit: Admit | None,
) -> Steps[Agreement]:
    """Exchange descriptions and verdicts. The connecting side describes first, so that no two large writes meet."""

    def write(message: Message) -> Steps[None]:
        yield from records.write(encode(message), time.monotonic() + timeout)

    def read(kind: type[_M], what: str) -> Steps[_M]:
        message = decode((yield from records.read(time.monotonic() + timeout, what)), peer)
        if isinstance(message, Rejection):
            raise IncompatibleError(message.field, message.theirs, message.mine, message.why)
        if not isinstance(message, kind):
            raise MessageError(f"{peer}: message {type(message).__name__} instead of its {what}")
        return message

    def describe() -> Steps[None]:
        try:
            check_minor(mine, minor)
        except IncompatibleError as error:
            yield from write(Rejection(error.field, error.mine, error.theirs, error.why))
            raise
        yield from write(for_minor(mine, minor))

    if connecting:
        yield from describe()
    try:
        theirs = yield from read(Description, "description")
        if theirs.role != other_role(mine.role):
            raise MessageError(f"{peer}: authenticated as {other_role(mine.role)}, describes itself as {theirs.role}")
    except MessageError as error:
        yield from write(Rejection("description", "a well-formed description expected", "a malformed one", str(error)))
        raise
    if not connecting:
        yield from describe()
    try:
        agreement = Agreement.of(mine, theirs, minor)
        if admit is not None:
            admit(theirs)
    except IncompatibleError as error:
        yield from write(Rejection(error.field, error.mine, error.theirs, error.why))
        raise
    yield from write(Accept())
    yield from read(Accept, "verdict")
    return agreement
