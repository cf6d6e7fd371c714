"""A request under way: `Handle`, with its name on the wire, its futures and their helpers."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import Future, InvalidStateError
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from hetkv.control.reactor import call
from hetkv.errors import HetkvError, InputError, WaitTimeoutError, from_code
from hetkv.transport.telemetry import begin

if TYPE_CHECKING:
    import hetkv._core as _core

RequestId = uuid.UUID | bytes | str
making = threading.Lock()


def request_key(request_id: RequestId) -> bytes:
    """The 16 bytes that name a request on the wire: of a UUID, as given, or the hash of a router's transfer id."""
    key = b""
    if isinstance(request_id, uuid.UUID):
        key = request_id.bytes
    elif isinstance(request_id, str) and request_id:
        key = blake2b(request_id.encode(errors="surrogatepass"), digest_size=16).digest()
    elif isinstance(request_id, (bytes, bytearray, memoryview)):
        key = bytes(request_id)
    if len(key) != 16 or not any(key):
        raise InputError(
            f"request id {request_id!r} must be a UUID, text that is not empty, or 16 bytes that are not all zero"
        )
    return key


class Handle:
    """A request under way. `wait`, `await` and `future` tell its end; they raise the typed error of a failure.

    Giving up waiting is not giving up the request: a `wait` that times out and an `await` that is cancelled leave it
    under way and its futures as they are. `abort` ends it.

    `wait` and `done` read what the engine keeps of the request, and no other thread of Python's runs for them. Futures,
    which a thread of the node resolves, exist once they are asked for.
    """

    def __init__(self, request_id: RequestId, node: Any, outcome: _core.Outcome) -> None:
        self.request_id = request_id
        self.handle: int = outcome.handle
        self.outcome = outcome
        self._node = node
        self._future: Future[None] | None = None
        self._error: HetkvError | None = None
        self._finish = begin(type(self).__name__, request_id)
        if self._finish is not None:
            self.watch("end")

    def __repr__(self) -> str:
        if not self.done():
            state = "under way"
        else:
            error = self.error
            state = "complete" if error is None else f"{type(error).__name__}: {error}"
        return f"{type(self).__name__}({self.request_id!r}, {state})"

    @property
    def future(self) -> Future[None]:
        """Done when the request is complete on all its routes. It cannot be cancelled: see `abort`."""
        if self._future is None:
            with making:
                if self._future is None:
                    self._future = running()
            self.watch("end")
        if self.done():
            settle(self._future, self.error)
        return self._future

    @property
    def error(self) -> HetkvError | None:
        """Why the request failed; `None` where it has not."""
        if self._error is None:
            failure = self.outcome.failure
            if failure is not None:
                self._error = from_code(*failure)
        return self._error

    def wait(self, timeout: float | None = None) -> None:
        """Block until the request is complete. Raises its `HetkvError`; `WaitTimeoutError` after `timeout` seconds."""
        self.check_end(in_time(self.outcome.wait, timeout), timeout)

    def done(self) -> bool:
        """Whether the request has ended, well or not."""
        return self.outcome.ended

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.wrap_future(self.future).__await__()

    def abort(self, reason: str = "aborted by the caller") -> None:
        """Give the request up on both sides. `future` fails once this side no longer touches its blocks."""
        self._node.engine.abort(self.handle, reason.encode(errors="replace").decode())

    def check_end(self, in_time: bool, timeout: float | None) -> None:
        """Raise the error of a wait that was not in time, or of a request that has failed."""
        if not in_time:
            raise timed_out(timeout)
        error = self.error
        if error is not None:
            raise error

    def watch(self, what: _core._Watch) -> None:
        """Have `on_event` called for what happens from now on, and for an end that has happened."""
        self._node.requests.watch(self, what)

    def on_event(self, kind: _core._EventKind, layer: int) -> None:
        """Take an event of the engine; called in the dispatching thread. An end may come twice."""
        if kind not in ("complete", "failed"):
            return
        with making:
            finish, self._finish = self._finish, None
        if finish is not None:
            call(finish, self.error)
        if self._future is not None:
            settle(self._future, self.error)


class Ending(Future[None]):
    """A future that logs what a callback raises, also `SystemExit`, and runs the next one."""

    def add_done_callback(self, fn: Callable[[Future[None]], object]) -> None:
        super().add_done_callback(lambda future: call(fn, future))


def running() -> Future[None]:
    """A future that its holders cannot cancel, so that it always tells how the request ended."""
    future = Ending()
    future.set_running_or_notify_cancel()
    return future


def settle(future: Future[None], error: HetkvError | None = None) -> None:
    """Resolve a future; one that is resolved stays as it is."""
    if future.done():
        return
    try:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
    except InvalidStateError:
        pass  # another thread was first


def in_time(wait: Callable[..., bool], *arguments: Any) -> bool:
    """What a wait of the engine's says; its last argument is a timeout. Raises `InputError` for one that is none."""
    try:
        return wait(*arguments)
    except TypeError:
        raise InputError(f"a timeout is a number of seconds or None, not {arguments[-1]!r}") from None


def timed_out(timeout: float | None) -> WaitTimeoutError:
    """The error of a wait that gave up."""
    return WaitTimeoutError(f"not complete within {timeout or 0:g} s; the request goes on")
