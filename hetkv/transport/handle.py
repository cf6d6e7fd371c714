"""A request under way: `Handle`, with its name on the wire, its futures and their helpers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from hashlib import blake2b
from typing import Any

from hetkv.control.reactor import call
from hetkv.errors import HetkvError, InputError, WaitTimeoutError
from hetkv.transport.telemetry import begin

RequestId = uuid.UUID | bytes | str
COMPLETE, FAILED = 2, 4


def request_key(request_id: RequestId) -> bytes:
    """The 16 bytes that name a request on the wire: of a UUID, as given, or the hash of a router's transfer id."""
    key = b""
    if isinstance(request_id, uuid.UUID):
        key = request_id.bytes
    elif isinstance(request_id, str):
        key = blake2b(request_id.encode(errors="surrogatepass"), digest_size=16).digest()
    elif isinstance(request_id, (bytes, bytearray, memoryview)):
        key = bytes(request_id)
    if len(key) != 16 or not any(key):
        raise InputError(f"request id {request_id!r} must be text, a UUID, or 16 bytes that are not all zero")
    return key


class Handle:
    """A request under way. `wait`, `await` and `future` tell its end; they raise the typed error of a failure.

    Giving up waiting is not giving up the request: a `wait` that times out and an `await` that is cancelled leave it
    under way and its futures as they are. `abort` ends it.
    """

    def __init__(self, request_id: RequestId, engine: Any, handle: int) -> None:
        self.request_id = request_id
        self.handle = handle
        self.key = request_key(request_id)
        self.future = running()
        """Done when the request is complete on all its routes. It cannot be cancelled: see `abort`."""
        self._engine = engine
        self._finish = begin(type(self).__name__, {"hetkv.request": str(request_id)})

    def __repr__(self) -> str:
        if not self.done():
            state = "under way"
        else:
            error = self.future.exception()
            state = "complete" if error is None else f"{type(error).__name__}: {error}"
        return f"{type(self).__name__}({self.request_id!r}, {state})"

    def wait(self, timeout: float | None = None) -> None:
        """Block until the request is complete. Raises its `HetkvError`; `WaitTimeoutError` after `timeout` seconds."""
        wait_for(self.future, timeout)

    def done(self) -> bool:
        """Whether the request has ended, well or not."""
        return self.future.done()

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.wrap_future(self.future).__await__()

    def abort(self, reason: str = "aborted by the caller") -> None:
        """Give the request up on both sides. `future` fails once nothing of this side touches its blocks any more."""
        self._engine.abort(self.handle, reason.encode(errors="replace").decode())

    def on_event(self, kind: int, layer: int, error: HetkvError | None) -> None:
        """Take an event of the engine; called in the dispatching thread."""
        if kind not in (COMPLETE, FAILED):
            return
        if self._finish is not None:
            call(self._finish, error)
        settle(self.future, error)


class Ending(Future[None]):
    """A future whose callbacks harm nobody: what one raises, also `SystemExit`, is logged, and the next one runs."""

    def add_done_callback(self, fn: Callable[[Future[None]], object]) -> None:
        super().add_done_callback(lambda future: call(fn, future))


def running() -> Future[None]:
    """A future that its holders cannot cancel, so that it always tells how the request ended."""
    future = Ending()
    future.set_running_or_notify_cancel()
    return future


def settle(future: Future[None], error: HetkvError | None = None) -> None:
    """Resolve a future; one that is resolved stays as it is. Only the dispatching thread calls this."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def wait_for(future: Future[None], timeout: float | None) -> None:
    """`future.result` with hetkv's timeout error."""
    if not wait([future], timeout).done:
        raise WaitTimeoutError(f"not complete within {timeout:g} s; the request goes on")
    future.result()
