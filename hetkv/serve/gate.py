"""Where instances register with the scheduler: `Gate`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from hashlib import sha256
from typing import Any, TypeAlias

from hetkv.control.address import Address
from hetkv.control.listener import bind
from hetkv.control.secret import Secrets, as_secrets
from hetkv.control.tls import Credentials, Tls
from hetkv.errors import HetkvError, InputError, SecretError
from hetkv.runtime.commands import Report
from hetkv.serve.member import Member
from hetkv.serve.messages import Hello, Leaving, ToInstance, Trace
from hetkv.serve.scheduler import Scheduler
from hetkv.serve.tls_stream import TlsStream
from hetkv.serve.wire import (
    GREETING_BYTES,
    LENGTH,
    NAME_NOT_ALLOWED,
    NONCE_BYTES,
    PROOF_BYTES,
    WRONG_SECRET,
    Seal,
    greeting,
)

SILENCE_S = 10.0
"""An instance beats once a second; one that says nothing for so long is gone."""
HANDSHAKE_S = 5.0
BACK_OFF_S = 0.2
log = logging.getLogger("hetkv.serve.gate")
_Reader: TypeAlias = "asyncio.StreamReader | TlsStream"
_Writer: TypeAlias = "asyncio.StreamWriter | TlsStream"


class Gate:
    """Listens for instances, and is their voice in the scheduler. `on_trace` gets what their transports did."""

    def __init__(
        self,
        scheduler: Scheduler,
        secret: bytes | Secrets,
        on_trace: Callable[[Member, Trace], None] = lambda m, t: None,
        tls: Tls | None = None,
    ) -> None:
        self.scheduler, self._secrets, self._on_trace, self._tls = scheduler, as_secrets(secret), on_trace, tls
        self.address = ""
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[_Writer] = set()

    async def open(self, address: str) -> None:
        """Listen at `host:port`; port 0 is any free one, see `address` then. Raises `InputError`."""
        host, port = Address.parse(address)
        try:
            self._socket = bind(Address(host, port))
        except InputError as error:
            raise InputError(f"instances: {error}") from None
        self.address = str(Address(host or "127.0.0.1", self._socket.getsockname()[1]))
        self._begin(self._accept(self._socket))
        log.info("gate for instances at %s", self.address)

    async def close(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        """Each connection with the certificates as they are then."""
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listening)
            except OSError as error:
                log.error("%s: cannot accept: %s", self.address, error)
                await asyncio.sleep(BACK_OFF_S)
                continue
            self._begin(self._enter(sock))

    async def _enter(self, sock: socket.socket) -> None:
        peer = "an instance"
        credentials = self._tls.credentials() if self._tls is not None else None
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        loop = asyncio.get_running_loop()
        try:
            peer = "{}:{}".format(*sock.getpeername()[:2])
            transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
        except OSError as error:
            sock.close()
            log.warning("%s: %s", peer, error)
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        if credentials is None:
            await self._serve(reader, writer, None, peer)
        else:
            stream = TlsStream(reader, writer, credentials.server, peer)
            await self._serve(stream, stream, credentials, peer)

    async def _serve(self, reader: _Reader, writer: _Writer, credentials: Credentials | None, peer: str) -> None:
        self._writers.add(writer)
        member: Member | None = None
        reason = "it closed the connection"
        try:
            seal = await asyncio.wait_for(self._greet(reader, writer, credentials), HANDSHAKE_S)
            hello = await asyncio.wait_for(self._read(reader, seal), HANDSHAKE_S)
            if not isinstance(hello, Hello):
                raise InputError(f"an instance begins with Hello, not {type(hello).__name__}")

            def send(message: ToInstance) -> None:
                if not writer.is_closing():
                    writer.write(seal.close(message))

            member = Member(hello, send)
            self.scheduler.join(member)
            while True:
                message = await asyncio.wait_for(self._read(reader, seal), SILENCE_S)
                member.heard = time.monotonic()
                if isinstance(message, Report):
                    self.scheduler.on_report(member, message)
                    if message.error:
                        reason = message.error
                elif isinstance(message, Leaving):
                    self.scheduler.leave(member)
                elif isinstance(message, Trace):
                    self._on_trace(member, message)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except (TimeoutError, asyncio.TimeoutError):
            reason = f"it was silent for {SILENCE_S:g} s"
        except OSError as error:  # of the network
            reason = str(error)
        except HetkvError as error:
            reason = str(error)
            log.warning("%s: %s", peer, error)
        except asyncio.CancelledError:
            reason = "the scheduler ends"
        finally:
            self._writers.discard(writer)
            writer.close()
            if member is not None:
                self.scheduler.lost(member, reason)

    async def _greet(self, reader: _Reader, writer: _Writer, credentials: Credentials | None) -> Seal:
        """TLS where it is on; then both sides prove that they have a secret, the instance first."""
        certificates = b""
        if self._tls is not None and credentials is not None and isinstance(reader, TlsStream):
            await reader.handshake()
            certificate, names = reader.certificate()
            certificates = sha256(certificate).digest() + credentials.fingerprint
            rejection = self._tls.check("an instance", names)
            if rejection is not None:
                await reader.readexactly(GREETING_BYTES)  # closed before that, the answer could be lost
                writer.write(NAME_NOT_ALLOWED + bytes(NONCE_BYTES))
                raise rejection
        mine = greeting(secrets.token_bytes(NONCE_BYTES))
        writer.write(mine)
        theirs = await reader.readexactly(GREETING_BYTES)
        seals = [Seal("scheduler", secret, mine, theirs, certificates) for secret in self._secrets.accepted()]
        proof = await reader.readexactly(PROOF_BYTES)
        for seal in seals:
            if seal.fits(proof):
                writer.write(seal.proof)
                return seal
        writer.write(bytes(PROOF_BYTES))  # so that both sides report the same
        raise SecretError(WRONG_SECRET)

    @staticmethod
    async def _read(reader: _Reader, seal: Seal) -> Any:
        return seal.open(await reader.readexactly(seal.rest(await reader.readexactly(LENGTH.size))))
