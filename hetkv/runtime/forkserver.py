"""How rank processes begin and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that a user or a terminal ends a command with."""


def forkserver_context() -> Any:
    """Ranks are forked from a server that has imported torch once and started no thread: it saves seconds a rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hetkv.runtime.worker", "hetkv.runtime.rank"])
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # the server and the ranks inherit it: see `hetkv.runtime.worker.serve`
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
    return context


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Defer signals that end the parent until the end of the block."""
    if threading.current_thread() is not threading.main_thread():  # their handlers do not run here
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in held:
        signal.raise_signal(late)


def end_with_parent() -> None:
    """Body of a thread: a rank must not outlive a parent that was killed, whatever it waits for."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
