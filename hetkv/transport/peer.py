"""One connected rank of the other side: `Peer`; all that a node has: `Peers`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetkv.control.agreement import Agreement
from hetkv.control.codec import Codec
from hetkv.control.connection import ControlConnection
from hetkv.control.description import Description, host_id, same_kernel
from hetkv.control.local import FOLDER_ENV
from hetkv.control.streams import Kind
from hetkv.errors import HetkvError, IncompatibleError

if TYPE_CHECKING:
    import hetkv._core as _core


class Peer:
    """One connected rank of the other side. `lost` tells why it is gone, or is `None`."""

    def __init__(
        self,
        connection: ControlConnection,
        link: int,
        plans: Sequence[_core.LayerPlan],
        agreement: Agreement,
        codec: Codec,
    ) -> None:
        self.connection = connection
        self.link = link
        self.plans = plans
        """What moves over the link on this side: one for each of the agreement's `layers`."""
        self.agreement = agreement
        """What the handshake agreed on: routes and conversions, those of the codec."""
        self.codec = codec
        """Of the payloads."""
        self.description: Description = connection.peer
        self.minor = connection.minor
        """Version of the link: the lower one of the two sides."""
        self.kind: Kind = connection.streams.kind
        """The connection of the data plane: `unix` (this host; slots can be shared), or `tcp`."""
        self.tried: tuple[str, ...] = connection.streams.tried
        """What was not to be had before that, and why; known to the side that connected."""
        self.cipher: str = connection.streams.cipher
        """Of what goes over that connection; empty: it is not encrypted."""
        self.slow_because = self._slow()
        """Why payloads take a slower way than two processes under one kernel can have; empty where they do not."""
        self.ready = False
        """Both sides have added the link: requests may use it."""
        self.lost: HetkvError | None = None

    @property
    def name(self) -> str:
        """`instance/rank`."""
        return f"{self.instance}/{self.rank}"

    @property
    def instance(self) -> str:
        return self.description.instance

    @property
    def rank(self) -> int:
        return self.description.rank

    @property
    def address(self) -> str:
        """Of its end of the control connection."""
        return self.connection.peer_address

    @property
    def same_host(self) -> bool:
        return self.kind == "unix" or self.description.host == host_id()

    def _slow(self) -> str:
        if self.kind != "tcp" or not same_kernel(self.description.host, host_id()):
            return ""
        tried = "; ".join(self.tried) or "no unix socket is reached by both sides"
        return (
            f"runs under this kernel, but its payloads go over TCP: {tried}. Let both containers share /dev/shm "
            f"(--ipc=host) or a folder that {FOLDER_ENV} names; `hetkv doctor` tries the lanes"
        )

    def __repr__(self) -> str:
        return f"Peer({self.name!r}, {self.address}" + (f", lost: {self.lost})" if self.lost else ")")


class Peers:
    """Peers of a node, by link. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_link: dict[int, Peer] = {}

    def admit(self, theirs: Description) -> None:
        """Raise `IncompatibleError` where another engine of this name is linked: their requests would meet."""
        with self._lock:
            self._of_name(theirs)

    def add(self, peer: Peer) -> Peer | None:
        """Make the peer known; returns the one that the same engine was before, which is over. Raises as `admit`."""
        with self._lock:
            before = self._of_name(peer.description)
            self._by_link[peer.link] = peer
            return before

    def get(self, link: int) -> Peer | None:
        with self._lock:
            return self._by_link.get(link)

    def pop(self, link: int) -> None:
        """Forget a peer."""
        with self._lock:
            self._by_link.pop(link, None)

    def all(self) -> list[Peer]:
        """Lost ones too, until they are forgotten."""
        with self._lock:
            return list(self._by_link.values())

    def _of_name(self, theirs: Description) -> Peer | None:
        """The standing peer of that name, if it is this engine. Under the lock."""
        for peer in self._by_link.values():
            if peer.lost is not None or (peer.instance, peer.rank) != (theirs.instance, theirs.rank):
                continue
            if peer.description.engine == theirs.engine:
                return peer
            raise IncompatibleError(
                "instance",
                f"{peer.name} linked already, process {peer.description.pid} at {peer.address}",
                f"{peer.name}, process {theirs.pid}",
                "each rank of each instance has a name of its own; one that died is forgotten once its connection ends "
                "or it was silent for peer_timeout_s",
            )
        return None
