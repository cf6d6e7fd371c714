"""Instances and their scheduler: registering, a successor of the scheduler, strangers, and broken messages."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hetkv.control.secret import HeldSecret
from hetkv.control.tls import Tls, TlsConfig
from hetkv.errors import (
    AuthenticationError,
    CertificateError,
    HandshakeError,
    MessageError,
    PeerLostError,
    SecretError,
)
from hetkv.runtime.batching import Limits
from hetkv.runtime.plan import InstancePlan, SideOptions
from hetkv.runtime.sampling import Sampling
from hetkv.serve.gate import Gate
from hetkv.serve.generation import Generation
from hetkv.serve.instance import Connection, Instance, InstanceConfig
from hetkv.serve.messages import Beat, Goodbye, Welcome
from hetkv.serve.scheduler import Scheduler
from hetkv.serve.tls_stream import TlsStream
from hetkv.serve.wire import LENGTH, MAC_BYTES, Seal, greeting
from tests.control.authority import Authority
from tests.runtime.instances import reference


def config(role: str, model: Path, gate: str, secret: Path) -> InstanceConfig:
    return InstanceConfig(
        plan=InstancePlan(name=role, role=role, pool=SideOptions(block_size=16, layout="nhd", dtype="float32")),
        model=str(model), scheduler=gate, limits=Limits(16, 128), kv_tokens=2048, secret_file=str(secret),
    )  # fmt: skip


@asynccontextmanager
async def opened(
    secret: bytes | HeldSecret, address: str = "127.0.0.1:0", tls: Tls | None = None
) -> AsyncIterator[tuple[Scheduler, str]]:
    """A scheduler and its gate."""
    scheduler = Scheduler()
    gate = Gate(scheduler, secret, tls=tls)
    await gate.open(address)
    try:
        yield scheduler, gate.address
    finally:
        await gate.close()


async def until(done: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.touch(0o600)
    file.write_text(secrets.token_hex(16))
    return file


def test_instances_register_again_with_a_successor(checkpoint: tuple[Path, Any], secret: Path) -> None:
    """The scheduler goes while they compute: they give that up, and serve its successor; then they leave in order."""
    prompt = list(range(5, 60))
    expected = reference(checkpoint[1], prompt, 10)
    code: dict[str, int] = {}

    async def complete(scheduler: Scheduler, tokens: int) -> list[int]:
        generation = Generation(prompt, Sampling(max_tokens=tokens, ignore_eos=True))
        scheduler.submit(generation)
        return [token.id async for token, _ in generation]

    async def run() -> None:
        async with opened(secret.read_bytes()) as (first, address):
            instances = [Instance(config(role, checkpoint[0], address, secret)) for role in ("prefill", "decode")]
            threads = [threading.Thread(target=lambda one=one: code.update({one.name: one.run()})) for one in instances]
            for thread in threads:
                thread.start()
            await until(lambda: sum(member.up for member in first.members.values()) == 2)
            assert await complete(first, 10) == expected
            lost = asyncio.create_task(complete(first, 500))
            await until(lambda: any(len(g.generated) > 5 for g in first.generations.values()))
        lost.cancel()
        async with opened(secret.read_bytes(), address) as (second, _):
            await until(lambda: sum(member.up for member in second.members.values()) == 2)
            assert set(second.members) == {instance.name for instance in instances}
            assert await complete(second, 10) == expected
            await until(lambda: all(m.kv.available == m.kv.total for m in second.members.values()))
            for instance in instances:
                instance.leave()
            await until(lambda: not second.members)
            await until(lambda: not any(thread.is_alive() for thread in threads))

    asyncio.run(run())
    assert set(code.values()) == {0}


def test_a_rejected_instance_ends(checkpoint: tuple[Path, Any], secret: Path) -> None:
    async def run() -> None:
        async with opened(secret.read_bytes()) as (scheduler, address):
            scheduler._against = lambda hello: "not today"  # type: ignore[method-assign]
            instance = Instance(config("decode", checkpoint[0], address, secret))
            assert await asyncio.to_thread(instance.run) == 1
            assert scheduler.rejected == {instance.name: "not today"}

    asyncio.run(run())


def test_an_instance_without_the_secret_ends(
    checkpoint: tuple[Path, Any], secret: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with opened(b"another one of sixteen") as (scheduler, address):
            instance = Instance(config("decode", checkpoint[0], address, secret))
            assert await asyncio.to_thread(instance.run) == 1
            assert not scheduler.members

    asyncio.run(run())
    assert "scheduler and instance do not have the same secret" in caplog.text


def test_the_gate_takes_the_secret_before() -> None:
    async def run() -> None:
        held = HeldSecret(b"the secret before this")
        held.rotate(b"the secret from now on", 60)
        async with opened(held) as (_, address):
            for secret in held.accepted():
                (await asyncio.to_thread(Connection, address, secret)).close()
            with pytest.raises(SecretError):
                await asyncio.to_thread(Connection, address, b"another one of sixteen")

    asyncio.run(run())


def wrong_certificates(ca: Authority, folder: Path) -> dict[str, TlsConfig]:
    """By the reason for which a gate that knows of the revoked one rejects them."""
    revoked = ca.issue("revoked", "127.0.0.1")
    ca.revoke(revoked)
    return {
        "unknown-ca": Authority(folder / "stranger").issue("stranger", "127.0.0.1", ca=ca.file),
        "expired": ca.issue("expired", "127.0.0.1", begins=-3, ends=-2),
        "revoked": revoked,
        "identity": ca.issue("other", "spiffe://elsewhere/a"),
    }


def test_the_gate_inside_tls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only certificates that are as they should be are let in; the gate's log and the instance say why not."""
    ca, secret = Authority(tmp_path / "ca"), b"a secret of sixteen"
    wrong = wrong_certificates(ca, tmp_path)
    mine = ca.issue("gate", "127.0.0.1", crl=ca.crl(), peers=("127.0.0.1", "spiffe://cluster/*"))
    good = ca.issue("good", "spiffe://cluster/decode/0")
    said = {
        "unknown-ca": "not of an authority that this side trusts", "expired": "has expired", "revoked": "was revoked",
        "identity": "which is not on this side's list of peers",
    }  # fmt: skip

    def attempt(address: str, side: TlsConfig | None) -> Connection:
        return Connection(address, secret, Tls(side) if side is not None else None)

    async def rejected(address: str, side: TlsConfig | None) -> tuple[str, bool]:
        with pytest.raises(CertificateError) as found:
            await asyncio.to_thread(attempt, address, side)
        return found.value.reason, found.value.own

    async def run() -> None:
        async with opened(secret, tls=Tls(mine)) as (scheduler, address):
            for reason, side in wrong.items():
                assert await rejected(address, side) == (reason, True)
                await until(lambda reason=reason: said[reason] in caplog.text, 10)
            assert await rejected(address, None) == ("missing", True)
            (await asyncio.to_thread(attempt, address, good)).close()
            assert not scheduler.members
        for reason, side in wrong.items():
            if reason != "identity":
                knowing = ca.issue("knowing", "127.0.0.1", crl=ca.crl())
                async with opened(secret, tls=Tls(side)) as (_, address):
                    assert await rejected(address, knowing) == (reason, False)
        async with opened(secret, tls=Tls(ca.issue("impostor", "elsewhere.example"))) as (_, address):
            assert await rejected(address, good) == ("host", False)
        async with opened(secret) as (_, address):
            with pytest.raises(AuthenticationError, match="does not speak it"):
                await asyncio.to_thread(attempt, address, good)

    with caplog.at_level("WARNING", "hetkv.serve.gate"):
        asyncio.run(run())


@pytest.mark.parametrize("reason", ["unknown-ca", "expired", "revoked", "identity", "missing"])
def test_an_instance_whose_certificate_is_rejected_ends(
    checkpoint: tuple[Path, Any],
    secret: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    """At the first attempt: no later one would end otherwise."""
    ca, attempts = Authority(tmp_path / "ca"), []
    side = wrong_certificates(ca, tmp_path).get(reason)
    mine = ca.issue("gate", "127.0.0.1", crl=ca.crl(), peers=("127.0.0.1",))
    serve = Instance._serve

    def counted(instance: Instance) -> None:
        attempts.append(instance)
        serve(instance)

    monkeypatch.setattr(Instance, "_serve", counted)

    async def run() -> None:
        async with opened(secret.read_bytes(), tls=Tls(mine)) as (scheduler, address):
            instance = Instance(msgspec.structs.replace(config("decode", checkpoint[0], address, secret), tls=side))
            assert await asyncio.to_thread(instance.run) == 1
            assert not scheduler.members

    asyncio.run(run())
    assert len(attempts) == 1
    assert "TLS: " in caplog.text


def test_a_gate_that_ends_a_tls_handshake_is_tried_again(tmp_path: Path) -> None:
    """A busy scheduler does, and one that ends: no instance may end with it."""
    mine = Tls(Authority(tmp_path / "ca").issue("instance", "127.0.0.1"))

    def end(listening: socket.socket) -> None:
        sock, _ = listening.accept()
        with sock:
            sock.recv(1 << 16)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1 << 16)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=end, args=(listening,))
        thread.start()
        try:
            with pytest.raises(PeerLostError, match="connection closed"):
                Connection(f"127.0.0.1:{listening.getsockname()[1]}", b"a secret of sixteen", mine)
        finally:
            thread.join()


def test_a_connection_that_is_closed_does_not_leave_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that send meanwhile would send in clear."""
    ca, secret, versions = Authority(tmp_path / "ca"), b"a secret of sixteen", []
    shutdown = socket.socket.shutdown

    def watched(sock: socket.socket, how: int) -> None:
        if isinstance(sock, ssl.SSLSocket):
            versions.append(sock.version())
        shutdown(sock, how)

    async def run() -> None:
        async with opened(secret, tls=Tls(ca.issue("gate", "127.0.0.1"))) as (_, address):
            side = Tls(ca.issue("instance", "127.0.0.1"))
            connection = await asyncio.to_thread(Connection, address, secret, side)
            monkeypatch.setattr(socket.socket, "shutdown", watched, raising=False)
            connection.close()

    asyncio.run(run())
    assert versions == ["TLSv1.3"]


def test_a_write_after_tls_has_failed_raises_nothing(tmp_path: Path) -> None:
    """It is of another connection's task, which would end with it."""
    ca, found = Authority(tmp_path / "ca"), []

    def break_off(address: tuple[str, int], context: ssl.SSLContext) -> None:
        with context.wrap_socket(socket.create_connection(address), server_hostname="127.0.0.1") as sock:
            socket.socket.sendall(sock, b"\x17\x03\x03\x00\x40" + bytes(64))  # a record that no key has sealed
            sock.recv(1)

    async def run() -> None:
        server = Tls(ca.issue("gate", "127.0.0.1")).credentials().server
        client = Tls(ca.issue("instance", "127.0.0.1")).credentials().client
        over = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = TlsStream(reader, writer, server, "an instance")
            await stream.handshake()
            try:
                await stream.readexactly(1)
            except AuthenticationError as error:
                found.append(error)
            try:
                stream.write(b"a message for it")
                found.append(stream.is_closing())
            finally:
                over.set()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        address = listening.sockets[0].getsockname()
        with pytest.raises(OSError):
            await asyncio.to_thread(break_off, address, client)
        await over.wait()
        listening.close()

    asyncio.run(run())
    assert isinstance(found[0], AuthenticationError)
    assert found[1:] == [True]


def test_a_stranger_is_not_let_in() -> None:
    async def run() -> None:
        async with opened(b"a secret of sixteen") as (scheduler, address):
            with pytest.raises(AuthenticationError, match="do not have the same secret"):
                await asyncio.to_thread(Connection, address, b"another one of sixteen")
            reader, writer = await asyncio.open_connection(*address.split(":"))
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(60))
            await reader.read()  # it closes
            writer.close()
            assert not scheduler.members

    asyncio.run(run())


def seals() -> tuple[Seal, Seal]:
    mine, theirs = greeting(secrets.token_bytes(32)), greeting(secrets.token_bytes(32))
    return Seal("instance", b"s" * 16, mine, theirs), Seal("scheduler", b"s" * 16, theirs, mine)


def test_messages_are_sealed() -> None:
    """In order, each direction with a key of its own, and nothing that is not a message of that direction."""
    instance, scheduler = seals()
    scheduler.check(instance.proof)
    instance.check(scheduler.proof)
    frames = [instance.close(Beat()), instance.close(Beat())]
    assert Seal.rest(frames[0][: LENGTH.size]) == len(frames[0]) - LENGTH.size
    assert scheduler.open(frames[0][LENGTH.size :]) == Beat()
    for wrong in (frames[0], frames[1][:-1] + bytes([frames[1][-1] ^ 1]), scheduler.close(Welcome())):
        with pytest.raises(AuthenticationError, match="wrong MAC"):
            scheduler.open(wrong[LENGTH.size :])
    assert scheduler.open(frames[1][LENGTH.size :]) == Beat()
    with pytest.raises(MessageError, match="malformed"):
        scheduler.open(instance.close(Goodbye())[LENGTH.size :])
    with pytest.raises(MessageError, match="over the limit"):
        Seal.rest(b"\xff" * LENGTH.size)
    assert MAC_BYTES == 16
    with pytest.raises(AuthenticationError, match="reflected"):
        Seal("instance", b"s" * 16, greeting(bytes(32)), greeting(bytes(32)))
    with pytest.raises(HandshakeError, match="it began with"):
        Seal("instance", b"s" * 16, greeting(bytes(32)), b"HTTP/1.1 400 Bad Request" + bytes(24))
