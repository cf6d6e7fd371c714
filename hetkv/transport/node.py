"""What `Sender` and `Receiver` share: engine, control connections, the thread that turns events into results."""

from __future__ import annotations

import logging
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, Generic, SupportsIndex, TypeVar, overload

from hetkv.control.codec import agreed_codec, coding, with_codec
from hetkv.control.connection import ControlConnection
from hetkv.control.description import Description, Ready, group_layers, host_id
from hetkv.control.establish import connect
from hetkv.control.handshake import Role
from hetkv.control.listener import Listener
from hetkv.control.secret import SecretFile
from hetkv.control.tls import TlsConfig
from hetkv.errors import ClosedError, HetkvError, InputError, PeerLostError, from_code, to_code
from hetkv.kv.pool import KVPool
from hetkv.transport import lifetime
from hetkv.transport.access import Access, available_ciphers, available_codecs
from hetkv.transport.config import TransferConfig
from hetkv.transport.device import device_of
from hetkv.transport.handle import Handle, RequestId
from hetkv.transport.instance import Instance, connect_instance
from hetkv.transport.link_plan import link_plans
from hetkv.transport.notifications import Notifications, Talking
from hetkv.transport.peer import Peer, Peers
from hetkv.transport.ranks import instance_shards_of
from hetkv.transport.requests import Requests
from hetkv.transport.rma import rma_transports

if TYPE_CHECKING:
    from typing_extensions import Self

    import hetkv._core as _core
    from hetkv.kv.spec import Shard

log = logging.getLogger("hetkv.transport")

_GOODBYE = "the peer ended the link"
"""The engine's text for a link whose peer said `bye` (`csrc/engine/engine.cpp`)."""

P = TypeVar("P", bound=Handle)
SLOWEST_BYTES_PER_MS = 32 << 10
"""Of a pack or unpack with conversion, on one busy thread: 32 MiB a second."""
LOOK_S = 0.001
"""Requests of one step look once whether the pool's memory is still there."""


class Node(Talking, Generic[P]):
    """One rank's end of the transport: a pool, an engine with its progress thread, and links to peers.

    The pool must outlive the node. Either side may listen or connect. `close` (or `with`) ends everything; a node that
    is dropped without it works on until the interpreter exits, which closes it. Any thread may call any method, also
    from a future's callback. A node does not survive a fork, and where one was open a forked child cannot make its
    own: it has the memory but not the threads. Start processes with the `spawn` method, or before the first node.
    """

    role: Role

    def __init__(
        self,
        pool: KVPool,
        *,
        instance: str,
        rank: int = 0,
        tp: int = 1,
        pp: int = 1,
        instance_shards: Sequence[Shard] = (),
        secret: bytes | SecretFile | None = None,
        config: TransferConfig | None = None,
        tls: TlsConfig | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        """One rank of an instance of `tp x pp` ranks, split as `Shard.of` says, rank `pp_rank * tp + tp_rank`.

        `instance_shards`: the shards of all ranks where they are split otherwise, in order of rank. `secret` (16 bytes
        or more, or `SecretFile`) is shared by all instances; on one host hetkv makes one for this user (see
        `shared_secret`), across hosts it must be given, or named by `$HETKV_SECRET_FILE`. `tls`: the control channel is
        TLS 1.3 with certificates of both sides, in addition to the secret. `fingerprint`: what made the KV, such as
        `{"weights": digest, "vocabulary": digest}`; a peer with another value of a name that both sides have is
        rejected with `IncompatibleError`, which says the name and both values.

        Raises `InputError` for what does not fit together, also where a receiver's pool is not writable or overlaps
        itself; `TransportError` where RDMA is asked for and UCX does not start, or the process was forked while a
        node was open; and for a pool on a device what `device_of` raises and `DeviceError` where it has no memory left
        for windows.
        """
        if not isinstance(instance, str) or not isinstance(rank, SupportsIndex):
            raise InputError(f"instance is a name and rank an integer, not {instance!r} and {rank!r}")
        self._access = Access(secret, tls)
        lifetime.check_process()
        self.instance, self.rank = instance, index(rank)
        if not isinstance(pool, KVPool):
            raise InputError(f"pool is a KVPool, not {type(pool).__name__}: KVPool.from_tensors() makes one of arrays")
        shards = instance_shards_of(pool, self.rank, tp, pp, instance_shards)
        self.pool = pool
        self.device = device_of(pool)
        """The device that the pool is on; `None` in host memory."""
        if self.role == "receiver":
            pool.check_destination()
        else:
            pool.check_source()
        self.config = config or TransferConfig()
        if self.device is None and self.config.window == "device":
            raise InputError("window='device' needs a pool on a device")
        self._lock = threading.Lock()
        self._peers = Peers()
        self._notifications = Notifications()
        self.layers = tuple(pool.layers)
        self.group_of = {layer: pool.spec.group_of(layer) for layer in self.layers}
        self._listeners: list[Listener] = []
        self._closed = False
        config_of_engine = self._engine_config(on_device := self.device is not None)
        config_of_engine.layer_groups = [self.group_of.get(at, -1) for at in range(max(self.layers, default=-1) + 1)]
        self.engine: Any = self._make_engine(config_of_engine, self.device.core if self.device is not None else None)
        self.requests: Requests[P] = Requests(self.engine)
        lifetime.starting.add(self)
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
                engine=os.urandom(16),
                worker_address=self.engine.address,
                slot_bytes=self.config.slot(on_device) if self.role == "receiver" else 0,
                heartbeat_interval_ms=max(1, round(self.config.heartbeat_s * 1000)),
                heartbeat_timeout_ms=max(1, round(self.config.peer_timeout_s * 1000)),
                lease_ms=round((self.config.lease_s if self.role == "receiver" else self.config.hold_s) * 1000),
                rank=self.rank,
                instance_shards=shards,
                device=self.device.backend if self.device else "cpu",
                fingerprint=dict(fingerprint or {}),
                ciphers=available_ciphers(self.config.encrypt),
                encrypt=self.config.encrypt,
                codecs=available_codecs(self.config.codec, on_device),
            )
            self._dispatcher = threading.Thread(target=self._dispatch, name=f"hetkv-{self.role}-events", daemon=True)
            self._dispatcher.start()
            lifetime.opened.add(self)
        except BaseException:
            self.engine.stop()
            raise
        finally:
            lifetime.starting.discard(self)

    def _engine_config(self, on_device: bool) -> _core.EngineConfig:
        engine = self.config.engine(on_device, self.role)
        if self.config.rma == "auto":
            engine.rma = rma_transports()
        return engine

    @abstractmethod
    def _make_engine(self, config: _core.EngineConfig, device: _core.Device | None) -> Any:
        """The engine of this role."""

    def listen(self, address: str = "127.0.0.1:0", *, book: str | os.PathLike[str] | None = None) -> str:
        """Accept peers at `host:port` (port 0: any free one); returns the address to connect to.

        `book`: a file that this rank adds its address to, for `Instance.read`.
        """
        self._access.check(address, "listen at")
        listener = Listener(
            address,
            role=self.role,
            secret=self._access.secrets,
            describe=lambda: self.description,
            on_connection=self._accept,
            timeout=self.config.handshake_timeout_s,
            tls=self._access.tls,
            silence=3 * self.config.peer_timeout_s,
            admit=self._peers.admit,
        )
        with self._lock:
            closed = self._closed
            if not closed:
                self._listeners.append(listener)
        if closed:
            listener.close()
            raise ClosedError(f"the {self.role} is closed")
        if book is not None:
            try:
                Instance.join(book, self.instance, self.rank, len(self.description.shards), listener.address)
            except InputError:
                with self._lock:
                    self._listeners.remove(listener)
                listener.close()
                raise
        return listener.address

    @overload
    def connect(self, address: str) -> Peer: ...
    @overload
    def connect(self, address: Instance | list[str] | tuple[str, ...]) -> list[Peer]: ...
    def connect(self, address: str | Instance | list[str] | tuple[str, ...]) -> Peer | list[Peer]:
        """Connect to a listening rank, check that the two sides fit, and link them.

        With an instance's address book, or a list of the addresses of all its ranks in order: to those ranks that hold
        something of this pool; ranks of an `Instance` that are linked already stay so.

        Raises `IncompatibleError` with the field and both values, `AuthenticationError`, `PeerLostError`, `InputError`;
        no rank of an instance is linked then that was not before.
        """
        if not isinstance(address, str):
            return connect_instance(self, address)
        self._access.check(address, "connect to")
        connection = connect(
            address,
            role=self.role,
            secret=self._access.secrets,
            describe=lambda: self.description,
            timeout=self.config.handshake_timeout_s,
            tls=self._access.tls,
            silence=3 * self.config.peer_timeout_s,
            admit=self._peers.admit,
            streams=self.config.streams,
        )
        return self._link(connection)

    def rotate_secret(self, secret: bytes, accept_old_s: float = 600.0) -> None:
        """Replace the shared secret: new connections prove this one, and where the peer does not have it yet, or proves
        one before it, those for `accept_old_s` seconds. Standing links stay.

        Raises `InputError` where it is too short, or the secret is a file's: that is replaced by writing the file.
        """
        self._access.rotate(secret, accept_old_s)

    @property
    def peers(self) -> list[Peer]:
        """Linked peers that are not lost. One that has just connected appears here a moment later than on its side."""
        return [peer for peer in self._peers.all() if peer.ready and peer.lost is None]

    def disconnect(self, peer: Peer, reason: str = "disconnected") -> None:
        """End one link; requests that need it fail with `ClosedError`."""
        self.engine.drop_link(peer.link, to_code(ClosedError()), reason)

    def poll(self) -> list[P]:
        """Requests that have ended, well or not, since the last call: what an engine asks at each step. Never waits.

        Each handle is `done`; its `wait` returns or raises at once. From the first call on every request is returned
        once. The first call returns the last 4,096 and logs a warning where there were more, as a node that nobody
        polls must not keep all.
        """
        return self.requests.poll()

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is there now, by name: see `hetkv.metrics`."""
        counters: dict[str, int] = self.engine.stats()
        counters["slow_links"] = sum(bool(peer.slow_because) for peer in self.peers)
        return counters

    def close(self) -> None:
        """End all requests (they fail with `ClosedError`) and links, join all threads. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            listeners = list(self._listeners)
        self.engine.stop()
        if threading.current_thread() is not self._dispatcher:  # in a future's callback
            self._dispatcher.join()
        # The end of a connection says that this side touches nothing any more, so the engine comes before it; and it
        # ends handshakes that a listener would wait for.
        for peer in self._peers.all():
            peer.connection.close("closed")
            self._peers.pop(peer.link)
        self._notifications.end()
        for listener in listeners:
            listener.close()
        lifetime.opened.discard(self)

    def disown(self) -> None:
        """Called in a forked child: the node is its parent's."""
        self._lock, self._closed = threading.Lock(), True

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.peers)} peers, {self.engine.open_requests} requests under way"
        return f"{type(self).__name__}({self.instance}/{self.rank} of {len(self.description.shards)}, {state})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, connection: ControlConnection) -> None:
        """Link a peer that has connected. A failure closes the connection, which the peer sees."""
        try:
            self._link(connection)
        except HetkvError as error:
            connection.close(str(error))

    def _link(self, connection: ControlConnection) -> Peer:
        from hetkv.core import core

        theirs, agreement, cipher = connection.peer, connection.agreement, connection.streams.cipher
        try:
            codec = agreed_codec(agreement, connection.streams.kind)
            plans = link_plans(self.pool, agreement := with_codec(agreement, codec))
            link = self.engine.add_link(
                core.LinkConfig(
                    address=theirs.worker_address if self.description.worker_address and not cipher else b"",
                    number=connection.link_id,
                    minor=connection.minor,
                    send_key=connection.data_keys.send,
                    receive_key=connection.data_keys.receive,
                    name=f"{theirs.instance}/{theirs.rank}",
                    instance=theirs.instance,
                    instance_links=len(agreement.ranks),
                    plans=plans,
                    device_windows=self._device_windows(connection),
                    rdma_windows=self._device_windows(connection) and connection.streams.kind == "tcp",
                    streams=connection.streams.config(),
                    **coding(agreement, codec, self.config.codec),
                    threads=self.config.threads_over(connection.streams.kind),
                    frame_ms=max(self.config.slot(self.device is not None), theirs.slot_bytes) // SLOWEST_BYTES_PER_MS,
                )
            )
            connection.streams.close()
            peer = Peer(connection, link, plans, agreement, codec)
            try:
                self._register(peer)
                connection.on_message(lambda message: self._on_message(peer, message))
                connection.send(Ready())
                connection.recv(self.config.handshake_timeout_s)
            except HetkvError as error:
                self._on_connection_lost(peer, error)
                raise
        except BaseException as error:
            connection.close(str(error))
            raise
        self.engine.activate_link(link)  # tells again where the link was lost before the peer was known
        peer.ready = True  # what is posted from now on comes after the activation
        log.info("%s: linked to %s at %s", self.role, peer.name, connection.peer_address)
        if peer.slow_because:
            log.warning("%s: %s: %s", self.role, peer.name, peer.slow_because)
        connection.on_lost(lambda error: self._on_connection_lost(peer, error))
        return peer

    def _register(self, peer: Peer) -> None:
        """Make the peer known. A link that the same engine had before is over."""
        with self._lock:
            if self._closed:
                raise ClosedError("this side was closed")
            before = self._peers.add(peer)
        if before is not None:
            self.engine.drop_link(before.link, to_code(ClosedError()), f"{before.name} has linked again")

    def _device_windows(self, connection: ControlConnection) -> bool:
        """Whether this side grants that peer slots in device memory: where its device can store into them."""
        if self.device is None or self.role == "sender" or self.config.window == "host" or self.config.isolate_peers:
            return False
        here = connection.streams.kind == "unix" or connection.peer.host == self.description.host
        return (here and connection.peer.device == self.device.backend) or self.config.window == "device"

    def _on_connection_lost(self, peer: Peer, error: HetkvError) -> None:
        """The peer's process ended or closed, so it no longer touches this side's memory."""
        self._set_lost(peer, error)
        self.engine.drop_link(peer.link, to_code(PeerLostError("")), f"{peer.name}: {error}")
        self._retire(peer)
        self._forget(peer)

    def _set_lost(self, peer: Peer, error: HetkvError | None) -> None:
        """Note and log the first reason why a peer is gone; a warning where it did not say goodbye."""
        if peer.lost is None and error is not None:
            peer.lost = error
            said = isinstance(error, ClosedError) or str(error) == _GOODBYE
            orderly = said or (isinstance(error, PeerLostError) and error.orderly)
            log.log(logging.INFO if orderly else logging.WARNING, "%s: lost %s: %s", self.role, peer.name, error)

    def _forget(self, peer: Peer) -> None:
        peer.connection.close(str(peer.lost or ""))
        self._peers.pop(peer.link)
        self._notifications.forget(peer)

    @abstractmethod
    def _retire(self, peer: Peer) -> None:
        """The peer is gone permanently."""

    def _submit(self, request_id: RequestId, make: Callable[[], P]) -> P:
        """Register a request before `poll` can find it."""
        with self._lock:
            if self._closed:
                raise ClosedError(f"the {self.role} is closed")
            self.pool.check_alive(LOOK_S)
            try:
                return self.requests.add(make)
            except InputError:
                raise InputError(f"request {request_id!r} is under way already") from None

    def _dispatch(self) -> None:
        """Body of the dispatching thread: ends when the engine has stopped and its events are handled."""
        while events := self.engine.wait_events():
            for kind, handle, link, layer, code, detail in events:
                if kind in ("link_lost", "link_drained"):
                    self._on_link_event(kind, link, from_code(code, detail) if code else None)
                    continue
                if kind == "failed":
                    log.info("%s: a request failed: %s", self.role, detail)
                self.requests.dispatch(kind, handle, layer)
        self.requests.end()

    def _on_link_event(self, kind: _core._EventKind, link: int, error: HetkvError | None) -> None:
        peer = self._peers.get(link)
        if peer is None:
            return
        if kind == "link_lost":
            self._set_lost(peer, error)
        elif self.role == "sender":
            # The end of the connection tells the receiver that no store of this side is under way any more.
            self._forget(peer)
