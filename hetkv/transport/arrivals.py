"""`Arrivals`: which layers of a request have arrived; a future of a layer exists only once somebody asks for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future

from hetkv.errors import HetkvError
from hetkv.transport.handle import running, settle


class Arrivals(Mapping[int, "Future[None]"]):
    """Futures by global layer: done when that layer is verified and in the pool, or when the request has failed."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = layers
        self._arrived: set[int] = set()
        self._ended = False
        self._error: HetkvError | None = None
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
        with self._lock:
            future = self._futures.get(layer)
            if future is None:
                future = self._futures[layer] = running()
                if layer in self._arrived:
                    settle(future)
                elif self._ended:
                    settle(future, self._error)
            return future

    def arrive(self, layer: int) -> None:
        """The layer is there; called in the dispatching thread."""
        with self._lock:
            self._arrived.add(layer)
            future = self._futures.get(layer)
        if future is not None:
            settle(future)

    def end(self, error: HetkvError | None) -> None:
        """The request has ended; called in the dispatching thread."""
        with self._lock:
            self._ended, self._error = True, error
            futures = list(self._futures.values())
        for future in futures:
            settle(future, error)
