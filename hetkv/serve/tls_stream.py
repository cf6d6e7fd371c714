"""TLS of the side that accepts, over asyncio's streams: `TlsStream`.

asyncio's own ends a connection whose handshake fails without sending the alert, so that the peer cannot know why, and
whether to try again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from hetkv.control.tls import names_of, tls_error
from hetkv.serve.wire import NEEDS_TLS

LINGER_S = 1.0
_PART = 1 << 16
_T = TypeVar("_T")


class TlsStream:
    """Reads and writes as asyncio's pair does, which it owns from its construction on."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, peer: str
    ) -> None:
        self._reader, self._writer, self._peer = reader, writer, peer
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._sent = False

    async def handshake(self) -> None:
        """Raises `AuthenticationError`, above all `CertificateError`, once the peer has had time to read the alert;
        `ConnectionError`, `IncompleteReadError`."""
        try:
            await self._until(self._tls.do_handshake)
        except ssl.SSLError as error:
            if not self._sent:  # OpenSSL has no alert for a peer that speaks in clear
                self._writer.write(NEEDS_TLS)
            await self._linger()
            raise tls_error(self._peer, error) from None

    def certificate(self) -> tuple[bytes, tuple[str, ...]]:
        """The peer's, in DER, and its names."""
        return self._tls.getpeercert(binary_form=True) or b"", names_of(self._tls.getpeercert())

    async def readexactly(self, count: int) -> bytes:
        """As a `StreamReader`'s; also raises `AuthenticationError` where TLS fails."""
        data = bytearray()
        try:
            while len(data) < count:
                part = await self._until(partial(self._tls.read, count - len(data)))
                if not part:
                    raise asyncio.IncompleteReadError(bytes(data), count)
                data += part
        except ssl.SSLError as error:
            raise tls_error(self._peer, error) from None
        return bytes(data)

    def write(self, data: bytes) -> None:
        """As a `StreamWriter`'s: never waits, and raises nothing where the connection has failed: who reads it learns
        that. A message for it may come from the task of another connection."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._tls.write(view) :]
        except ssl.SSLError:  # TLS has ended with an alert
            self._writer.close()
        else:
            self._writer.write(self._out.read())

    def is_closing(self) -> bool:
        """As a `StreamWriter`'s."""
        return self._writer.is_closing()

    def close(self) -> None:
        """As a `StreamWriter`'s."""
        self._writer.close()

    async def _until(self, operation: Callable[[], _T]) -> _T:
        """Try it until OpenSSL needs nothing from the peer. What it has for the peer, alerts too, is sent."""
        while True:
            try:
                return operation()
            except ssl.SSLWantReadError:
                pass
            finally:
                if self._out.pending and not self._writer.is_closing():
                    self._writer.write(self._out.read())
                    self._sent = True
            data = await self._reader.read(_PART)
            if not data:
                raise asyncio.IncompleteReadError(b"", None)
            self._in.write(data)

    async def _linger(self) -> None:
        """Discard what comes until the peer ends too, as unread bytes would reset the alert."""

        async def discard() -> None:
            while await self._reader.read(_PART):
                pass

        try:
            if self._writer.can_write_eof():
                self._writer.write_eof()
            await asyncio.wait_for(discard(), LINGER_S)
        except (OSError, TimeoutError, asyncio.TimeoutError):
            pass  # the peer has gone, or takes too long
