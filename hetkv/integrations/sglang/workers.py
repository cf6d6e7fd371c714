"""Threads for what may block on a peer: `Workers`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

_log = logging.getLogger(__name__)
THREADS, MOST = 4, 64


class Workers:
    """At most `THREADS` threads and `MOST` tasks, of which there is one at a time for each key. Any thread."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(THREADS, name)
        self._keys: set[Hashable] = set()
        self._lock = threading.Lock()

    def run(self, key: Hashable, task: Callable[[], None]) -> None:
        """Begin a task; nothing happens where its key is under way. One beyond `MOST` is dropped with a warning."""
        with self._lock:
            if key in self._keys:
                return
            if len(self._keys) >= MOST:
                _log.warning("%s is dropped: %d others are under way", key, MOST)
                return
            self._keys.add(key)
        try:
            self._pool.submit(self._work, key, task)
        except BaseException:
            self._end(key)
            raise

    def close(self) -> None:
        """Begin nothing any more; what runs goes on to its end."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, key: Hashable, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception:
            _log.exception("%s", key)
        finally:
            self._end(key)

    def _end(self, key: Hashable) -> None:
        with self._lock:
            self._keys.discard(key)
