"""What strangers, replays, reflections and broken or unfit peers cause on the control channel: typed errors."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time

import msgspec
import pytest

import hetkv.control.connection
from hetkv.control.channel import MAX_MESSAGE_BYTES, Channel, Records
from hetkv.control.connection import MAX_UNREAD_MESSAGES
from hetkv.control.description import Accept, Ready, Rejection, decode, encode
from hetkv.control.establish import connect
from hetkv.control.handshake import MAJOR, MINOR, WRONG_SECRET, Hello, authenticate
from hetkv.control.payloads import MAX_LATER_BYTES, MAX_PAYLOAD_BYTES, Notice
from hetkv.control.reactor import run
from hetkv.errors import (
    AuthenticationError,
    ControlTimeoutError,
    HandshakeError,
    IncompatibleError,
    MessageError,
    PeerLostError,
    VersionError,
)
from hetkv.kv.spec import KVSpec
from tests.control.peers import (
    HELLO_BYTES,
    PROOF_BYTES,
    SECRET,
    Proxy,
    describe,
    drain,
    join,
    linked,
    loss_of,
    raw_client,
    raw_server,
    serving,
)

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


def test_two_of_one_role_are_rejected_on_both_sides():
    with serving(role="sender") as server:
        with pytest.raises(HandshakeError, match="both sides are senders"):
            join(server, "sender")
        assert "both sides are senders" in str(server.error())


def test_another_major_is_rejected_naming_both_versions():
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


# --- a broken or hostile peer after the handshake


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
            assert "has sequence number 3, expected 4" in str(lost)


def test_an_oversized_record_is_rejected_before_it_is_read():
    with linked() as (client, peer):
        run(client._channel.write(struct.pack("<IIQ", MAX_LATER_BYTES + 1, 0, 2), time.monotonic() + 5))
        lost = loss_of(peer)
        assert isinstance(lost, MessageError)
        assert f"{MAX_LATER_BYTES + 1} bytes is over the limit of {MAX_LATER_BYTES}" in str(lost)


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
        (encode(Notice(b"")), "message Notice after the handshake"),  # nobody is there to take it
        (msgspec.msgpack.encode({"type": "notice", "data": bytes(MAX_PAYLOAD_BYTES + 1)}), "data has 65537 bytes"),
        (msgspec.msgpack.encode({"type": "notice", "data": "text"}), "data"),
        (msgspec.msgpack.encode({"type": "payload", "request": bytes(15), "data": b""}), "request has 15 bytes"),
        (msgspec.msgpack.encode({"type": "payload", "request": bytes(16)}), "missing required field `data`"),
        (msgspec.msgpack.encode({"type": "ask", "request": bytes(16), "content": b"x"}), "content has 1 bytes"),
        (msgspec.msgpack.encode({"type": "taken", "count": 0}), "0 notifications"),
        (msgspec.msgpack.encode({"type": "taken", "count": 257}), "257 notifications"),
    ],
)
def test_a_message_that_cannot_be_is_named(payload, text):
    with linked() as (client, peer):
        run(client._records.write(payload, time.monotonic() + 5))
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
            run(client._records.write(bytes(MAX_MESSAGE_BYTES + 1), None))
        client.send(Ready())
        assert peer.recv(5) == Ready()


def test_a_peer_that_does_not_read_stalls_a_write_only_until_the_deadline():
    with raw_server(lambda sock: time.sleep(1)) as address:
        channel = Channel(raw_client(address), address)
        start = time.monotonic()
        with pytest.raises(ControlTimeoutError):
            run(channel.write(bytes(64 << 20), time.monotonic() + 0.3))
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


def test_a_rejection_by_one_side_alone_reaches_the_other(monkeypatch):
    """Only the listening side's check objects; the connecting side learns field and values from the rejection."""
    original = hetkv.control.compat.check

    def check(mine, theirs, minor):
        if mine.role == "receiver":
            raise IncompatibleError("window", "mapped", "copied", "why not")
        original(mine, theirs, minor)

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
        keys = run(authenticate(channel, [SECRET], "sender", True, 5))
        records = Records(channel, keys.control_send, keys.control_receive)
        raw = msgspec.msgpack.decode(encode(describe("sender"))) | change
        run(records.write(msgspec.msgpack.encode(raw), time.monotonic() + 5))
        answer = decode(run(records.read(time.monotonic() + 5)), "server")
        channel.close()
        assert isinstance(answer, Rejection)
        assert answer.field == "description"
        assert text in answer.why
        error = server.error()
        assert isinstance(error, MessageError)
        assert text in str(error)
