"""Both roles over one pool: `Exchange` sends KV to its peers and takes KV from them (multi-turn: decode to prefill)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

from hetkv.control.address import Address
from hetkv.kv.pool import KVPool
from hetkv.transport.node import Node
from hetkv.transport.peer import Peer
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

if TYPE_CHECKING:
    from typing import Concatenate

    from typing_extensions import ParamSpec, Self

    P = ParamSpec("P")


def same_arguments(
    of: Callable[Concatenate[Any, P], None],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """The method takes the arguments of `of` and hands them on; its signature and docstring are those of `of`."""
    return wraps(of)


class Addresses(NamedTuple):
    """Where an exchange's two roles listen."""

    sender: str
    receiver: str


class Exchange:
    """One rank that is `sender` and `receiver` at once, each with its own progress thread, links and requests.

    The two are independent: what is sent must not be in blocks of an open ticket. The caller ensures that, as with any
    other writer of the pool. A request id may be under way in both directions. `close` (or `with`) ends both.
    """

    @same_arguments(Node.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as stack:
            self.sender = stack.enter_context(Sender(*args, **kwargs))
            self.receiver = stack.enter_context(Receiver(*args, **kwargs))
            self._nodes = stack.pop_all()

    @property
    def pool(self) -> KVPool:
        return self.sender.pool

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
