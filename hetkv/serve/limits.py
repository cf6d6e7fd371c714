"""Who may ask for how much: `Limits`, before everything else of the HTTP side."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import msgspec

from hetkv.errors import ApiError
from hetkv.serve.errors import body_of

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
RETRY_AFTER_S = 1
MOST_DROPPED, DROP_S = 256 << 20, 5.0
"""Of a body that is not taken: bytes that are read all the same, and seconds to wait for more of it."""


class Limits:
    """ASGI middleware: API keys, size of the body, and requests at a time for all paths under `/v1/` that take a body.

    `closing` rejects new requests, while those that are here go on.
    """

    def __init__(self, app: Any, api_keys: tuple[str, ...], max_body: int, max_requests: int) -> None:
        self.app, self._keys, self._max_body, self._max_requests = app, api_keys, max_body, max_requests
        self.under_way = 0
        self.rejected = 0
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await self._reject(error, receive, send)
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        self.under_way += 1
        try:
            await self.app(scope, self._bounded(receive), send)
        finally:
            self.under_way -= 1

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._keys and not scope["path"].startswith(("/health", "/metrics", "/ui")):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not any(hmac.compare_digest(given, key.encode()) for key in self._keys):
                raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")
        if scope["method"] != "POST":
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_large()
        if self.closing:
            raise ApiError(503, "the server is ending", code="shutting_down")
        if self.under_way >= self._max_requests:
            self.rejected += 1
            raise ApiError(429, f"{self._max_requests} requests are under way, which is the most", code="overloaded")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body} bytes", code="request_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """A body without a length is counted as it comes."""
        got = 0

        async def bounded() -> dict[str, Any]:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._max_body:
                raise self._too_large()
            return message

        return bounded

    @staticmethod
    async def _reject(error: ApiError, receive: Receive, send: Send) -> None:
        """Answer with an error. A body is read and dropped: a client that still writes would not read the answer."""
        dropped, more = 0, True
        with suppress(asyncio.TimeoutError):
            while more and dropped < MOST_DROPPED:
                message = await asyncio.wait_for(receive(), DROP_S)
                dropped += len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)
        await answer_error(error, send)


async def answer_error(error: ApiError, send: Send) -> None:
    """An error as a response of ASGI."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if error.status in (429, 503):
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(body_of(error))})
