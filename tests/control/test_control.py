"""The control channel over real sockets: what works, how it ends, TLS, what remains."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from hetkv.control import handshake
from hetkv.control.address import Address
from hetkv.control.connection import ControlConnection
from hetkv.control.description import Ready
from hetkv.control.establish import connect
from hetkv.control.handshake import Schedule, hkdf_expand, hkdf_extract
from hetkv.control.listener import Listener
from hetkv.errors import (
    AuthenticationError,
    ControlError,
    ControlTimeoutError,
    IncompatibleError,
    InputError,
    PeerLostError,
)
from hetkv.kv.spec import KVSpec
from tests.control.peers import (
    HELLO_BYTES,
    SECRET,
    describe,
    drain,
    join,
    linked,
    loss_of,
    raw_client,
    serving,
)

ROOT = Path(__file__).parents[2]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- what works


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
@pytest.mark.parametrize("listening", ["sender", "receiver"])
def test_either_role_may_listen(host, listening):
    connecting = handshake.other_role(listening)
    with serving(f"{host}:0", listening) as server, join(server, connecting) as client, server.next() as peer:
        assert client.peer.sockets
        assert msgspec.structs.replace(client.peer, sockets=()) == describe(listening)
        assert peer.peer == describe(connecting)
        assert client.data_keys.send == peer.data_keys.receive
        assert client.data_keys.receive == peer.data_keys.send
        assert len({*client.data_keys}) == 2
        assert {len(key) for key in client.data_keys} == {16}
        assert client.link_id == peer.link_id
        client.send(Ready())
        peer.send(Ready())
        assert client.recv(5) == peer.recv(5) == Ready()


def test_every_connection_has_keys_of_its_own():
    with serving() as server:
        keys, links = set(), set()
        for _ in range(5):
            with join(server) as client, server.next():
                keys |= {*client.data_keys}
                links.add(client.link_id)
        assert len(keys) == 10
        assert len(links) == 5


def test_all_labels_give_different_keys():
    schedule = Schedule(SECRET, b"a", b"b")
    values = [schedule.proof("sender"), schedule.proof("receiver"), *schedule.keys("sender")[:4]]
    assert len({value[:16] for value in values}) == 6
    assert schedule.keys("sender")[:4] == tuple(schedule.keys("receiver")[i] for i in (1, 0, 3, 2))
    assert Schedule(SECRET, b"b", b"a").keys("sender") != schedule.keys("sender")


@pytest.mark.parametrize(
    ("salt", "info", "prk", "okm"),
    [
        (
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            b"",
            b"",
            "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf_of_rfc_5869(salt, info, prk, okm):
    """Test cases 1 and 3 of the RFC's appendix A."""
    key = hkdf_extract(salt, b"\x0b" * 22)
    assert key.hex() == prk
    assert hkdf_expand(key, info, 42).hex() == okm


def test_many_peers_at_once():
    with serving() as server:
        clients: list[ControlConnection] = []
        threads = [threading.Thread(target=lambda: clients.append(join(server))) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        peers = [server.next() for _ in threads]
        assert sorted(c.link_id for c in clients) == sorted(p.link_id for p in peers)
        for connection in (*clients, *peers):
            connection.close()


# --- the end of a connection


def test_orderly_close_is_reported_once_with_its_reason():
    with linked() as (client, peer):
        client.close("scaled down")
        lost = loss_of(peer)
        assert isinstance(lost, PeerLostError)
        assert lost.orderly
        assert "the peer closed the connection: scaled down" in str(lost)
        with pytest.raises(PeerLostError, match="scaled down"):
            peer.recv(5)
        with pytest.raises(PeerLostError, match="scaled down"):
            peer.send(Ready())
        with pytest.raises(PeerLostError, match="this side closed"):
            client.send(Ready())


def test_own_close_is_no_loss_and_messages_before_a_loss_are_kept():
    with linked() as (client, peer):
        reported: list[ControlError] = []
        client.on_lost(reported.append)
        client.send(Ready())
        client.close()
        client.close()
        assert isinstance(loss_of(peer), PeerLostError)
        assert peer.recv(5) == Ready()
        with pytest.raises(PeerLostError):
            peer.recv(5)
        assert reported == []
        assert client.lost is None


def test_close_inside_the_callback_and_a_callback_that_fails():
    with linked() as (client, peer):
        done = threading.Event()
        peer.on_lost(lambda error: 1 / 0)
        peer.on_lost(lambda error: (peer.close(), done.set()))
        client.close()
        assert done.wait(5)


def test_recv_times_out_and_is_ended_by_close():
    with linked() as (client, _):
        with pytest.raises(ControlTimeoutError, match=r"no control message within 0\.05 s"):
            client.recv(0.05)
        threading.Timer(0.1, client.close).start()
        with pytest.raises(PeerLostError, match="this side closed"):
            client.recv(5)


def test_a_killed_process_is_noticed():
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from tests.control.peers import *\n"
        "c = connect(sys.argv[1], role='sender', secret=SECRET, describe=lambda: describe('sender')); time.sleep(60)"
    )
    with serving() as server:
        child = subprocess.Popen([sys.executable, "-c", code, server.address, str(ROOT)])
        try:
            with server.next() as peer:
                child.send_signal(signal.SIGKILL)
                start = time.monotonic()
                lost = loss_of(peer)
                assert time.monotonic() - start < 2
                assert isinstance(lost, PeerLostError)
                assert not lost.orderly
        finally:
            child.kill()
            child.wait()
        with join(server) as client, server.next() as peer:
            client.send(Ready())
            assert peer.recv(5) == Ready()


# --- resources


def test_nothing_remains():
    threads, descriptors = threading.active_count(), open_descriptors()
    kept: list[ControlConnection] = []  # so that it is close, not the garbage collector, that frees the descriptors
    with serving(timeout=1.0) as server:
        for _ in range(5):
            kept += [join(server), server.next()]
            with pytest.raises(AuthenticationError):
                join(server, secret=bytes(16))
            with pytest.raises(IncompatibleError):
                join(server, describe=lambda: describe("sender", KVSpec.uniform(3, 4, 64)))
        for connection in kept:
            connection.close()
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors


def test_close_ends_a_running_handshake():
    threads, descriptors = threading.active_count(), open_descriptors()
    with serving(timeout=30.0) as server, raw_client(server.address) as silent:
        assert len(silent.recv(HELLO_BYTES, socket.MSG_WAITALL)) == HELLO_BYTES
        start = time.monotonic()
        server.listener.close()
        assert time.monotonic() - start < 2
        assert drain(silent) == b""
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors


def test_a_closed_listener_leaves_its_connections_open_and_frees_the_port():
    with serving() as server:
        client, peer = join(server), server.next()
        address = server.address
        server.listener.close()
        server.listener.close()
        client.send(Ready())
        assert peer.recv(5) == Ready()
        with pytest.raises(PeerLostError, match="cannot connect"):
            join(server)
        with serving(address) as again, join(again) as second, again.next():
            assert second.link_id != client.link_id
        client.close()
        peer.close()


def test_failing_callbacks_do_not_stop_the_listener():
    def fail(*_: object) -> None:
        raise RuntimeError("callback")

    with serving(on_connection=fail, on_rejected=fail) as server:
        for _ in range(2):
            with join(server) as client:
                assert "this side failed" in str(loss_of(client))
            with pytest.raises(AuthenticationError):
                join(server, secret=bytes(16))


def test_idle_connections_use_no_processor_time():
    with linked():
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.6)
        assert time.process_time() - before < 0.006


# --- input


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host:7000", ("host", 7000)),
        ("[::1]:7000", ("::1", 7000)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        (":7000", ("", 7000)),
    ],
)
def test_addresses(text, expected):
    assert Address.parse(text) == expected
    assert Address.parse(str(Address.parse(text))) == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("host", "has no port"),
        ("host:", "port '' is not a number"),
        ("host:http", "port 'http' is not a number"),
        ("host:65536", "port '65536' is not a number from 0 to 65535"),
        ("host:-1", "port '-1'"),
        ("::1:7000", "in brackets"),
    ],
)
def test_malformed_addresses_are_named(text, problem):
    with pytest.raises(InputError, match=problem):
        Address.parse(text)


def test_a_side_that_describes_itself_in_the_other_role_is_reported():
    with (
        serving() as server,
        pytest.raises(InputError, match="this side is the sender, but describes itself as receiver"),
    ):
        join(server, describe=lambda: describe("receiver"))


def test_bad_arguments():
    options = {"role": "sender", "describe": lambda: describe("sender")}
    with pytest.raises(InputError, match="16 or more"):
        connect("127.0.0.1:1", secret=b"short", **options)
    with pytest.raises(InputError, match="name a host and a port"):
        connect(":7000", secret=SECRET, **options)
    with pytest.raises(PeerLostError, match="cannot connect"):
        connect("127.0.0.1:1", secret=SECRET, **options)
    with pytest.raises(InputError, match="cannot listen on"):
        Listener("192.0.2.1:0", secret=SECRET, on_connection=print, **options)
