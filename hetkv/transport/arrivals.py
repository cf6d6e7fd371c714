"""`Arrivals`: which layers of a request have arrived; a future of a layer exists only once it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

from hetkv.transport.handle import Handle, running, settle


class Arrivals(Mapping[int, "Future[None]"]):
    """Futures by global layer: done when that layer is verified and in the pool, or when the request has failed."""

    def __init__(self, layers: Sequence[int], handle: Handle) -> None:
        self._layers = layers
        self._handle = handle
        self._watched = False
        self._futures: dict[int, Future[None]] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def __getitem__(self, layer: int) -> Future[None]:
        if layer not in self._layers:
            raise KeyError(layer)
        if not self._watched:
            self._handle.watch("layers")
            self._watched = True
        with self._lock:
            future = self._futures.setdefault(layer, running())
        self._look(layer, future)
        return future

    def arrive(self, layer: int) -> None:
        """The layer is there; called in the dispatching thread."""
        with self._lock:
            future = self._futures.get(layer)
        if future is not None:
            settle(future)

    def end(self) -> None:
        """The request has ended; called in the dispatching thread."""
        with self._lock:
            futures = list(self._futures.items())
        for layer, future in futures:
            self._look(layer, future)

    def _look(self, layer: int, future: Future[None]) -> None:
        outcome = self._handle.outcome
        if outcome.arrived(layer):
            settle(future)
        elif outcome.ended:
            settle(future, None if outcome.arrived(layer) else self._handle.error)
