"""Accepts control connections and hands over those that pass the handshake: `Listener`."""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import threading
from collections.abc import Callable

from hetkv.control.channel import Channel
from hetkv.control.connection import DEFAULT_TIMEOUT_S, Address, ControlConnection, Describe, establish
from hetkv.control.handshake import Role, check_secret
from hetkv.errors import ControlError, HetkvError, InputError, PeerLostError

MAX_HANDSHAKES = 64
_BACK_OFF_MS = 200
_log = logging.getLogger(__name__)


class Listener:
    """Listens from construction until `close`. Each handshake runs in a thread of its own and harms no other.

    `on_connection` gets every connection that passed, in its handshake's thread, and owns it: `close` of the listener
    leaves it open. `on_rejected` gets (peer address, error) of every one that did not; by default the error is logged.
    `describe` is called for each peer after it is authenticated. At most `max_handshakes` run at once: a further client
    ends the oldest one, so that silent clients cannot keep a peer out.

    Raises `InputError` where the address is malformed or cannot be listened on, or the secret is too short.
    """

    def __init__(
        self,
        address: str,
        *,
        role: Role,
        secret: bytes,
        describe: Describe,
        on_connection: Callable[[ControlConnection], None],
        on_rejected: Callable[[str, HetkvError], None] | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
        max_handshakes: int = MAX_HANDSHAKES,
    ) -> None:
        check_secret(secret)
        self._role, self._secret, self._describe = role, secret, describe
        self._on_connection, self._on_rejected = on_connection, on_rejected or _log_rejection
        self._timeout, self._tls, self._max = timeout, tls, max_handshakes
        self._sock = _bind(Address.parse(address))
        name = self._sock.getsockname()
        self.address = str(Address(name[0], name[1]))
        """Where it listens, with the port that the system chose for port 0."""
        self._wake_read, self._wake_write = os.pipe()
        self._lock = threading.Lock()
        self._handshakes: dict[Channel, None] = {}
        self._threads: list[threading.Thread] = []  # the accepting thread's own, until it has ended
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept, name=f"hetkv-listen-{self.address}", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Stop listening, end running handshakes, join the threads. May be called again, and from a callback."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.write(self._wake_write, b"x")
            for channel in self._handshakes:
                channel.wake()
        self._acceptor.join()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._sock.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        """Body of the accepting thread."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        woken = select.poll()
        woken.register(self._wake_read, select.POLLIN)
        while not self._closing:
            poll.poll()
            if self._closing:
                return
            try:
                sock, name = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                _log.error("%s: cannot accept: %s", self.address, error)
                woken.poll(_BACK_OFF_MS)  # out of descriptors: the client stays readable, so wait instead of spinning
                continue
            self._start(sock, str(Address(name[0], name[1])))

    def _start(self, sock: socket.socket, peer: str) -> None:
        try:
            channel = Channel(sock, peer)
            thread = threading.Thread(target=self._serve, args=(channel,), name=f"hetkv-handshake-{peer}", daemon=True)
            with self._lock:
                if len(self._handshakes) >= self._max:
                    oldest = next(iter(self._handshakes))
                    del self._handshakes[oldest]
                    oldest.wake()
                self._handshakes[channel] = None
            try:
                thread.start()
            except RuntimeError:
                self._forget(channel)
                raise
            self._threads = [thread, *(other for other in self._threads if other.is_alive())]
        except (OSError, RuntimeError) as error:
            sock.close()
            self._reject(peer, PeerLostError(f"{peer}: {error}"))

    def _serve(self, channel: Channel) -> None:
        """Body of a handshake's thread."""
        try:
            connection = establish(channel, self._role, self._secret, self._describe, False, self._timeout, self._tls)
        except HetkvError as error:
            self._forget(channel)
            if not self._closing:
                self._reject(channel.peer, error)
        except Exception:
            self._forget(channel)
            _log.exception("%s: handshake failed", channel.peer)
        else:
            self._forget(channel)
            self._hand_over(connection)

    def _hand_over(self, connection: ControlConnection) -> None:
        if self._closing:
            connection.close("the listener closed")
            return
        try:
            self._on_connection(connection)
        except Exception:
            _log.exception("%s: on_connection callback failed", connection.peer_address)
            connection.close("this side failed")

    def _reject(self, peer: str, error: HetkvError) -> None:
        try:
            self._on_rejected(peer, error)
        except Exception:
            _log.exception("%s: on_rejected callback failed", peer)

    def _forget(self, channel: Channel) -> None:
        """The channel's handshake has ended: neither `close` nor a newer client may end it any more."""
        with self._lock:
            self._handshakes.pop(channel, None)


def _bind(address: Address) -> socket.socket:
    """A non-blocking listening socket; all interfaces, IPv4 and IPv6 where there is one, for an empty host."""
    try:
        if not address.host and socket.has_dualstack_ipv6():
            sock = socket.create_server(("::", address.port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            found = socket.getaddrinfo(address.host or "0.0.0.0", address.port, type=socket.SOCK_STREAM)[0]
            sock = socket.create_server(found[4], family=found[0])
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen on {address}: {getattr(error, 'strerror', None) or error}") from None
    sock.setblocking(False)
    return sock


def _log_rejection(peer: str, error: HetkvError) -> None:
    level = logging.WARNING if isinstance(error, ControlError) else logging.ERROR
    _log.log(level, "control connection rejected: %s", error if peer in str(error) else f"{peer}: {error}")
