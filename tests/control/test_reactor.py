"""Tasks of the reactor that end while others begin."""

from __future__ import annotations

import select
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from hetkv.control.reactor import Reactor, Steps, Wait


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns in between nearly all steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def reading(end: socket.socket) -> Steps[None]:
    while True:
        yield Wait(end.fileno(), select.POLLIN, None)


def test_a_stop_does_not_wait_for_what_begins_meanwhile(often: None) -> None:
    """A node's events came no more while a link was made just when the process's last one had been lost."""
    reactor = Reactor()
    for _ in range(150):
        one, _, other, _ = ends = (*socket.socketpair(), *socket.socketpair())
        first = reactor.start(reading(one), lambda *_: None)
        stops = threading.Thread(target=reactor.stop, args=(first,), daemon=True)
        stops.start()
        second = reactor.start(reading(other), lambda *_: None)
        stops.join(20)
        assert not stops.is_alive()
        reactor.stop(second)
        for end in ends:
            end.close()
    reactor.end()
    assert not any(thread.name == "hetkv-control" and thread is reactor._last for thread in threading.enumerate())
