"""What two linked ranks say on their control connection: `Talking`, the part of a node; notifications."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from hetkv.control.payloads import MAX_NOTIFICATIONS, MESSAGES_SINCE, Ask, Later, Notice, Payload, Taken, as_payload
from hetkv.errors import MessageError, PeerLostError, PoolFullError, UnsupportedError

if TYPE_CHECKING:
    from hetkv.transport.peer import Peer


class Notification(NamedTuple):
    """What a peer has said."""

    peer: Peer
    data: bytes


class Notifications:
    """Those that came, until the program takes them, and how many of this side's the peers' have not. Any thread."""

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._unread: deque[Notification] = deque()
        self._waiting: Counter[Peer] = Counter()
        """That came from a peer and were not taken here."""
        self._out: Counter[Peer] = Counter()
        """That were sent to a peer and not taken there."""
        self._closed = False

    def send(self, peer: Peer, data: bytes | bytearray | memoryview) -> None:
        """See `Node.notify`."""
        notice = Notice(as_payload(data))
        check_messages(peer, "notifications")
        with self._state:
            if peer.lost is not None:
                raise PeerLostError(f"{peer.name} is gone: {peer.lost}")
            if self._out[peer] == MAX_NOTIFICATIONS:
                raise PoolFullError(f"{peer.name} has not taken the last {MAX_NOTIFICATIONS} notifications")
            self._out[peer] += 1
            peer.connection.post(notice)

    def take(self, timeout: float) -> list[Notification]:
        """See `Node.notifications`."""
        with self._state:
            if not self._unread:
                self._state.wait_for(lambda: self._unread or self._closed, timeout)
            found, self._unread = list(self._unread), deque()
            counts, self._waiting = self._waiting, Counter()
        for peer, count in counts.items():
            peer.connection.post(Taken(count))
        return found

    def came(self, peer: Peer, notice: Notice) -> None:
        """A peer has sent one. Raises `MessageError` where it sent more than it may."""
        with self._state:
            if self._waiting[peer] == MAX_NOTIFICATIONS:
                raise MessageError(f"{peer.address}: more than {MAX_NOTIFICATIONS} notifications that were not taken")
            self._waiting[peer] += 1
            self._unread.append(Notification(peer, notice.data))
            self._state.notify_all()

    def taken(self, peer: Peer, taken: Taken) -> None:
        """The peer's program has taken some. Raises `MessageError` where it was not sent so many."""
        with self._state:
            if taken.count > self._out[peer]:
                raise MessageError(f"{peer.address}: took {taken.count} notifications of {self._out[peer]}")
            self._out[peer] -= taken.count

    def forget(self, peer: Peer) -> None:
        """It is gone; what it said before that can still be taken, as far as `MAX_NOTIFICATIONS` of all such peers."""
        with self._state:
            self._out.pop(peer, None)
            self._waiting.pop(peer, None)
            over = sum(at.peer not in self._waiting for at in self._unread) - MAX_NOTIFICATIONS
            if over > 0:
                left = (at for at in self._unread if at.peer not in self._waiting)
                dropped = set(map(id, islice(left, over)))
                self._unread = deque(at for at in self._unread if id(at) not in dropped)

    def end(self) -> None:
        """The node is closed: nothing comes any more."""
        with self._state:
            self._closed = True
            self._state.notify_all()


def check_messages(peer: Peer, what: str) -> None:
    """Raise `UnsupportedError` where the link is of a version without them."""
    if peer.minor < MESSAGES_SINCE:
        raise UnsupportedError(f"{peer.name} speaks version 2.{peer.minor}, which has no {what}")


class Talking(ABC):
    """A node's part in it."""

    _notifications: Notifications

    def notify(self, peer: Peer, data: bytes | bytearray | memoryview) -> None:
        """Send up to 64 KiB to the program at a peer, which gets them from `notifications`; returns at once. They come
        in order, and say nothing of requests: what was sent earlier may arrive later.

        Raises `InputError` for more; `PoolFullError` where the peer has not taken the last 256; `PeerLostError`;
        `UnsupportedError` where it speaks a version without notifications.
        """
        self._notifications.send(peer, data)

    def notifications(self, timeout: float = 0.0) -> list[Notification]:
        """What peers have sent since the last call, in order of arrival; waits up to `timeout` seconds for the first.

        A peer that is gone since is `lost`. At most 256 of each peer wait to be taken, and the last 256 of all that are
        gone. Does not wait once the node is closed.
        """
        return self._notifications.take(timeout)

    def _on_message(self, peer: Peer, message: Later) -> None:
        """What a peer says on the control connection. Called in the reactor's thread; what it raises ends the link."""
        if isinstance(message, Notice):
            self._notifications.came(peer, message)
        elif isinstance(message, Taken):
            self._notifications.taken(peer, message)
        else:
            self._on_payload(peer, message)

    @abstractmethod
    def _on_payload(self, peer: Peer, message: Ask | Payload) -> None:
        """A payload was asked for, or has come. Raises `MessageError` where the role has no such message."""
