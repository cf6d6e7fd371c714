"""The control channel over real sockets: what works, what strangers and broken peers cause, what is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from control_peers import (
    SECRET,
    Proxy,
    describe,
    drain,
    join,
    linked,
    raw_client,
    raw_server,
    serving,
)

import hetkv.control
from hetkv import handshake
from hetkv.channel import MAX_MESSAGE_BYTES, Channel, Records
from hetkv.control import MAX_UNREAD_MESSAGES, Address, ControlConnection, connect
from hetkv.description import Accept, Ready, Refusal, decode, encode
from hetkv.errors import (
    AuthenticationError,
    ControlError,
    ControlTimeoutError,
    HandshakeError,
    IncompatibleError,
    InputError,
    MessageError,
    PeerLostError,
    VersionError,
)
from hetkv.handshake import MAJOR, MINOR, WRONG_SECRET, Hello, Schedule, authenticate, hkdf_expand, hkdf_extract
from hetkv.listener import Listener
from hetkv.spec import KVSpec

HELLO_BYTES, PROOF_BYTES = 88, 36


def loss_of(connection: ControlConnection, seconds: float = 5.0) -> ControlError:
    """Wait for the loss, check that it is told exactly once, return it."""
    told: list[ControlError] = []
    event = threading.Event()
    connection.on_lost(lambda error: (told.append(error), event.set()))
    assert event.wait(seconds)
    time.sleep(0.02)
    assert len(told) == 1
    assert connection.lost is told[0]
    return told[0]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- what works


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
@pytest.mark.parametrize("listening", ["sender", "receiver"])
def test_either_role_may_listen(host, listening):
    connecting = handshake.other_role(listening)
    with serving(f"{host}:0", listening) as server, join(server, connecting) as client, server.next() as peer:
        assert client.peer == describe(listening)
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


def test_orderly_close_is_told_once_with_its_reason():
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
        told: list[ControlError] = []
        client.on_lost(told.append)
        client.send(Ready())
        client.close()
        client.close()
        assert isinstance(loss_of(peer), PeerLostError)
        assert peer.recv(5) == Ready()
        with pytest.raises(PeerLostError):
            peer.recv(5)
        assert told == []
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
        "import sys, time; sys.path[:0] = sys.argv[2:]\n"
        "from control_peers import *\n"
        "c = connect(sys.argv[1], role='sender', secret=SECRET, describe=lambda: describe('sender')); time.sleep(60)"
    )
    with serving() as server:
        tests = Path(__file__).parent
        child = subprocess.Popen([sys.executable, "-c", code, server.address, str(tests), str(tests.parent)])
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


# --- strangers


def test_a_wrong_secret_is_one_clear_text_on_both_sides():
    with serving() as server:
        with pytest.raises(AuthenticationError) as mine:
            join(server, secret=b"another secret, also long")
        theirs = server.error()
        assert isinstance(theirs, AuthenticationError)
        assert str(mine.value).endswith(WRONG_SECRET)
        assert str(theirs).endswith(WRONG_SECRET)


def test_a_listener_gives_a_stranger_no_mac():
    with serving() as server, raw_client(server.address) as sock:
        sock.sendall(Hello(MAJOR, MINOR, "sender", os.urandom(32), "0").encode())
        sock.sendall(struct.pack("<B3x32s", 1, bytes(32)))
        answer = drain(sock)
        assert len(answer) == HELLO_BYTES + PROOF_BYTES
        assert answer[HELLO_BYTES:] == struct.pack("<B3x32s", 2, bytes(32))
        assert isinstance(server.error(), AuthenticationError)


def test_a_replayed_client_fails():
    with serving() as server:
        with Proxy(server.address) as proxy, join(server, address=proxy.address), server.next():
            recorded = bytes(proxy.sent["up"])
        assert len(recorded) > HELLO_BYTES + PROOF_BYTES
        with raw_client(server.address) as sock:
            sock.sendall(recorded)
            drain(sock)
        assert str(server.error()).endswith(WRONG_SECRET)
        assert server.connections.empty()


def test_a_replayed_server_fails():
    with serving() as server, Proxy(server.address) as proxy, join(server, address=proxy.address), server.next():
        recorded = bytes(proxy.sent["down"])
    with raw_server(lambda sock: (sock.sendall(recorded), drain(sock))) as address:
        with pytest.raises(AuthenticationError, match=WRONG_SECRET):
            connect(address, role="sender", secret=SECRET, describe=lambda: describe("sender"), timeout=5)


@pytest.mark.parametrize("flip_role", [False, True])
def test_a_reflected_handshake_fails(flip_role):
    def reflect(sock: socket.socket) -> None:
        hello = bytearray(sock.recv(HELLO_BYTES, socket.MSG_WAITALL))
        hello[16] = 3 - hello[16] if flip_role else hello[16]
        sock.sendall(hello)
        while data := sock.recv(65536):
            sock.sendall(data)

    with raw_server(reflect) as address, pytest.raises(AuthenticationError, match="reflected"):
        connect(address, role="sender", secret=SECRET, describe=lambda: describe("sender"), timeout=5)


def test_a_reflected_proof_fails():
    """A fresh hello of the other role, and this side's own proof sent back."""

    def reflect(sock: socket.socket) -> None:
        sock.sendall(Hello(MAJOR, MINOR, "receiver", os.urandom(32), "0").encode())
        sock.recv(HELLO_BYTES, socket.MSG_WAITALL)
        sock.sendall(sock.recv(PROOF_BYTES, socket.MSG_WAITALL))
        drain(sock)

    with raw_server(reflect) as address, pytest.raises(AuthenticationError, match=WRONG_SECRET):
        connect(address, role="sender", secret=SECRET, describe=lambda: describe("sender"), timeout=5)


def test_two_of_one_role_are_refused_on_both_sides():
    with serving(role="sender") as server:
        with pytest.raises(HandshakeError, match="both sides are senders"):
            join(server, "sender")
        assert "both sides are senders" in str(server.error())


def test_another_major_is_refused_naming_both_versions():
    hello = Hello(9, 4, "sender", os.urandom(32), "9.0").encode()
    text = rf"the peer speaks control protocol 9\.4, this side {MAJOR}\.{MINOR}"
    with serving() as server, raw_client(server.address) as sock:
        for part in (hello, bytes(9000), bytes(9000), bytes(9000)):
            sock.sendall(part)  # what is still on its way must not reset the connection before the answer is read
            time.sleep(0.1)
        answer = drain(sock)
        assert len(answer) == HELLO_BYTES
        assert struct.unpack_from("<8sHH", answer) == (b"hetkvctl", MAJOR, MINOR)
        error = server.error()
        assert isinstance(error, VersionError)
        with pytest.raises(VersionError, match=text):
            raise error
    with (
        raw_server(lambda sock: (sock.sendall(hello), drain(sock))) as address,
        pytest.raises(VersionError, match=text),
    ):
        connect(address, role="receiver", secret=SECRET, describe=lambda: describe("receiver"), timeout=5)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not a hetkv control channel"),
        (bytes(100), "not a hetkv control channel"),
        (Hello(MAJOR, MINOR, "sender", bytes(32), "").encode().replace(b"\x58", b"\x59", 1), "hello of 89 bytes"),
        (Hello(MAJOR, MINOR, "sender", bytes(32), "").encode()[:16] + b"\7" + bytes(71), "unknown role 7"),
        (Hello(MAJOR, MINOR, "sender", bytes(32), "").encode()[:17] + b"\1" + bytes(70), "reserved bytes"),
        (b"hetkv", "connection closed"),
    ],
)
def test_a_foreign_or_broken_hello_harms_no_one(data, text):
    with serving() as server:
        with raw_client(server.address) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            drain(sock)
        assert text in str(server.error())
        with join(server), server.next():
            pass


def test_a_silent_and_a_trickling_client_are_dropped_in_time():
    with serving(timeout=0.4) as server, raw_client(server.address) as silent, raw_client(server.address) as slow:
        start = time.monotonic()
        with join(server), server.next():
            assert time.monotonic() - start < 0.4
        hello = Hello(MAJOR, MINOR, "sender", os.urandom(32), "0").encode()
        for byte in hello[:20]:
            try:
                slow.send(bytes([byte]))
            except ConnectionError:
                break
            time.sleep(0.05)
        errors = [server.error(), server.error()]
        assert all(isinstance(error, ControlTimeoutError) for error in errors)
        assert all("timed out waiting for its hello" in str(error) for error in errors)
        drain(silent)


def test_silent_clients_cannot_keep_a_peer_out():
    with serving(timeout=30.0, max_handshakes=4) as server:
        silent = [raw_client(server.address) for _ in range(12)]
        with join(server), server.next():
            pass
        for sock in silent[:8]:
            assert len(drain(sock)) in (0, HELLO_BYTES)  # it ends, long before the timeout, with the hello or before it
        for sock in silent:
            sock.close()


def test_a_silent_server_times_out():
    done = threading.Event()
    with raw_server(lambda sock: done.wait(5)) as address:
        with pytest.raises(ControlTimeoutError, match="timed out waiting for its hello"):
            connect(address, role="sender", secret=SECRET, describe=lambda: describe("sender"), timeout=0.2)
        done.set()


# --- a broken or hostile peer behind the handshake


@pytest.mark.parametrize("bit", [0, 40, 70, 8 * 16, 8 * 20, -1])
def test_a_flipped_bit_closes_with_a_typed_error(bit):
    with serving() as server, Proxy(server.address) as proxy:
        with join(server, address=proxy.address) as client, server.next() as peer:

            def flip(direction: str, data: bytes) -> bytes:
                changed = bytearray(data)
                changed[bit // 8] ^= 1 << bit % 8
                return bytes(changed)

            proxy.change = flip
            client.send(Ready())
            with contextlib.suppress(PeerLostError):
                client.send(Ready())  # a longer length waits for bytes that never come: this completes it
            lost = loss_of(peer)
            assert isinstance(lost, (AuthenticationError, MessageError))
            assert isinstance(loss_of(client), PeerLostError)


def test_a_repeated_record_closes():
    with serving() as server, Proxy(server.address) as proxy:
        with join(server, address=proxy.address) as client, server.next() as peer:
            proxy.change = lambda direction, data: data * 2
            client.send(Ready())
            lost = loss_of(peer)
            assert isinstance(lost, MessageError)
            assert "has sequence number 2, expected 3" in str(lost)


def test_an_oversized_record_is_refused_before_it_is_read():
    with linked() as (client, peer):
        client._channel.write(struct.pack("<IIQ", MAX_MESSAGE_BYTES + 1, 0, 2), time.monotonic() + 5)
        lost = loss_of(peer)
        assert isinstance(lost, MessageError)
        assert f"{MAX_MESSAGE_BYTES + 1} bytes is over the limit of {MAX_MESSAGE_BYTES}" in str(lost)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (msgspec.msgpack.encode({"type": "dance"}), "dance"),
        (msgspec.msgpack.encode({"type": "ready", "colour": 1}), "unknown field `colour`"),
        (msgspec.msgpack.encode({"type": "bye", "reason": 7}), "reason"),
        (msgspec.msgpack.encode([1, 2]), "malformed"),
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (encode(Accept()), "message Accept after the handshake"),
    ],
)
def test_a_message_that_cannot_be_is_named(payload, text):
    with linked() as (client, peer):
        client._records.write(payload, time.monotonic() + 5)
        lost = loss_of(peer)
        assert isinstance(lost, MessageError)
        assert text in str(lost)


def test_a_peer_that_floods_is_closed():
    with linked() as (client, peer):

        def flood() -> None:
            for _ in range(100 * MAX_UNREAD_MESSAGES):
                client.send(Ready())

        with pytest.raises(PeerLostError):
            flood()
        assert f"more than {MAX_UNREAD_MESSAGES}" in str(loss_of(peer))


def test_an_oversized_message_is_not_sent():
    with linked() as (client, peer):
        with pytest.raises(MessageError, match="over the limit"):
            client._records.write(bytes(MAX_MESSAGE_BYTES + 1), None)
        client.send(Ready())
        assert peer.recv(5) == Ready()


def test_a_peer_that_does_not_read_stalls_a_write_only_until_the_deadline():
    with raw_server(lambda sock: time.sleep(1)) as address:
        channel = Channel(raw_client(address), address)
        start = time.monotonic()
        with pytest.raises(ControlTimeoutError):
            channel.write(bytes(64 << 20), time.monotonic() + 0.3)
        assert time.monotonic() - start < 0.9
        channel.close()


# --- descriptions that do not fit


def test_both_sides_see_the_field_and_both_values():
    with serving() as server:
        with pytest.raises(IncompatibleError) as mine:
            join(server, describe=lambda: describe("sender", KVSpec.uniform(4, 4, 80)))
        theirs = server.error()
        assert isinstance(theirs, IncompatibleError)
        assert mine.value.field == theirs.field == "spec.layers[0].segments[0].channels"
        assert (mine.value.mine, mine.value.theirs) == ("80", "64") == (theirs.theirs, theirs.mine)


def test_a_refusal_by_one_side_alone_reaches_the_other(monkeypatch):
    """Only the listening side's check objects; the connecting side learns field and values from the refusal."""
    original = hetkv.control.compat.check

    def check(mine, theirs):
        if mine.role == "receiver":
            raise IncompatibleError("window", "mapped", "copied", "why not")
        original(mine, theirs)

    monkeypatch.setattr(hetkv.control.compat, "check", check)
    with serving() as server:
        with pytest.raises(IncompatibleError) as mine:
            join(server)
        assert (mine.value.field, mine.value.mine, mine.value.theirs) == ("window", "copied", "mapped")
        assert str(mine.value) == "window: this side has copied, the peer has mapped (why not)"
        assert str(server.error()) == "window: this side has mapped, the peer has copied (why not)"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"colour": 1}, "unknown field `colour`"),
        ({"lease_ms": 0}, "lease_ms is 0"),
        ({"role": "receiver"}, "authenticated as sender, describes itself as receiver"),
        ({"layers": []}, "layers are [], the shard has [0, 1, 2, 3]"),
    ],
)
def test_a_malformed_description_is_named_on_both_sides(change, text):
    with serving() as server:
        channel = Channel(raw_client(server.address), "server")
        keys = authenticate(channel, SECRET, "sender", True, 5)
        records = Records(channel, keys.control_send, keys.control_receive)
        raw = msgspec.msgpack.decode(encode(describe("sender"))) | change
        records.write(msgspec.msgpack.encode(raw), time.monotonic() + 5)
        answer = decode(records.read(time.monotonic() + 5), "server")
        channel.close()
        assert isinstance(answer, Refusal)
        assert answer.field == "description"
        assert text in answer.why
        error = server.error()
        assert isinstance(error, MessageError)
        assert text in str(error)


# --- TLS


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """(server context, context that trusts it, context that does not)."""
    import shutil
    import ssl

    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with the openssl command, which is not installed")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", key, "-out", cert, "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=str(cert)), ssl.create_default_context()


def test_tls_carries_the_same_protocol(contexts):
    server_tls, trusting, _ = contexts
    with serving(tls=server_tls) as server, Proxy(server.address) as proxy:
        with join(server, address=proxy.address, tls=trusting) as client, server.next() as peer:
            for _ in range(50):
                client.send(Ready())
                peer.send(Ready())
                assert client.recv(5) == peer.recv(5) == Ready()
            client.close("done")
            assert "done" in str(loss_of(peer))
        assert b"hetkvctl" not in proxy.sent["up"] + proxy.sent["down"]


def test_tls_with_an_unknown_certificate_or_without_tls_fails(contexts):
    server_tls, trusting, strange = contexts
    with serving(tls=server_tls) as server:
        with pytest.raises(AuthenticationError, match=r"(?i)certificate verify failed"):
            join(server, tls=strange)
        with pytest.raises(AuthenticationError, match=r"(?i)hostname mismatch"):
            join(server, tls=trusting, tls_hostname="elsewhere")
        with pytest.raises(ControlError):
            join(server)
        for _ in range(3):
            assert isinstance(server.error(), (AuthenticationError, PeerLostError))
        with join(server, tls=trusting), server.next():
            pass
    with serving() as server, pytest.raises(AuthenticationError, match="TLS failed"):
        join(server, tls=trusting)


# --- resources


def test_nothing_is_left_behind():
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

    with serving(on_connection=fail, on_refused=fail) as server:
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


def test_a_side_that_describes_itself_in_the_other_role_is_told():
    with (
        serving() as server,
        pytest.raises(InputError, match="this side is the sender, but describes itself as receiver"),
    ):
        join(server, describe=lambda: describe("receiver"))


def test_bad_arguments():
    options = {"role": "sender", "describe": lambda: describe("sender")}
    with pytest.raises(InputError, match="at least 16 bytes"):
        connect("127.0.0.1:1", secret=b"short", **options)
    with pytest.raises(InputError, match="name a host and a port"):
        connect(":7000", secret=SECRET, **options)
    with pytest.raises(PeerLostError, match="cannot connect"):
        connect("127.0.0.1:1", secret=SECRET, **options)
    with pytest.raises(InputError, match="cannot listen on"):
        Listener("192.0.2.1:0", secret=SECRET, on_connection=print, **options)
