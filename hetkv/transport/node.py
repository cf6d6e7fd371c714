"""What `Sender` and `Receiver` share: engine, control connections, the thread that turns events into results."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hetkv.control.connection import ControlConnection, connect
from hetkv.control.description import Description, Ready, group_layers, host_id
from hetkv.control.handshake import Role, check_secret
from hetkv.control.listener import Listener
from hetkv.errors import ClosedError, HetkvError, InputError, PeerLostError, TransportError, from_code, to_code
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Shard
from hetkv.transport.config import TransferConfig
from hetkv.transport.device import device_of
from hetkv.transport.handle import Handle
from hetkv.transport.link_plan import link_plans, linked_ranks

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Self

    from hetkv import _core

LAYER, COMPLETE, PACKED, FAILED, LINK_LOST, LINK_DRAINED = range(1, 7)
"""Kinds of events of the engine (`csrc/engine/events.h`)."""

P = TypeVar("P", bound=Handle)


class Peer:
    """One connected rank of the other side. `lost` tells why it is gone, or is `None`."""

    def __init__(self, connection: ControlConnection, link: int) -> None:
        self.connection = connection
        self.link = link
        self.description: Description = connection.peer
        self.minor = connection.minor
        """Version of the link: the lower one of the two sides."""
        self.ready = False
        """Both sides have added the link: requests may use it."""
        self.lost: HetkvError | None = None

    @property
    def name(self) -> str:
        """`instance/rank`."""
        return f"{self.description.instance}/{self.description.rank}"

    @property
    def same_host(self) -> bool:
        return self.description.host == host_id()

    def __repr__(self) -> str:
        return f"Peer({self.name!r}, {self.connection.peer_address}" + (f", lost: {self.lost})" if self.lost else ")")


class Node(ABC, Generic[P]):
    """One rank's end of the transport: a pool, an engine with its progress thread, and links to peers.

    The pool must outlive the node. Either side may listen or connect. `close` (or `with`) ends everything; a node that
    is dropped without it works on until the interpreter exits, which closes it. Any thread may call any method, also
    from a future's callback. A node does not survive a fork, and where one was open a forked child can make none of its
    own: it has the memory but not the threads. Start processes with the `spawn` method, or before the first node.
    """

    role: Role

    def __init__(
        self,
        pool: KVPool,
        *,
        secret: bytes,
        instance: str,
        rank: int = 0,
        instance_shards: Sequence[Shard] = (),
        config: TransferConfig | None = None,
        tls: ssl.SSLContext | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        """`instance_shards`: the shards of all ranks of this instance where it has several; `rank` is this one's index.

        `secret` (16 bytes or more) is shared by all instances. `tls`: a context for the control channel.
        `fingerprint`: what made the KV, such as `{"weights": digest, "vocabulary": digest}`; a peer with another value
        of a name that both sides have is rejected with `IncompatibleError`, which says the name and both values. Raises
        `InputError`, `TransportError` where UCX does not start or the process was forked beside an open node, and for a
        pool on a device what `device_of` raises and `DeviceError` where the device has no memory left for windows.
        """
        check_secret(secret)
        if _forked_beside_nodes:
            raise TransportError(
                "this process was forked from one with an open Sender or Receiver, whose UCX threads it lacks: "
                "start it with the spawn method"
            )
        self.pool = pool
        self.device = device_of(pool)
        """The device that the pool lies on; `None` in host memory."""
        if self.role == "receiver":
            pool.check_destination()
        else:
            pool.check_source()
        self.config = config or TransferConfig()
        if self.device is None and self.config.window == "device":
            raise InputError("window='device' needs a pool on a device")
        self._secret, self._tls = secret, tls
        self._lock = threading.Lock()
        self._peers: dict[int, Peer] = {}
        self._pending: dict[int, P] = {}
        self._keys: set[bytes] = set()
        self._listeners: list[Listener] = []
        self._closed = False
        on_device = self.device is not None
        self.engine: Any = self._make_engine(
            self.config.engine(on_device, self.role), self.device.core if self.device is not None else None
        )
        _starting.add(self)
        try:
            self.engine.start()
            self.description = Description(
                role=self.role,
                instance=instance,
                pid=os.getpid(),
                host=host_id(),
                spec=pool.spec,
                shard=pool.shard,
                layers=group_layers(pool.layers),
                worker_address=self.engine.address,
                slot_bytes=self.config.slot(on_device) if self.role == "receiver" else 0,
                heartbeat_interval_ms=max(1, round(self.config.heartbeat_s * 1000)),
                heartbeat_timeout_ms=max(1, round(self.config.peer_timeout_s * 1000)),
                lease_ms=round((self.config.lease_s if self.role == "receiver" else self.config.hold_s) * 1000),
                rank=rank,
                instance_shards=tuple(instance_shards),
                device=self.device.backend if self.device else "cpu",
                fingerprint=dict(fingerprint or {}),
            )
            self._dispatcher = threading.Thread(target=self._dispatch, name=f"hetkv-{self.role}-events", daemon=True)
            self._dispatcher.start()
            _open_nodes.add(self)
        except BaseException:
            self.engine.stop()
            raise
        finally:
            _starting.discard(self)

    @abstractmethod
    def _make_engine(self, config: _core.EngineConfig, device: _core.Device | None) -> Any:
        """The engine of this role."""

    def listen(self, address: str = "127.0.0.1:0") -> str:
        """Accept peers at `host:port` (port 0: any free one); returns the address to connect to."""
        listener = Listener(
            address,
            role=self.role,
            secret=self._secret,
            describe=lambda: self.description,
            on_connection=self._accept,
            timeout=self.config.handshake_timeout_s,
            tls=self._tls,
        )
        with self._lock:
            closed = self._closed
            if not closed:
                self._listeners.append(listener)
        if closed:
            listener.close()
            raise ClosedError(f"the {self.role} is closed")
        return listener.address

    def connect(self, address: str) -> Peer:
        """Connect to a listening peer, check that the two sides fit, and link them.

        Raises `IncompatibleError` with the field and both values, `AuthenticationError`, `PeerLostError`, `InputError`.
        """
        connection = connect(
            address,
            role=self.role,
            secret=self._secret,
            describe=lambda: self.description,
            timeout=self.config.handshake_timeout_s,
            tls=self._tls,
        )
        return self._link(connection)

    @property
    def peers(self) -> list[Peer]:
        """Linked peers that are not lost. One that has just connected appears here a moment later than on its side."""
        with self._lock:
            return [peer for peer in self._peers.values() if peer.ready and peer.lost is None]

    def disconnect(self, peer: Peer, reason: str = "disconnected") -> None:
        """End one link; requests that need it fail with `ClosedError`."""
        self.engine.drop_link(peer.link, to_code(ClosedError()), reason)

    def stats(self) -> dict[str, int]:
        """Counters since the start: frames, payload bytes, saturated elements, stale frames, failed requests, ..."""
        counters: dict[str, int] = self.engine.stats()
        return counters

    def close(self) -> None:
        """End all requests (they fail with `ClosedError`) and links, join all threads. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            listeners, peers = list(self._listeners), list(self._peers.values())
        self.engine.stop()
        if threading.current_thread() is not self._dispatcher:  # in a future's callback
            self._dispatcher.join()
        # The end of a connection says that this side touches nothing any more, so the engine comes before it; and it
        # ends handshakes that a listener would wait for.
        for peer in peers:
            peer.connection.close("closed")
        for listener in listeners:
            listener.close()
        with self._lock:
            self._peers.clear()
        _open_nodes.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, connection: ControlConnection) -> None:
        """Link a peer that has connected. A failure is the peer's to see; it closes the connection."""
        try:
            self._link(connection)
        except HetkvError:
            connection.close()

    def _link(self, connection: ControlConnection) -> Peer:
        from hetkv.core import core

        theirs = connection.peer
        try:
            link = self.engine.add_link(
                core.LinkConfig(
                    address=theirs.worker_address,
                    number=connection.link_id,
                    minor=connection.minor,
                    send_key=connection.data_keys.send,
                    receive_key=connection.data_keys.receive,
                    name=f"{theirs.instance}/{theirs.rank}",
                    instance=theirs.instance,
                    instance_links=len(linked_ranks(self.description, theirs)),
                    plans=link_plans(self.pool, self.description, theirs),
                    device_windows=self._device_windows(theirs),
                    rdma_windows=self._device_windows(theirs) and theirs.host != self.description.host,
                )
            )
            peer = Peer(connection, link)
            with self._lock:
                if self._closed:
                    raise ClosedError("this side was closed")
                self._peers[link] = peer
            try:
                connection.send(Ready())
                connection.recv(self.config.handshake_timeout_s)
            except HetkvError as error:
                self._on_connection_lost(peer, error)
                raise
        except BaseException:
            connection.close()
            raise
        self.engine.activate_link(link)
        peer.ready = True  # what is posted from now on comes after the activation
        connection.on_lost(lambda error: self._on_connection_lost(peer, error))
        return peer

    def _device_windows(self, theirs: Description) -> bool:
        """Whether this side lends that peer slots in device memory: where its device can store into them."""
        if self.device is None or self.role == "sender" or self.config.window == "host":
            return False
        near = theirs.host == self.description.host and theirs.device == self.device.backend
        return near or self.config.window == "device"

    def _on_connection_lost(self, peer: Peer, error: HetkvError) -> None:
        """The peer's process ended or closed, so nothing of it touches this side's memory any more."""
        peer.lost = peer.lost or error
        self.engine.drop_link(peer.link, to_code(PeerLostError("")), f"{peer.name}: {error}")
        self._retire(peer)
        self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        peer.connection.close(str(peer.lost or ""))
        with self._lock:
            self._peers.pop(peer.link, None)

    @abstractmethod
    def _retire(self, peer: Peer) -> None:
        """The peer is gone for good."""

    def _submit(self, key: bytes, make: Callable[[], P]) -> P:
        """Register a request while no event of it can be dispatched."""
        with self._lock:
            if self._closed:
                raise ClosedError(f"the {self.role} is closed")
            if key in self._keys:
                raise InputError(f"request {key.hex()} is under way already")
            self.pool.check_alive()
            pending = make()
            if not pending.handle:
                raise ClosedError(f"the {self.role}'s progress thread has ended")
            self._pending[pending.handle] = pending
            self._keys.add(key)
            return pending

    def _dispatch(self) -> None:
        """Body of the dispatching thread: ends when the engine has stopped and its events are told."""
        while events := self.engine.wait_events():
            for kind, handle, link, layer, code, detail in events:
                error = from_code(code, detail) if code else None
                if kind in (LINK_LOST, LINK_DRAINED):
                    self._on_link_event(kind, link, error)
                    continue
                with self._lock:
                    ended = kind in (COMPLETE, FAILED)
                    pending = self._pending.pop(handle, None) if ended else self._pending.get(handle)
                    if ended and pending is not None:
                        self._keys.discard(pending.key)
                if pending is not None:
                    pending.on_event(kind, layer, error)

    def _on_link_event(self, kind: int, link: int, error: HetkvError | None) -> None:
        with self._lock:
            peer = self._peers.get(link)
        if peer is None:
            return
        if kind == LINK_LOST:
            peer.lost = peer.lost or error
        elif self.role == "sender":
            # The end of the connection tells the receiver that no store of this side is under way any more.
            self._forget(peer)


_open_nodes: weakref.WeakSet[Node[Any]] = weakref.WeakSet()
_starting: set[Node[Any]] = set()
_forked_beside_nodes = False


def _disown_in_child() -> None:
    """A forked child has neither the threads nor the right to say goodbye on its parent's sockets."""
    global _forked_beside_nodes
    nodes = [*_open_nodes, *_starting]
    _forked_beside_nodes = _forked_beside_nodes or bool(nodes)
    for node in nodes:
        node._lock, node._closed = threading.Lock(), True
    _open_nodes.clear()
    _starting.clear()


os.register_at_fork(after_in_child=_disown_in_child)


@atexit.register
def _close_all() -> None:
    """Threads that outlive the interpreter would crash in it."""
    for node in list(_open_nodes):
        node.close()
