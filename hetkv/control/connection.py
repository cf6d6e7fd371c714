"""The TCP control channel between two ranks, once both have found that they fit: `ControlConnection`.

It stays open so that its end tells of a dead process. Protocol: `docs/control-channel.md`. Messages of requests go over
the data plane with the keys that were agreed here. How one is made: `hetkv/control/establish.py`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from hetkv.control.agreement import Agreement
from hetkv.control.channel import Channel, Records
from hetkv.control.description import Bye, Message, Ready, decode, encode
from hetkv.control.handshake import Keys
from hetkv.control.payloads import MAX_LATER_BYTES, MESSAGES_SINCE, Later
from hetkv.control.reactor import Steps, Wait, call, run, shared, with_own_descriptor
from hetkv.control.streams import Streams
from hetkv.errors import ControlError, ControlTimeoutError, MessageError, PeerLostError

MAX_UNREAD_MESSAGES = 256
TURN = 64
LINGER_S = 1.0
CLOSING_S = 3.0
"""How long `close` waits at most for a peer that takes what was posted, however slowly."""
MAX_POSTED_BYTES = 64 << 20
"""Of messages that wait until the peer reads."""


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
        self._posted: deque[bytes] = deque()
        self._posted_bytes = 0
        self._on_message: Callable[[Later], None] | None = None
        self._callbacks: list[Callable[[ControlError], None]] = []
        self._lost: ControlError | None = None
        self._failed_send: ControlError | None = None
        self._closed = self._shutting = False
        self._stopped = False
        """Nothing reads any more: who has the channel last closes it."""
        records.limit = MAX_LATER_BYTES
        self._reader = shared().start(self._read(), self._end)

    @property
    def lost(self) -> ControlError | None:
        """Why the connection ended, or `None` while it stands."""
        return self._lost

    def send(self, message: Message) -> None:
        """Send one message. Raises the reason of the loss where the connection has ended; `ControlTimeoutError`."""
        try:
            with self._sending:
                with self._state:
                    self._check_open()
                self._write(message, time.monotonic() + self._timeout)
        finally:
            self._go_on()

    def on_message(self, callback: Callable[[Later], None]) -> None:
        """Call `callback` with each message that is no part of the handshake, in the reactor's thread, where it must
        not wait. What it raises ends the connection. To be set before `Ready` is sent: the peer may say more then."""
        self._on_message = callback

    def post(self, message: Later) -> None:
        """Send one message after those before it; returns at once, in any thread. Nothing happens where the connection
        has ended, and it ends where more than `MAX_POSTED_BYTES` wait because the peer does not read."""
        data = encode(message)
        with self._state:
            if self._closed or self._lost is not None:
                return
            self._posted.append(data)
            self._posted_bytes += len(data)
            over = self._posted_bytes > MAX_POSTED_BYTES
        if over:
            self._fail(ControlTimeoutError(f"{self.peer_address}: the peer does not read control messages"))
        shared().start(self._write_posted(), lambda *_: None)

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
        linger, closing = (0.0, 0.0) if shared().in_thread() else (LINGER_S, CLOSING_S)
        if standing and self._sending.acquire(timeout=linger):
            until = time.monotonic() + closing
            try:
                while self._posted:
                    run(self._records.write(self._next_posted(), min(time.monotonic() + linger, until)))
                self._write(Bye(reason[:512]), min(time.monotonic() + linger, until))
            except ControlError:
                pass  # the peer is gone: nothing left to tell it
            finally:
                self._sending.release()
        self._shutting = True
        self._channel.wake()
        shared().stop(self._reader)
        self._stopped = True
        # The reactor's thread must not wait for its own steps, nor for a `send`: those close the channel, then, as they
        # are woken.
        if self._sending.acquire(blocking=not shared().in_thread()):
            self._channel.close()
            self._sending.release()
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
        except ControlError as error:
            self._fail(error)
            raise

    def _fail(self, error: ControlError) -> None:
        self._failed_send = self._failed_send or error
        self._channel.wake()

    def _go_on(self) -> None:
        """Somebody else had the channel while messages were posted, or while this side closed."""
        if self._stopped:
            self._channel.close()
        elif self._posted:
            shared().start(self._write_posted(), lambda *_: None)

    def _next_posted(self) -> bytes:
        with self._state:
            data = self._posted.popleft()
            self._posted_bytes -= len(data)
        return data

    def _write_posted(self) -> Steps[None]:
        """What the reactor runs for `post`. Whoever holds the channel meanwhile calls `_go_on` afterwards."""
        while self._posted and not self._shutting and self._sending.acquire(blocking=False):
            try:
                while self._posted and not self._shutting:
                    deadline = time.monotonic() + self._timeout
                    yield from with_own_descriptor(self._records.write(self._next_posted(), deadline))
            except ControlError as error:
                self._posted.clear()
                self._fail(error)
            finally:
                if self._stopped:
                    self._channel.close()
                self._sending.release()

    def _read(self) -> Steps[None]:
        """What the reactor runs. After each `TURN` messages others have theirs, whatever else has come already."""
        while True:
            for _ in range(TURN):
                payload = yield from self._records.read(None)
                self._take(decode(payload, self.peer_address))
            yield Wait(-1, 0, time.monotonic())

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
        if isinstance(message, Later) and self.minor >= MESSAGES_SINCE and self._on_message is not None:
            self._on_message(message)
            return
        if not isinstance(message, Ready):
            raise MessageError(f"{self.peer_address}: message {type(message).__name__} after the handshake")
        with self._state:
            if len(self._unread) == MAX_UNREAD_MESSAGES:
                raise MessageError(f"{self.peer_address}: more than {MAX_UNREAD_MESSAGES} unread control messages")
            self._unread.append(message)
            self._state.notify_all()
