"""Closing a control connection on which something waits to be sent."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

import hetkv.control.connection
from hetkv.control.description import Ready
from hetkv.control.payloads import Notice
from hetkv.control.reactor import Steps, shared
from hetkv.errors import AuthenticationError, ControlError, PeerLostError
from tests.control.peers import linked, loss_of


def test_a_peer_that_reads_slowly_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message leaves in time, but there are hundreds."""
    monkeypatch.setattr(hetkv.control.connection, "CLOSING_S", 0.5)
    over = threading.Event()
    with linked() as (mine, theirs):
        shared().stop(theirs._reader)

        def read_slowly() -> None:
            while not over.wait(0.05):
                with contextlib.suppress(BlockingIOError):
                    theirs._channel._sock.recv(1 << 18)

        thread = threading.Thread(target=read_slowly)
        thread.start()
        mine._sending.acquire()  # as a `send` has it
        for _ in range(600):
            mine.post(Notice(bytes(65536)))
        threading.Timer(0.2, mine._sending.release).start()
        start = time.monotonic()
        mine.close()
        assert time.monotonic() - start < 3
        over.set()
        thread.join()


def test_closed_in_the_reactors_thread_while_another_one_sends() -> None:
    """As an `on_lost` callback does: the descriptor is given back once the sending thread has been woken."""
    with linked() as (mine, theirs):
        shared().stop(theirs._reader)
        errors: list[ControlError] = []

        def send() -> None:
            try:
                while True:
                    mine.send(Ready())
            except ControlError as error:
                errors.append(error)

        def close() -> Steps[None]:
            mine.close()
            yield from ()

        thread = threading.Thread(target=send)
        thread.start()
        time.sleep(0.5)  # the sockets are full
        closed = shared().start(close(), lambda *_: None)
        assert closed.ended.wait(5)
        thread.join(5)
        assert len(errors) == 1
        assert mine._channel._sock.fileno() == -1


@pytest.mark.parametrize("how", ["send", "post"])
def test_any_failure_to_write_ends_the_connection(how: str) -> None:
    """Also OpenSSL's: what was cut short leaves a stream that nobody can read on."""
    with linked() as (mine, theirs):

        def fail(*_: object) -> Steps[None]:
            raise AuthenticationError("TLS failed")
            yield

        mine._records.write = fail
        if how == "send":
            with pytest.raises(AuthenticationError, match="TLS failed"):
                mine.send(Ready())
        else:
            mine.post(Notice(b""))
        assert str(loss_of(mine)) == "TLS failed"
        assert isinstance(loss_of(theirs), PeerLostError)
