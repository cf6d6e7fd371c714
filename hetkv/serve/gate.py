"""Where instances register with the scheduler: `Gate`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from hetkv.control.address import Address
from hetkv.errors import AuthenticationError, HetkvError, InputError
from hetkv.runtime.commands import Report
from hetkv.serve.member import Member
from hetkv.serve.messages import Hello, Leaving, ToInstance, Trace
from hetkv.serve.scheduler import Scheduler
from hetkv.serve.wire import GREETING_BYTES, LENGTH, NONCE_BYTES, PROOF_BYTES, Seal, greeting

SILENCE_S = 10.0
"""An instance beats once a second; one that says nothing for so long is gone."""
HANDSHAKE_S = 5.0
log = logging.getLogger("hetkv.serve.gate")


class Gate:
    """Listens for instances, and is their voice in the scheduler. `on_trace` gets what their transports did."""

    def __init__(
        self, scheduler: Scheduler, secret: bytes, on_trace: Callable[[Member, Trace], None] = lambda m, t: None
    ) -> None:
        self.scheduler, self._secret, self._on_trace = scheduler, secret, on_trace
        self.address = ""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def open(self, address: str) -> None:
        """Listen at `host:port`; port 0 is any free one, see `address` then. Raises `InputError`."""
        host, port = Address.parse(address)
        try:
            self._server = await asyncio.start_server(self._serve, host or None, port)
        except OSError as error:
            raise InputError(f"cannot listen for instances at {address}: {error.strerror or error}") from None
        self.address = str(Address(host or "127.0.0.1", self._server.sockets[0].getsockname()[1]))
        log.info("gate for instances at %s", self.address)

    async def close(self) -> None:
        """End all connections."""
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = "{}:{}".format(*writer.get_extra_info("peername")[:2])
        self._writers.add(writer)
        member: Member | None = None
        reason = "it closed the connection"
        try:
            seal = await asyncio.wait_for(self._greet(reader, writer), HANDSHAKE_S)
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

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Seal:
        """Both sides prove that they have the secret, the instance first."""
        mine = greeting(secrets.token_bytes(NONCE_BYTES))
        writer.write(mine)
        seal = Seal("scheduler", self._secret, mine, await reader.readexactly(GREETING_BYTES))
        try:
            seal.check(await reader.readexactly(PROOF_BYTES))
        except AuthenticationError:
            writer.write(bytes(PROOF_BYTES))  # so that both sides report the same
            raise
        writer.write(seal.proof)
        return seal

    @staticmethod
    async def _read(reader: asyncio.StreamReader, seal: Seal) -> Any:
        return seal.open(await reader.readexactly(seal.rest(await reader.readexactly(LENGTH.size))))
