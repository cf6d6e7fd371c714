"""Accepts control connections and hands over those that pass the handshake: `Listener`."""

from __future__ import annotations

import logging
import resource
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import msgspec

from hetkv.control.address import Address
from hetkv.control.channel import Channel
from hetkv.control.connection import LINGER_S, ControlConnection
from hetkv.control.description import Description
from hetkv.control.establish import (
    DEFAULT_TIMEOUT_S,
    SILENCE_S,
    Admit,
    Describe,
    Side,
    enter_tls,
    receive,
)
from hetkv.control.handshake import STREAM_MAGIC, Inside, Role, ask_for_tls, greet
from hetkv.control.local import LocalSockets
from hetkv.control.reactor import Steps, Task, Wait, call, shared
from hetkv.control.secret import Secrets, as_secrets
from hetkv.control.streams import Desk
from hetkv.control.tls import Tls
from hetkv.errors import AuthenticationError, ControlError, HetkvError, InputError, PeerLostError

MAX_HANDSHAKES = 512
MAX_HANDOVERS = 16
BACKLOG = 4096
BURST, REST_S = 64, 0.03
"""So many clients are accepted between rests: strangers in a flood take turns with the process's own work."""
_BACK_OFF_S = 0.2
_QUIET_S = 60.0
_MAX_NOTED = 1024
_log = logging.getLogger(__name__)


class Listener:
    """Listens from construction until `close`. Handshakes run in the process's `Reactor`; none holds up another.

    `on_connection` gets every connection that passed, in one of at most 16 short-lived threads, and owns it: `close` of
    the listener leaves it open. `on_rejected` gets (peer address, error) of every one that did not, in the reactor's
    thread, and must not wait; by default the first of a kind from a host within a minute is logged. `describe` is
    called for each peer after it is authenticated, and `admit` with the peer's description after it is found to fit:
    it may raise `IncompatibleError`. A peer whose host does not answer for `silence` seconds is lost.

    At most `max_handshakes` clients that have proved nothing may wait at once (and no more than a quarter of the
    descriptors that the process may have): a further one ends the oldest, so that silent clients cannot keep a peer
    out, and a peer that was ended so tries again.

    Raises `InputError` where the address is malformed or cannot be listened on, or the secret is too short.
    """

    def __init__(
        self,
        address: str,
        *,
        role: Role,
        secret: bytes | Secrets,
        describe: Describe,
        on_connection: Callable[[ControlConnection], None],
        on_rejected: Callable[[str, HetkvError], None] | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        tls: Tls | None = None,
        max_handshakes: int = MAX_HANDSHAKES,
        silence: float = SILENCE_S,
        admit: Admit | None = None,
    ) -> None:
        secrets, self._local = as_secrets(secret), LocalSockets()

        def describe_local() -> Description:
            return msgspec.structs.replace(describe(), sockets=self._local.names)

        self._side = Side(role, secrets, describe_local, timeout, tls, silence, admit)
        self._on_connection, self._on_rejected = on_connection, on_rejected or _Complaints().log
        self._max = max(1, min(max_handshakes, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        try:
            self._sock = bind(Address.parse(address))
        except InputError:
            self._local.close()
            raise
        self._desk = Desk()
        name = self._sock.getsockname()
        self.address = str(Address(name[0], name[1]))
        """Where it listens, with the port that the system chose for port 0."""
        self._lock = threading.Lock()
        self._strangers: dict[Channel, None] = {}
        self._handshakes: dict[Channel, Task] = {}
        self._passed: deque[ControlConnection] = deque()
        self._handovers: set[threading.Thread] = set()
        self._closing = False
        self._acceptors = [
            shared().start(self._accept(sock), lambda *_: None) for sock in (self._sock, *self._local.sockets)
        ]

    def close(self) -> None:
        """Stop listening, end running handshakes, join the threads. May be called again, and from a callback."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        for task in self._acceptors:
            shared().stop(task)
        self._sock.close()
        self._local.close()
        for task in list(self._handshakes.values()):
            shared().stop(task)
        for thread in list(self._handovers):
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, listening: socket.socket) -> Steps[None]:
        while True:
            yield Wait(listening.fileno(), select.POLLIN, None)
            rest = REST_S
            for _ in range(BURST):
                try:
                    sock, name = listening.accept()
                except BlockingIOError:
                    rest = 0.0
                    break
                except ConnectionAbortedError:
                    continue
                except OSError as error:
                    _log.error("%s: cannot accept: %s", self.address, error)
                    rest = _BACK_OFF_S  # out of descriptors: the client stays readable, so wait instead of spinning
                    break
                self._start(sock, str(Address(name[0], name[1])) if isinstance(name, tuple) else "a unix socket")
            if rest > 0:
                yield Wait(-1, 0, time.monotonic() + rest)

    def _start(self, sock: socket.socket, peer: str) -> None:
        try:
            channel = Channel(sock, peer)
        except OSError as error:
            sock.close()
            self._on_end(None, peer, PeerLostError(f"{peer}: {error}"))
            return
        if len(self._strangers) >= self._max:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.wake()
        self._strangers[channel] = None

        def done(connection: ControlConnection | None, error: BaseException | None) -> None:
            self._handshakes.pop(channel, None)
            self._strangers.pop(channel, None)
            self._on_end(connection, peer, error)

        task = shared().start(self._handshake(channel), done)
        if not task.ended.is_set():
            self._handshakes[channel] = task

    def _handshake(self, channel: Channel) -> Steps[ControlConnection | None]:
        """A connection, or `None` where it was a stream of one: both come to the same port."""
        side, inside = self._side, None
        try:
            deadline = time.monotonic() + side.timeout
            outside = side.tls is None
            if side.tls is not None:
                outside = (yield from channel.first_byte(deadline, "TLS handshake")) == STREAM_MAGIC[:1]
                if not outside:
                    inside = yield from self._enter_tls(channel, side.tls)
            opening = yield from greet(channel, side.role, side.timeout)
            if opening.magic == STREAM_MAGIC:
                yield from self._desk.accept(channel, opening.sent, side.timeout)
                return None
            if outside and side.tls is not None:
                yield from ask_for_tls(channel, side.timeout)
                yield from channel.linger(min(LINGER_S, side.timeout))
                raise AuthenticationError(f"{channel.peer}: TLS failed: the peer does not speak it")
        except BaseException:
            channel.close()
            raise
        passed = partial(self._strangers.pop, channel, None)
        return (yield from receive(channel, opening, self._desk, side, inside, passed))

    def _enter_tls(self, channel: Channel, tls: Tls) -> Steps[Inside]:
        """TLS; where it fails the peer gets the alert that says why, before the connection ends."""
        try:
            return (yield from enter_tls(channel, tls, None, self._side.timeout))
        except AuthenticationError:
            yield from channel.linger(min(LINGER_S, self._side.timeout))
            raise

    def _on_end(self, connection: ControlConnection | None, peer: str, error: BaseException | None) -> None:
        """A handshake has ended."""
        if connection is not None:
            self._hand_over(connection)
        elif isinstance(error, HetkvError):
            call(self._on_rejected, peer, error)
        elif error is not None:
            _log.error("%s: handshake failed", peer, exc_info=error)

    def _hand_over(self, connection: ControlConnection) -> None:
        """What the owner does with it may take a while."""
        with self._lock:
            if not self._closing:
                self._passed.append(connection)
                if len(self._handovers) < MAX_HANDOVERS:
                    thread = threading.Thread(target=self._work, name="hetkv-handover", daemon=True)
                    self._handovers.add(thread)
                    thread.start()
                return
        connection.close("the listener closed")

    def _work(self) -> None:
        """Body of a thread: hands connections over while there are any."""
        while True:
            with self._lock:
                if not self._passed:
                    self._handovers.discard(threading.current_thread())
                    return
                connection, closing = self._passed.popleft(), self._closing
            if closing:
                connection.close("the listener closed")
                continue
            try:
                self._on_connection(connection)
            except BaseException:
                _log.exception("%s: on_connection callback failed", connection.peer_address)
                connection.close("this side failed")


def bind(address: Address) -> socket.socket:
    """A non-blocking listening socket; all interfaces, IPv4 and IPv6 where there is one, for an empty host."""
    try:
        if not address.host and socket.has_dualstack_ipv6():
            sock = socket.create_server(
                ("::", address.port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
            )
        else:
            found = socket.getaddrinfo(address.host or "0.0.0.0", address.port, type=socket.SOCK_STREAM)[0]
            sock = socket.create_server(found[4], family=found[0], backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}") from None
    sock.setblocking(False)
    return sock


class _Complaints:
    """Logs what was rejected; the same from one host once a minute, with the number of those in between."""

    def __init__(self) -> None:
        self._noted: dict[tuple[str, str], list[float]] = {}

    def log(self, peer: str, error: HetkvError) -> None:
        what = f"{type(error).__name__} {getattr(error, 'field', '')}"  # of an `IncompatibleError`
        kind, now = (peer.rpartition(":")[0], what), time.monotonic()
        last = self._noted.get(kind)
        if last is not None and now - last[0] < _QUIET_S:
            last[1] += 1
            return
        if len(self._noted) >= _MAX_NOTED:
            self._noted.clear()
        self._noted[kind] = [now, 0]
        level = logging.WARNING if isinstance(error, ControlError) else logging.ERROR
        more = f" ({last[1]:.0f} more from there since the last such line)" if last is not None and last[1] else ""
        _log.log(level, "control connection rejected: %s%s", error if peer in str(error) else f"{peer}: {error}", more)
