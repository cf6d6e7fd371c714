"""Ctrl-C ends a command once: the processes that it started leave the signal to it, and it ends them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def ignore() -> None:
    """Ignore SIGINT in this process, for a worker whose parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def ignored_by_children() -> Iterator[None]:
    """Processes that are started inside this block ignore SIGINT from their first instruction on."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may change handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
