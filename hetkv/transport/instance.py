"""Where all ranks of an instance listen (`Instance`), and how a rank is linked to those of them that matter."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hetkv.control.address import Address
from hetkv.errors import ControlTimeoutError, IncompatibleError, InputError, PeerLostError

if TYPE_CHECKING:
    from hetkv.transport.peer import Peer

POLL_S = 0.05


class Instance(msgspec.Struct, frozen=True):
    """The address book of one instance: its name, and the address of every rank in order of rank.

    As text: `prefill-0=10.0.0.1:7000,10.0.0.1:7001`. As a file that the ranks write together: see `join`.
    """

    name: str
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.name or any(mark in self.name for mark in "=,\n ") or not self.addresses:
            raise InputError(f"instance {self.name!r} with addresses {self.addresses}: a name, and one for each rank")
        for address in self.addresses:
            Address.parse(address)

    def __str__(self) -> str:
        return f"{self.name}={','.join(self.addresses)}"

    @classmethod
    def parse(cls, text: str) -> Instance:
        """Of `str(instance)`. Raises `InputError`."""
        name, equals, addresses = text.strip().partition("=")
        if not equals:
            raise InputError(f"instance {text!r}: write name=host:port,host:port with one address for each rank")
        return cls(name, tuple(part.strip() for part in addresses.split(",")))

    @staticmethod
    def join(file: str | os.PathLike[str], name: str, rank: int, ranks: int, address: str) -> None:
        """Add a rank to the file of its instance. A rank that comes again replaces what it wrote before.

        Raises `InputError` where the file cannot be written.
        """
        Instance(name, (address,))
        try:
            with open(file, "a") as book:  # one short line: whole, also where several ranks write at once
                book.write(f"{name} {rank}/{ranks} {address}\n")
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}") from None

    @classmethod
    def read(cls, file: str | os.PathLike[str], timeout: float = 30.0) -> Instance:
        """Of a file that all ranks have joined, or that holds `str(instance)`; waits for ranks that are missing.

        Raises `InputError` for a malformed file, `ControlTimeoutError` after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                text = Path(file).read_text()
            except FileNotFoundError:
                text = ""
            except OSError as error:
                raise InputError(f"{file}: {error.strerror}") from None
            if "=" in text:
                return cls.parse(text)
            found, missing = _joined(file, text)
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                raise ControlTimeoutError(f"{file}: {missing} within {timeout:g} s")
            time.sleep(POLL_S)


def _joined(file: Any, text: str) -> tuple[Instance | None, str]:
    """The instance, where all ranks have joined, or what is missing."""
    at: dict[int, str] = {}
    name, ranks = "", 0
    for line in text.splitlines():
        try:
            name, place, address = line.split()
            rank, ranks = (int(number) for number in place.split("/"))
        except ValueError:
            raise InputError(f"{file}: {line!r} is no line of an address book") from None
        at[rank] = address
    missing = [rank for rank in range(ranks) if rank not in at]
    if not at or missing:
        return None, f"ranks {missing} of instance {name!r} did not join" if at else "no rank joined"
    return Instance(name, tuple(at[rank] for rank in range(ranks))), ""


def connect_instance(node: Any, target: Instance | Sequence[str]) -> list[Peer]:
    """Link a node to those ranks that hold something of its pool; `Node.connect` is its face.

    The first rank that shares something tells which others do. All or none: links made here are ended on an error.
    """
    name = target.name if isinstance(target, Instance) else None
    addresses = target.addresses if isinstance(target, Instance) else Instance("-", tuple(target)).addresses
    linked = {peer.rank: peer for peer in node.peers if peer.instance == name}
    made: list[Peer] = []

    def link(rank: int, instance: str) -> Peer:
        peer: Peer = node.connect(addresses[rank])
        made.append(peer)
        _check_identity(peer, addresses, rank, instance)
        return peer

    try:
        if not linked:
            rank, peer = _first(node, addresses)
            made.append(peer)
            _check_identity(peer, addresses, rank, name or peer.instance)
            linked[rank] = peer
        first = next(iter(linked.values()))
        for rank in first.agreement.ranks:
            if rank not in linked:
                linked[rank] = link(rank, first.instance)
    except BaseException:
        for peer in made:
            node.disconnect(peer, "the other ranks of the instance could not be linked")
        raise
    return [linked[rank] for rank in first.agreement.ranks]


def _first(node: Any, addresses: Sequence[str]) -> tuple[int, Peer]:
    """A link to some rank that shares something with this one, beginning where that is likely."""
    guess = node.rank * len(addresses) // len(node.description.shards)
    failure: IncompatibleError | None = None
    for place in range(len(addresses)):
        rank = (guess + place) % len(addresses)
        try:
            return rank, node.connect(addresses[rank])
        except IncompatibleError as error:
            if error.field != "shard":
                raise
            failure = error
    assert failure is not None  # an instance has an address
    raise failure


def _check_identity(peer: Peer, addresses: Sequence[str], rank: int, instance: str) -> None:
    """An address may have been given to another process since."""
    if len(peer.description.shards) != len(addresses):
        raise InputError(
            f"instance {peer.instance!r} has {len(peer.description.shards)} ranks, got {len(addresses)} addresses"
        )
    if (peer.instance, peer.rank) != (instance, rank):
        raise PeerLostError(
            f"{addresses[rank]} is rank {peer.rank} of {peer.instance}, not rank {rank} of {instance}: "
            "was it started again?"
        )
