"""Many peers and many strangers at one listener: all honest ones get in, and none costs a thread."""

from __future__ import annotations

import contextlib
import logging
import resource
import select
import socket
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from hetkv.control.connection import ControlConnection
from hetkv.control.description import encode
from hetkv.control.payloads import Ask, Later
from hetkv.control.reactor import Reactor, Steps, Wait, call, run, shared
from hetkv.errors import ControlTimeoutError, HetkvError, IncompatibleError, PeerLostError
from tests.control.peers import HELLO_BYTES, SECRET, Server, describe, join, linked, raw_client, serving


def join_at_once(server: Server, count: int) -> list[ControlConnection]:
    """`count` peers that connect at the same moment."""
    together = threading.Barrier(count)
    joined: list[ControlConnection] = []
    failed: list[Exception] = []

    def peer() -> None:
        together.wait()
        try:
            joined.append(join(server, timeout=20.0))
        except HetkvError as error:
            failed.append(error)

    threads = [threading.Thread(target=peer) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    return joined


@pytest.mark.parametrize(("peers", "room"), [(200, 512), (48, 2)])
def test_all_of_a_cluster_that_starts_at_once_get_in(peers: int, room: int) -> None:
    """Also where the listener ends most of their handshakes because it has no room: they try again."""
    with serving(max_handshakes=room, timeout=20.0) as server:
        joined = join_at_once(server, peers)
        accepted = [server.next() for _ in joined]
        assert sorted(c.link_id for c in joined) == sorted(c.link_id for c in accepted)
        for connection in (*joined, *accepted):
            connection.close()


def test_connections_cost_no_threads_and_no_processor_time() -> None:
    with serving() as server, contextlib.ExitStack() as stack:
        before = threading.active_count()
        for _ in range(64):
            stack.enter_context(join(server))
            stack.enter_context(server.next())
        assert threading.active_count() <= before + 1  # the last hand-over's thread
        start = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start < 0.006


def test_strangers_that_wait_are_bounded_and_do_not_hold_up_a_peer() -> None:
    limit = min(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
    with serving(timeout=60.0, max_handshakes=limit) as server, contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(raw_client(server.address)) for _ in range(4 * limit)]
        start = time.monotonic()
        with join(server), server.next():
            assert time.monotonic() - start < 2
        ended = 0
        for sock in strangers:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while data := sock.recv(4096):
                    assert len(data) == HELLO_BYTES
                ended += 1
        assert ended >= len(strangers) - limit


def test_a_peer_that_has_proved_itself_is_not_ended_for_strangers() -> None:
    """It is slow: its description comes after hundreds of strangers."""
    with serving(max_handshakes=2, timeout=20.0) as server:

        def slow() -> object:
            for _ in range(50):
                raw_client(server.address).close()
            time.sleep(0.2)
            return describe("sender")

        with join(server, describe=slow), server.next():
            pass


def test_the_same_complaint_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with serving(on_rejected=None) as server:
        for _ in range(20):
            with raw_client(server.address) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(HELLO_BYTES))
                with contextlib.suppress(ConnectionError):
                    while sock.recv(4096):
                        pass
        for _ in range(3):
            with pytest.raises(HetkvError):
                join(server, secret=bytes(20))
    lines = [record.getMessage() for record in caplog.records if "rejected" in record.getMessage()]
    assert len(lines) == 2, lines
    assert not any(SECRET.decode() in line for line in caplog.messages)


def test_a_peer_whose_host_falls_silent_is_lost_within_the_time_set() -> None:
    with linked(silence=2.0) as (_, peer):
        sock = peer._channel._sock
        options = [sock.getsockopt(socket.IPPROTO_TCP, name) for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert options == [1, 1]
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2000


def test_a_peer_that_is_not_admitted_learns_why() -> None:
    def admit(theirs: object) -> None:
        raise IncompatibleError("instance", "x linked already", "x", "names are unique")

    with serving(admit=admit) as server:
        with pytest.raises(IncompatibleError, match="this side has x, the peer has x linked already"):
            join(server)
        assert isinstance(server.error(), IncompatibleError)


def test_callbacks_that_exit_end_nobody() -> None:
    def leave(*_: object) -> None:
        raise SystemExit(1)

    with serving(on_rejected=leave) as server:
        with pytest.raises(HetkvError):
            join(server, secret=bytes(20))
        with join(server) as client, server.next() as peer:
            lost = threading.Event()
            peer.on_lost(leave)
            peer.on_lost(lambda _: lost.set())
            client.close()
            assert lost.wait(5)
        with join(server), server.next():
            pass


# --- the reactor


def test_steps_end_in_time_wherever_they_run() -> None:
    ours, theirs = socket.socketpair()

    def steps():
        try:
            yield Wait(ours.fileno(), select.POLLIN, time.monotonic() + 0.05, "too late")
        except ControlTimeoutError as error:
            return str(error)

    assert run(steps()) == "too late"
    results: list[object] = []
    done = threading.Event()
    Reactor().start(steps(), lambda *end: (results.append(end), done.set()))
    assert done.wait(5)
    assert results == [("too late", None)]
    ours.close()
    theirs.close()


def test_a_reactor_has_a_thread_only_while_it_has_tasks() -> None:
    reactor = Reactor()  # threads of earlier tests may end meanwhile: only its own count
    ours, theirs = socket.socketpair()

    def steps():
        yield Wait(ours.fileno(), select.POLLIN, None)

    for _ in range(20):
        tasks = [reactor.start(steps(), lambda *_: pytest.fail("stopped tasks do not end")) for _ in range(1)]
        thread = reactor._thread
        assert thread is not None
        assert thread.is_alive()
        for task in tasks:
            reactor.stop(task)
        assert not thread.is_alive()
        assert reactor._thread is None
    ours.close()
    theirs.close()


def test_the_end_waits_for_a_thread_that_it_has_started_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that ran may end between the look at it and the order to stop."""
    reactor = Reactor()
    ours, theirs = socket.socketpair()

    def steps():
        yield Wait(ours.fileno(), select.POLLIN, None)

    task = reactor.start(steps(), lambda *_: None)
    post = reactor._post

    def late(command: Callable[[], None]) -> None:
        monkeypatch.setattr(reactor, "_post", post)
        reactor.stop(task)
        post(lambda: (time.sleep(0.2), command()))

    monkeypatch.setattr(reactor, "_post", late)
    reactor.end()
    assert reactor._last is not None
    assert not reactor._last.is_alive()
    ours.close()
    theirs.close()


def test_call_logs_what_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise PeerLostError("of a test")

    call(fail)
    assert "of a test" in caplog.text


def test_a_peer_that_never_stops_talking_leaves_the_thread_to_others() -> None:
    """What it says is read in turns with all else that the one thread does."""
    count, taken = 5_000, threading.Event()
    pauses: list[float] = []

    def take(message: Later) -> None:
        if message == last:
            taken.set()

    def tick() -> Steps[None]:
        before = time.monotonic()
        while not taken.is_set():
            yield Wait(-1, 0, before + 0.001)
            pauses.append(time.monotonic() - before)
            before = time.monotonic()

    with linked() as (mine, theirs):
        theirs.on_message(take)
        last = Ask(bytes(15) + b"x")
        flood = bytearray()
        channel = SimpleNamespace(write=lambda data, _: iter((flood.extend(data),)))
        mine._records._channel, real = channel, mine._records._channel
        for message in [Ask(bytes(16))] * (count - 1) + [last]:
            list(mine._records.write(encode(message), None))
        mine._records._channel = real
        ticking = shared().start(tick(), lambda *_: None)
        thread = threading.Thread(target=lambda: run(real.write(bytes(flood), None)))
        thread.start()
        try:
            assert taken.wait(60), f"{len(pauses)} pauses, {theirs.lost!r}"
        finally:
            taken.set()
        assert ticking.ended.wait(10)
        thread.join()
    assert len(pauses) > 20
    assert max(pauses) < 0.3
