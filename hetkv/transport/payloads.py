"""What crosses with a request besides KV: the sender's `OfferedPayloads`, the receiver's `AwaitedPayloads`.

The receiver asks on the control connection, when it gives its ticket; the sender answers once it has the payload,
also after the request's KV has arrived.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

from hetkv.control.payloads import Ask, Payload
from hetkv.errors import ClosedError, HetkvError, LeaseExpiredError, PeerLostError, WaitTimeoutError

if TYPE_CHECKING:
    from hetkv.transport.handle import Handle
    from hetkv.transport.peer import Peer

MAX_ASKED = 1 << 14
"""Of one peer; older ones are forgotten."""
MAX_KEPT_BYTES = 256 << 20
"""Of all payloads that a sender keeps; the oldest are forgotten."""
KEPT_BYTES = 512
"""Of memory that each of them takes besides its own."""


class _Kept(NamedTuple):
    data: bytes
    content: bytes
    until: float
    """`time.monotonic()` seconds."""


class OfferedPayloads:
    """Payloads of a sender's requests by the key on the wire, and who has asked for one that is not there. Any thread.

    Only who asks for a request of the same content gets its payload, so that an id that is used again is no danger.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._bytes = 0
        self._asked: dict[Peer, OrderedDict[bytes, bytes]] = {}

    def begin(self, key: bytes) -> None:
        """A request of this id begins: what an earlier one of it carried is over."""
        with self._lock:
            self._drop(key)

    def give(self, key: bytes, content: bytes, data: bytes, hold_s: float) -> None:
        """Answer who has asked, and keep it for `hold_s` seconds for who will."""
        now = time.monotonic()
        with self._lock:
            self._drop(key)
            self._kept[key] = _Kept(data, content, now + hold_s)
            self._bytes += len(data) + KEPT_BYTES
            while self._bytes > MAX_KEPT_BYTES or next(iter(self._kept.values())).until < now:
                self._drop(next(iter(self._kept)))
            waiting = [peer for peer, asked in self._asked.items() if asked.get(key) == content]
            for peer in waiting:
                del self._asked[peer][key]
        for peer in waiting:
            peer.connection.post(Payload(key, data, content))

    def ask(self, peer: Peer, ask: Ask) -> None:
        """A peer wants one. Called in the reactor's thread."""
        with self._lock:
            kept = self._kept.get(ask.request)
            if kept is None or kept.content != ask.content or kept.until < time.monotonic():
                asked = self._asked.setdefault(peer, OrderedDict())
                asked[ask.request] = ask.content
                if len(asked) > MAX_ASKED:
                    asked.popitem(last=False)
                return
        peer.connection.post(Payload(ask.request, kept.data, ask.content))

    def forget(self, peer: Peer) -> None:
        """It is gone."""
        with self._lock:
            self._asked.pop(peer, None)

    def _drop(self, key: bytes) -> None:
        kept = self._kept.pop(key, None)
        self._bytes -= 0 if kept is None else len(kept.data) + KEPT_BYTES


class Awaited:
    """A payload that was asked for; `None` until it is there."""

    def __init__(self, peer: Peer, lease_s: float) -> None:
        self.peer = peer
        self.until = time.monotonic() + lease_s
        self.data: bytes | None = None


class AwaitedPayloads:
    """Payloads that a receiver has asked for. Those of requests that nobody holds any more are dropped. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._awaited: WeakValueDictionary[tuple[int, bytes, bytes], Awaited] = WeakValueDictionary()

    def ask(self, peer: Peer, key: bytes, content: bytes, lease_s: float) -> Awaited:
        """Ask for one; it is kept as long as what this returns is."""
        awaited = Awaited(peer, lease_s)
        with self._changed:
            self._awaited[peer.link, key, content] = awaited
        peer.connection.post(Ask(key, content))
        return awaited

    def take(self, peer: Peer, payload: Payload) -> None:
        """It has come. One that nobody waits for is dropped."""
        with self._changed:
            awaited = self._awaited.pop((peer.link, payload.request, payload.content), None)
            if awaited is not None:
                awaited.data = payload.data
                self._changed.notify_all()

    def look(self) -> None:
        """A request has ended, or a peer is gone: who waits looks again."""
        with self._changed:
            self._changed.notify_all()

    def end(self) -> None:
        """The receiver is closed."""
        self._closed = True
        self.look()

    def wait(self, awaited: Awaited, handle: Handle, timeout: float | None) -> bytes:
        """The payload. Raises the request's error, `PeerLostError`, `LeaseExpiredError` or `WaitTimeoutError`."""
        until = awaited.until if timeout is None else min(awaited.until, time.monotonic() + timeout)

        def over() -> HetkvError | None:
            if handle.error is not None:
                return handle.error
            if self._closed:
                return ClosedError("the receiver is closed")
            lost = awaited.peer.lost
            return None if lost is None else PeerLostError(f"{awaited.peer.name} has given no payload: {lost}")

        with self._changed:
            while awaited.data is None and over() is None and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            if awaited.data is not None:
                return awaited.data
        error = over()
        if error is not None:
            raise error
        if until == awaited.until:
            raise LeaseExpiredError(f"{awaited.peer.name} has given no payload within the request's lease")
        raise WaitTimeoutError(f"no payload within {timeout or 0:g} s; the request goes on")
