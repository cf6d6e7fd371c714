"""The data plane's streams: over TCP, by one connection and several; what a stranger and a hostile peer can do."""

from __future__ import annotations

import hmac
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from hetkv.errors import AuthenticationError, HetkvError, MalformedError, PeerLostError, ProtocolError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import (
    SECRET,
    WAIT_S,
    attacked,
    check_transfer,
    connected,
    randomise,
    until,
)
from tests.transport.stream_peer import StreamPeer

SPEC = KVSpec.uniform(2, 2, 64)
SMALL = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384)


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """No listener has unix sockets."""
    monkeypatch.setattr("hetkv.control.local.LocalSockets._listen", lambda self, address: False)


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("slot", [16384, 1 << 20])
def test_over_tcp(tcp: None, streams: int, slot: int) -> None:
    source, destination = randomise(KVPool.allocate(SPEC, 256), 1), randomise(KVPool.allocate(SPEC, 256), 2)
    config = TransferConfig(slot_bytes=slot, window_bytes=4 * slot, streams=streams)
    with connected([source], [destination], config) as ([sender], [receiver]):
        for number in range(4):
            check_transfer(source, destination, sender, receiver, 3001, request=f"{number}", seed=number)
        assert sender.path(sender.peers[0]) == "stream"
        assert receiver.peers[0].kind == sender.peers[0].kind == "tcp"


def test_threads_of_packs_and_unpacks(tcp: None) -> None:
    """A second one over TCP, where there is a CPU for it, unless the caller says how many."""
    assert TransferConfig().threads_over("tcp") == min(2, len(os.sched_getaffinity(0)))
    assert TransferConfig().threads_over("unix") == 1
    assert [TransferConfig(threads=3).threads_over(kind) for kind in ("tcp", "unix")] == [3, 3]
    layouts = {"nhd": 16, "rocm": 64}
    pools = [KVPool.allocate(SPEC, 4096 // size, layout=name, block_size=size) for name, size in layouts.items()]
    for threads in (1, 3):
        source, destination = (randomise(pool, number) for number, pool in enumerate(pools))
        with connected([source], [destination], TransferConfig(threads=threads)) as ([sender], [receiver]):
            check_transfer(source, destination, sender, receiver, 3001)


def test_the_folder_of_the_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link over a path where the namespace's names are not reached; and no file stays, whoever is killed."""
    monkeypatch.setenv("HETKV_SOCKET_DIR", str(tmp_path))
    (tmp_path / "hetkv-0123.lock").touch()
    (tmp_path / "hetkv-0123.sock").touch()
    source, destination = randomise(KVPool.allocate(SPEC, 16), 1), randomise(KVPool.allocate(SPEC, 16), 2)
    from hetkv.control.local import LocalSockets

    listen = LocalSockets._listen
    monkeypatch.setattr(LocalSockets, "_listen", lambda self, at: not at.startswith("\0") and listen(self, at))
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 100)
        assert sender.path(sender.peers[0]) == "shm"
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_no_port_but_the_one_of_listen() -> None:
    def listening() -> set[str]:
        inodes = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                  if os.path.exists(f"/proc/self/fd/{fd}")}  # fmt: skip
        rows = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}

    before = listening()
    with Receiver(KVPool.allocate(SPEC, 4), secret=SECRET, instance="d") as receiver:
        assert listening() == before
        port = int(receiver.listen("127.0.0.1:0").rpartition(":")[2])
        assert listening() - before == {f"0100007F:{port:04X}"}


class Peer(StreamPeer):
    spec, config = SPEC, SMALL


OUTSIDE: dict[str, Callable[[Peer], None]] = {
    "slot that does not exist": lambda p: p.frame(2, bytes(64), slot=4),
    "slot far outside": lambda p: p.frame(2, bytes(64), slot=2**32 - 1),
    "another generation": lambda p: p.frame(2, bytes(64), generation=1),
    "past the slot": lambda p: p.frame(2, bytes(64), offset=16384 - 63),
    "offset that overflows": lambda p: p.frame(2, bytes(64), offset=2**64 - 8),
    "more than the slot": lambda p: p.frame(2, bytes(16), length=16385),
    "all there is": lambda p: p.frame(2, length=2**32 - 1),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_payload_goes_to_granted_slots_only(name: str) -> None:
    with attacked(Peer, SPEC, SMALL) as (peer, rx):
        OUTSIDE[name](peer)
        with pytest.raises(ProtocolError, match="which the sender does not hold, or for bytes outside of it"):
            rx.wait(WAIT_S)


MALFORMED: dict[str, tuple[Callable[[Peer], None], type[HetkvError]]] = {
    "unknown kind": (lambda p: p.frame(9, bytes(8)), MalformedError),
    "message over the limit": (lambda p: p.frame(1, length=65537), MalformedError),
    "window without a descriptor": (lambda p: p.frame(3, offset=16384), MalformedError),
    "part that came before": (
        lambda p: (p.frame(2, bytes(8)), p.frame(2, bytes(8)))[0], MalformedError),
    "part far ahead": (lambda p: p.frame(2, bytes(8), number=1 << 40), MalformedError),
    "foreign key": (lambda p: p.frame(2, bytes(8), key=bytes(16)), AuthenticationError),
    "out of place": (lambda p: (setattr(p, "place", 1), p.frame(2, bytes(8)))[0], AuthenticationError),
    "end": (lambda p: p.sock.shutdown(socket.SHUT_RDWR), PeerLostError),
    "end inside a part": (
        lambda p: (p.frame(2, bytes(8), length=4096), p.sock.shutdown(socket.SHUT_RDWR))[0], PeerLostError),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_stream_ends_the_link(name: str) -> None:
    with attacked(Peer, SPEC, SMALL) as (peer, rx):
        attack, error = MALFORMED[name]
        attack(peer)
        with pytest.raises(error):
            rx.wait(WAIT_S)


def test_a_message_after_parts_that_never_come_waits(tcp: None) -> None:
    with attacked(Peer, SPEC, SMALL) as (peer, rx):
        peer.frame(1, bytes(56), number=7)  # malformed, once it is looked at
        with pytest.raises(HetkvError):
            rx.wait(0.3)
        assert not rx.done()
        peer.sock.shutdown(socket.SHUT_RDWR)


def test_a_stream_needs_the_key_of_its_connection(tcp: None) -> None:
    """Whoever calls without it is turned away, and so is a call that is repeated, or for a connection that is up."""
    with Receiver(KVPool.allocate(SPEC, 16), secret=SECRET, instance="d", config=SMALL) as receiver:
        address = receiver.listen()
        host, port = address.rsplit(":", 1)
        peer = Peer(receiver)

        def call(link: int, key: bytes, index: int = 1) -> bytes:
            with socket.create_connection((host, int(port)), 5) as sock:
                sock.sendall(b"hetkvdat")
                hello = sock.recv(88, socket.MSG_WAITALL)
                head = b"hetkvdat" + struct.pack("<HHIQH6x", *struct.unpack("<HH", hello[8:12]), 64, link, index)
                sock.sendall(head[8:] + hmac.digest(key, hello + head, "sha256"))
                return sock.recv(32)

        assert call(peer.connection.link_id, bytes(32)) == b""
        assert call(7, bytes(32)) == b""
        until(lambda: bool(receiver.peers))
        assert receiver.peers[0].lost is None
        peer.close()


def test_descriptions_name_no_foreign_sockets() -> None:
    with Sender(KVPool.allocate(SPEC, 4), secret=SECRET, instance="p") as sender:
        for name in ("/run/docker.sock", "@other", "hetkv-relative", "/tmp/hetkv-\n", "@hetkv-" + "x" * 200):
            with pytest.raises(HetkvError, match="hetkv's unix sockets"):
                msgspec.structs.replace(sender.description, sockets=(name,))
