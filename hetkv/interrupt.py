"""Ctrl-C ends a command once: the processes that it started leave the signal to it, and it ends them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started inside this block never get SIGINT; this one gets it when the block ends."""
    resource_tracker.ensure_running()  # multiprocessing would start it inside the block, and unblock SIGINT
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    main = threading.current_thread() is threading.main_thread()  # only it may change handlers
    # The mask is what children inherit; the handler is for this process, whose other threads take the signal.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, note) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGINT)
