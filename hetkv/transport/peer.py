"""One connected rank of the other side: `Peer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hetkv.control.agreement import Agreement
from hetkv.control.connection import ControlConnection
from hetkv.control.description import Description, host_id
from hetkv.errors import HetkvError

if TYPE_CHECKING:
    import hetkv._core as _core


class Peer:
    """One connected rank of the other side. `lost` tells why it is gone, or is `None`."""

    def __init__(self, connection: ControlConnection, link: int, plans: Sequence[_core.LayerPlan]) -> None:
        self.connection = connection
        self.link = link
        self.plans = plans
        """What moves over the link on this side: one for each of the agreement's `layers`."""
        self.agreement: Agreement = connection.agreement
        """What the handshake agreed on: routes and conversions."""
        self.description: Description = connection.peer
        self.minor = connection.minor
        """Version of the link: the lower one of the two sides."""
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
        return self.description.host == host_id()

    def __repr__(self) -> str:
        return f"Peer({self.name!r}, {self.address}" + (f", lost: {self.lost})" if self.lost else ")")
