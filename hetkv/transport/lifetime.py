"""Nodes that are open in this process: what a fork and the interpreter's end mean for them."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Any

from hetkv.control import reactor
from hetkv.errors import TransportError

opened: weakref.WeakSet[Any] = weakref.WeakSet()
starting: set[Any] = set()
_forked = False


def check_process() -> None:
    """Raise `TransportError` in a child that was forked while a node was open."""
    if _forked:
        raise TransportError(
            "this process was forked from one with an open Sender or Receiver, whose UCX threads it lacks: "
            "start it with the spawn method"
        )


def _disown_in_child() -> None:
    """A forked child has neither the threads nor the right to say goodbye on its parent's sockets."""
    global _forked
    nodes = [*opened, *starting]
    _forked = _forked or bool(nodes)
    for node in nodes:
        node.disown()
    opened.clear()
    starting.clear()


os.register_at_fork(after_in_child=_disown_in_child)


@atexit.register
def _close_all() -> None:
    """Threads that outlive the interpreter would crash in it."""
    for node in list(opened):
        node.close()
    reactor.shared().end()
