"""Streams that leave the host, encrypted: against an independent implementation of the two ciphers, and against whoever
alters what is on its way."""

from __future__ import annotations

import contextlib
import hmac
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from hetkv.control import compat
from hetkv.control.connection import ControlConnection
from hetkv.control.description import Ready, for_minor
from hetkv.control.establish import connect
from hetkv.core import core
from hetkv.errors import AuthenticationError, HetkvError, IncompatibleError, InputError, MalformedError, ProtocolError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.control.peers import describe
from tests.transport.peers import (
    SECRET,
    WAIT_S,
    attacked,
    check_transfer,
    connected,
    duplicate,
    randomise,
    same_bytes,
    until,
)

SPEC = KVSpec.uniform(2, 2, 64)
SMALL = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384, encrypt=True)
CIPHERS: dict[str, Any] = {"aes-256-gcm": AESGCM, "chacha20-poly1305": ChaCha20Poly1305}
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not core.ciphers(), reason="this build has no libsodium")


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")


@pytest.fixture(params=CIPHERS)
def cipher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All nodes have this one alone."""
    if request.param not in core.ciphers():
        pytest.skip(f"this CPU has no instructions for {request.param}")
    monkeypatch.setattr("hetkv.transport.node.available_ciphers", lambda needed: (request.param,))
    return str(request.param)


# --- whole transfers


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("slot", [16384, 1 << 20])
def test_kv_arrives(tcp: None, cipher: str, streams: int, slot: int) -> None:
    source, destination = randomise(KVPool.allocate(SPEC, 256), 1), randomise(KVPool.allocate(SPEC, 256), 2)
    config = TransferConfig(slot_bytes=slot, window_bytes=4 * slot, streams=streams, encrypt=True)
    with connected([source], [destination], config) as ([sender], [receiver]):
        for number in range(3):
            check_transfer(source, destination, sender, receiver, 3001, request=f"{number}", seed=number)
        assert sender.peers[0].cipher == receiver.peers[0].cipher == cipher
        assert sender.path(sender.peers[0]) == "stream"


class Relay:
    """Passes connections on to `target`; keeps what went up each of them, changed by `change(connection, data)`."""

    def __init__(self, target: str, change: Callable[[int, bytes], bytes] = lambda number, data: data) -> None:
        host, port = target.rsplit(":", 1)
        self.target, self.change = (host, int(port)), change
        self.up: list[bytearray] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._run)

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self._server.accept()[0], socket.create_connection(self.target)
                self._sockets += near, far
                self.up.append(bytearray())
                number = len(self.up) - 1
                self._start(self._pump, near, far, number)
                self._start(self._pump, far, near, None)

    def _pump(self, source: socket.socket, target: socket.socket, number: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if number is not None:
                    self.up[number] += data
                    data = self.change(number, data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in (self._server, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:  # none reads a descriptor that is closed, and may be another's by then
            thread.join(WAIT_S)
        for sock in (self._server, *self._sockets):
            sock.close()


@contextlib.contextmanager
def relayed(change: Callable[[int, bytes], bytes] = lambda number, data: data, **config: Any) -> Iterator[Any]:
    """A sender that connects to a receiver through a relay: connection 0 is the control channel, 1 the stream."""
    pools = randomise(KVPool.allocate(SPEC, 64), 1), randomise(KVPool.allocate(SPEC, 64), 2)
    settings = TransferConfig(slot_bytes=1 << 20, **config)
    with Sender(pools[0], secret=SECRET, instance="p", config=settings) as sender:
        with Receiver(pools[1], secret=SECRET, instance="d", config=settings) as receiver:
            relay = Relay(receiver.listen(), change)
            try:
                sender.connect(relay.address)
                until(lambda: bool(receiver.peers))
                yield relay, sender, receiver, pools
            finally:
                relay.close()


@pytest.mark.parametrize("encrypt", [False, True])
def test_nothing_of_a_payload_or_message_is_readable(tcp: None, encrypt: bool) -> None:
    """Without encryption both are found in what crossed, so the search is right."""
    with relayed(encrypt=encrypt) as (relay, sender, receiver, (source, destination)):
        check_transfer(source, destination, sender, receiver, 500)
        seen = bytes(relay.up[1])
        assert (b"HKV1" in seen) != encrypt
        tensor = next(iter(source.layers[0].tensors.values()))
        rows = [row.tobytes() for row in tensor.flatten().view(-1, 32).numpy()]
        found = sum(row in seen for row in rows[::97])
        assert found == 0 if encrypt else found > 0


def test_either_side_may_ask_and_unix_sockets_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = randomise(KVPool.allocate(SPEC, 16), 1), randomise(KVPool.allocate(SPEC, 16), 2)
    with connected([source], [destination], SMALL) as ([sender], _):
        assert (sender.peers[0].kind, sender.peers[0].cipher) == ("unix", "")
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")
    plain = msgspec.structs.replace(SMALL, encrypt=False)
    for configs in ((SMALL, plain), (plain, SMALL)):
        with connected([source], [destination], *configs) as ([sender], [receiver]):
            assert sender.peers[0].cipher == core.ciphers()[0]
            check_transfer(source, destination, sender, receiver, 100)
    with connected([source], [destination], plain) as ([sender], _):
        assert sender.peers[0].cipher == ""


def test_what_cannot_be_agreed_on_is_rejected_by_name(tcp: None, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = describe("sender", ciphers=("a", "b"), encrypt=True), describe("receiver", ciphers=("b", "a"))
    assert compat.cipher(mine, theirs) == compat.cipher(theirs, mine) == "a"  # the sender's best
    with pytest.raises(IncompatibleError, match="ciphers: this side has a, b, the peer has none: no libsodium"):
        compat.check(mine, describe("receiver"))
    with pytest.raises(IncompatibleError, match=r"encrypt: this side has True, the peer has version 1\.4"):
        compat.check_minor(mine, 4)
    assert (for_minor(mine, 4).ciphers, for_minor(mine, 4).encrypt) == ((), False)
    pool = KVPool.allocate(SPEC, 4)
    with Sender(pool, secret=SECRET, instance="p", config=SMALL) as sender:
        monkeypatch.setattr("hetkv.transport.node.available_ciphers", lambda needed: ())
        with Receiver(KVPool.allocate(SPEC, 4), secret=SECRET, instance="d") as receiver:
            with pytest.raises(IncompatibleError, match="ciphers"):
                receiver.connect(sender.listen())
    monkeypatch.undo()
    monkeypatch.setattr(core, "ciphers", list)
    with pytest.raises(InputError, match="this build has no libsodium"):
        Sender(pool, secret=SECRET, instance="p", config=SMALL)


@pytest.mark.parametrize("at", ["payload", "tag", "slot"])
def test_a_bit_that_is_changed_on_its_way(tcp: None, cipher: str, at: str) -> None:
    """The receiver notices before any of the frame is in a slot, and nothing of the pool changes."""
    place = {"payload": 48 + 1000, "tag": 32 + 5, "slot": 16}[at]
    changed = threading.Event()

    def change(number: int, data: bytes) -> bytes:
        # Of the first frame that begins in a part of its own and is a payload: kind 2 at byte 4.
        if number == 1 and not changed.is_set() and len(data) > 2000 and data[4:8] == b"\2\0\0\0":
            changed.set()
            return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        return data

    with relayed(change, encrypt=True) as (_, sender, receiver, (source, destination)):
        before = duplicate(destination)
        want = receiver.receive("r", list(range(32)), 512)
        handle = sender.send("r", list(range(32)), 512)
        until(lambda: receiver.stats()["granted_slots"] > 0)
        handle.send_layer(0)
        with pytest.raises(AuthenticationError, match="an encrypted frame of the data connection was altered"):
            want.wait(WAIT_S)
        assert changed.is_set()
        assert same_bytes(destination, before)
        with pytest.raises(HetkvError):
            handle.wait(WAIT_S)
        assert source is not destination


# --- one frame after another, by the independent implementation


class Peer:
    """A sender that agrees on a cipher, and makes frames of its own."""

    def __init__(self, receiver: Receiver) -> None:
        with Sender(KVPool.allocate(SPEC, 16), secret=SECRET, instance="hostile", config=SMALL) as honest:
            description = honest.description
        self.connection: ControlConnection = connect(
            receiver.listen(), role="sender", secret=SECRET, describe=lambda: description
        )
        self.connection.send(Ready())
        self.connection.recv(WAIT_S)
        [(descriptor, self.key, self.their_key, name)] = self.connection.streams.config()
        self.make = CIPHERS[name]
        self.sock = socket.socket(fileno=os.dup(descriptor))
        self.sock.settimeout(WAIT_S)
        self.place = self.their_place = 0

    def frame(self, kind: int, body: bytes = b"", *, number: int = 0, slot: int = 0, generation: int = 0,
              offset: int = 0, key: bytes | None = None) -> bytes:  # fmt: skip
        head = struct.pack("<IB3xQIIQ", len(body), kind, number, slot, generation, offset)
        sealed = self.make(key or self.key).encrypt(bytes(4) + struct.pack("<Q", self.place), body, head)
        self.place += 1
        return head + sealed[-16:] + sealed[:-16]

    def read(self) -> tuple[int, bytes]:
        """Kind and bytes of the receiver's next frame."""
        head = self.sock.recv(48, socket.MSG_WAITALL)
        length, kind = struct.unpack_from("<IB", head)
        body = self.sock.recv(length, socket.MSG_WAITALL) if length else b""
        nonce = bytes(4) + struct.pack("<Q", self.their_place)
        self.their_place += 1
        return kind, self.make(self.their_key).decrypt(nonce, body + head[32:], head[:32])

    def close(self) -> None:
        self.sock.close()
        self.connection.close()


def test_the_independent_implementation_reads_what_is_sent(tcp: None, cipher: str) -> None:
    """Ticket and grants, frame after frame, each under the nonce of its place; and it is read in turn."""
    with attacked(Peer, SPEC, SMALL) as (peer, want):
        types = set()
        while not {2, 3} <= types:
            kind, message = peer.read()
            assert kind == 1
            assert message[:4] == b"HKV1"
            types.add(int.from_bytes(message[6:8], "little"))
        for number in range(3):
            peer.sock.sendall(peer.frame(2, bytes(range(200)), number=number, offset=number * 200))
        peer.sock.sendall(peer.frame(2, bytes(64), number=3, slot=9))  # what ends the link is this
        with pytest.raises(ProtocolError, match="payload came for slot 9"):
            want.wait(WAIT_S)


def swapped(peer: Peer) -> bytes:
    first = peer.frame(2, bytes(64))
    return peer.frame(2, bytes(64), number=1) + first


ATTACKS: dict[str, tuple[Callable[[Peer], bytes], type[HetkvError]]] = {
    "another key": (lambda p: p.frame(2, bytes(64), key=bytes(32)), AuthenticationError),
    "the other direction's key": (lambda p: p.frame(2, bytes(64), key=p.their_key), AuthenticationError),
    "repeated": (lambda p: p.frame(2, bytes(64)) * 2, AuthenticationError),
    "swapped": (swapped, AuthenticationError),
    "one left out": (lambda p: (p.frame(2, bytes(8)), p.frame(2, bytes(8), number=1))[1], AuthenticationError),
    "too long": (lambda p: struct.pack("<IB3x", 262145, 2) + bytes(40), MalformedError),
    "all there is": (lambda p: b"\xff" * 48, MalformedError),
    "message over the limit": (lambda p: p.frame(1, bytes(65537)), MalformedError),
    "unknown kind": (lambda p: p.frame(9, bytes(8)), MalformedError),
    "window": (lambda p: p.frame(3, offset=16384), MalformedError),
    "outside of the slot": (lambda p: p.frame(2, bytes(64), offset=16384 - 63), ProtocolError),
    "in clear": (
        lambda p: (head := struct.pack("<IB3xQIIQ", 64, 2, 0, 0, 0, 0))
        + struct.pack("<Q", core.siphash24(p.key[:16], head + bytes(8))) + bytes(72), AuthenticationError),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_not_the_next_frame_ends_the_link(tcp: None, name: str) -> None:
    with attacked(Peer, SPEC, SMALL) as (peer, want):
        attack, error = ATTACKS[name]
        peer.sock.sendall(attack(peer))
        with pytest.raises(error):
            want.wait(WAIT_S)


# --- keys over a long time


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("libcrypto", ["", "none"])
def test_nonces_and_keys_over_many_frames(tmp_path: Path, libcrypto: str) -> None:
    """A key is replaced after its frames, by one that is derived from it; no pair of key and nonce comes twice. With
    OpenSSL, where the system has it, and without."""
    program = tmp_path / "seal"
    folder = ROOT / "csrc" / "transport"
    sources = [ROOT / "tests" / "cpp" / "seal.cpp", folder / "seal.cpp", folder / "system_gcm.cpp"]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-DHETKV_WITH_SODIUM", f"-I{ROOT / 'csrc'}"]
    made = subprocess.run(
        ["g++", *flags, *map(str, sources), "-lsodium", "-ldl", "-o", str(program)], capture_output=True
    )
    if b"sodium.h" in made.stderr:
        pytest.skip("needs libsodium's headers")
    assert made.returncode == 0, made.stderr.decode()
    for code, (name, make) in enumerate(CIPHERS.items(), start=1):
        if name not in core.ciphers():
            continue
        command, environment = [str(program), str(code)], {**os.environ, "HETKV_LIBCRYPTO": libcrypto}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        lines = done.stdout.splitlines()
        assert len(lines) == 10
        key, used = bytes(range(32)), set()
        for place, line in enumerate(lines):
            if place and place % 3 == 0:
                key = hmac.digest(key, b"hetkv next stream key", "sha256")
            nonce = bytes(4) + struct.pack("<Q", place)
            used.add((key, nonce))
            plain = make(key).decrypt(nonce, bytes.fromhex(line), b"head")
            assert plain == bytes([place]) * (100 + place)
        assert len(used) == 10


def test_both_libraries_make_the_same_frames(tcp: None) -> None:
    """A sender with OpenSSL and a receiver without, and the other way."""
    if "aes-256-gcm" not in core.ciphers():
        pytest.skip("this CPU has no instructions for AES")
    for mine, theirs in (("", "none"), ("none", "")):
        program = "from tests.transport.test_encryption import serve; serve()"
        environment = {**os.environ, "HETKV_LIBCRYPTO": theirs, "HETKV_SOCKET_DIR": "none"}
        here = {**os.environ, "HETKV_LIBCRYPTO": mine, "HETKV_SOCKET_DIR": "none"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, **pipes) as other:
            assert other.stdout is not None
            address = other.stdout.readline().strip()
            call = f"from tests.transport.test_encryption import call; call({address!r})"
            subprocess.run([sys.executable, "-c", call], cwd=ROOT, env=here, check=True, timeout=60)
            other.communicate("\n", timeout=30)
            assert other.returncode == 0


def serve() -> None:
    """A receiver that wants one request, in a process of its own; prints its address."""
    pool = randomise(KVPool.allocate(SPEC, 16), 2)
    with Receiver(pool, secret=SECRET, instance="d", config=SMALL) as receiver:
        print(receiver.listen(), flush=True)
        until(lambda: bool(receiver.peers), seconds=60)
        receiver.receive("r", list(range(16)), 256).wait(WAIT_S)
        assert receiver.peers[0].cipher == "aes-256-gcm"
        assert same_bytes(pool, randomise(KVPool.allocate(SPEC, 16), 1))
        input()


def call(address: str) -> None:
    """Its sender."""
    with Sender(randomise(KVPool.allocate(SPEC, 16), 1), secret=SECRET, instance="p", config=SMALL) as sender:
        sender.connect(address)
        handle = sender.send("r", list(range(16)), 256)
        handle.send_layers()
        handle.wait(WAIT_S)
