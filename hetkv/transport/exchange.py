"""Both roles over one pool: `Exchange` sends KV to its peers and takes KV from them (multi-turn: decode to prefill)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from hetkv.control.connection import Address
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Shard
from hetkv.transport.config import TransferConfig
from hetkv.transport.peer import Peer
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Self


class Addresses(NamedTuple):
    """Where an exchange's two roles listen."""

    sender: str
    receiver: str


class Exchange:
    """One rank that is `sender` and `receiver` at once, each with its own progress thread, links and requests.

    The two are independent: what is sent must not lie in blocks of a ticket that is open, which is the owner's to see
    to, as with any other writer of the pool. A request id may be under way in both directions. `close` (or `with`) ends
    both.
    """

    def __init__(
        self,
        pool: KVPool,
        *,
        instance: str,
        rank: int = 0,
        tp: int = 1,
        pp: int = 1,
        instance_shards: Sequence[Shard] = (),
        secret: bytes | None = None,
        config: TransferConfig | None = None,
        tls: ssl.SSLContext | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        """Arguments and errors are those of `Sender` and `Receiver`."""
        self.pool = pool
        with ExitStack() as stack:
            common: dict[str, Any] = {"secret": secret, "instance": instance, "rank": rank, "tp": tp, "pp": pp}
            common |= {"instance_shards": instance_shards, "config": config, "tls": tls}
            common["fingerprint"] = fingerprint
            self.sender = stack.enter_context(Sender(pool, **common))
            self.receiver = stack.enter_context(Receiver(pool, **common))
            self._nodes = stack.pop_all()

    def listen(self, address: str = "127.0.0.1:0") -> Addresses:
        """Accept peers for both roles. With a port that is not 0 the sender takes it, and the receiver the next."""
        host, port = Address.parse(address)
        following = str(Address(host, port + 1)) if port else address
        return Addresses(self.sender.listen(address), self.receiver.listen(following))

    def connect(self, peer: Addresses) -> tuple[Peer, Peer]:
        """Link both directions with a listening exchange; its sender's peer and its receiver's.

        Raises what `Node.connect` does. Neither direction is linked then.
        """
        source = self.receiver.connect(peer.sender)
        try:
            return source, self.sender.connect(peer.receiver)
        except BaseException:
            self.receiver.disconnect(source, "the other direction could not be linked")
            raise

    def __repr__(self) -> str:
        return f"Exchange({self.sender!r}, {self.receiver!r})"

    def close(self) -> None:
        """End all requests and links of both roles. May be called again."""
        self._nodes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
