"""`Requests`: a node's handles, as long as they may be asked for, or their futures waited for."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hetkv.control.reactor import call
from hetkv.transport.handle import Handle

if TYPE_CHECKING:
    import hetkv._core as _core

P = TypeVar("P", bound=Handle)
log = logging.getLogger("hetkv.transport")
MOST_UNASKED = 1 << 12
"""Ended requests that are kept for the first `poll`; once it has been called, all are."""


class Requests(Generic[P]):
    """What the engine keeps by number, by handle. Any thread."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._unpolled: dict[int, P] = {}
        """Requests that no `poll` has returned."""
        self._watched: dict[int, P] = {}
        """Requests that have futures, until their ends."""
        self._finished: deque[P] = deque(maxlen=MOST_UNASKED)
        self._polled, self._dropped, self._reap_at = False, 0, MOST_UNASKED

    def add(self, make: Callable[[], P]) -> P:
        """Register what `make` starts, before `poll` can find it."""
        with self._lock:
            if len(self._unpolled) >= self._reap_at and not self._polled:
                self._reap()
            made = make()
            self._unpolled[made.handle] = made
            return made

    def poll(self) -> list[P]:
        """See `Node.poll`."""
        ended = self._engine.take_ended()
        if self._polled and not ended:
            return []
        with self._lock:
            found = [*self._finished, *(self._unpolled.pop(handle) for handle in ended)]
            self._finished.clear()
            self._polled, dropped, self._dropped = True, self._dropped, 0
        if dropped:
            log.warning("%d requests that ended before the first poll are not returned", dropped)
        return found

    def _reap(self) -> None:
        """Let go of what ended, where no one polls. Under the lock."""
        for handle in self._engine.take_ended():
            self._dropped += len(self._finished) == MOST_UNASKED
            self._finished.append(self._unpolled.pop(handle))
        self._reap_at = len(self._unpolled) + MOST_UNASKED

    def watch(self, handle: P, what: _core._Watch) -> None:
        """Have `handle.on_event` called for `what`, and for its end, also where that has happened."""
        self._watched[handle.handle] = handle
        handle.outcome.watch(what)
        self._report_end(handle)

    def _report_end(self, handle: P) -> None:
        if handle.done() and self._watched.pop(handle.handle, None) is not None:
            handle.on_event("complete" if handle.error is None else "failed", -1)

    def dispatch(self, kind: _core._EventKind, number: int, layer: int) -> None:
        """An event of the engine's about a request; called in the dispatching thread."""
        ended = kind in ("complete", "failed")
        watched = self._watched.pop(number, None) if ended else self._watched.get(number)
        if watched is not None:
            call(watched.on_event, kind, layer)

    def end(self) -> None:
        """The engine has ended, and may not have had an event for each."""
        for watched in [*self._watched.values()]:
            self._report_end(watched)

    @property
    def watched(self) -> int:
        """Requests that wait for an event."""
        return len(self._watched)
