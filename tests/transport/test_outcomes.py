"""What callers see of a request without asking the engine's thread: waits, layers, polls, futures that come late."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from hetkv import Receiver, Sender, TransferConfig
from hetkv.errors import AbortedError, HetkvError, InputError, WaitTimeoutError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from tests.transport.peers import WAIT_S, connected, randomise, settled, until

SPEC = KVSpec.uniform(3, 2, 32)
SLEEPY, SPINNING = TransferConfig(spin_us=0), TransferConfig(spin_us=100_000)


def pools() -> tuple[KVPool, KVPool]:
    source = KVPool.allocate(SPEC, 8, layout="nhd", block_size=16, dtype="bf16")
    return randomise(source, 1), KVPool.allocate(SPEC, 8, layout="hnd", block_size=64, dtype="bf16")


@pytest.mark.parametrize("config", [SLEEPY, SPINNING], ids=["sleeping", "spinning"])
def test_waiters_in_threads_see_layers_and_ends(config: TransferConfig) -> None:
    source, destination = pools()
    with connected([source], [destination], config) as ([sender], [receiver]):
        rx, tx = receiver.receive("r", [1], 16), sender.send("r", [2], 16)
        seen: list[Any] = []

        def wait(name: str, call: Any, *args: Any) -> threading.Thread:
            def run() -> None:
                call(*args)
                seen.append(name)

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        with pytest.raises(WaitTimeoutError):
            rx.wait_layer(1, 0.001)
        with pytest.raises(WaitTimeoutError):
            rx.wait(0)
        first = [wait("layer", rx.wait_layer, 1, WAIT_S) for _ in range(3)]
        ends = [wait("rx", rx.wait, WAIT_S), wait("tx", tx.wait, WAIT_S), wait("packed", tx.wait_packed, WAIT_S)]
        time.sleep(0.02)
        tx.send_layer(1)
        for thread in first:
            thread.join(WAIT_S)
        assert seen == ["layer"] * 3
        assert not rx.done()
        for layer in (layer for layer in source.layers if layer != 1):
            tx.send_layer(layer)
        for thread in ends:
            thread.join(WAIT_S)
        assert sorted(seen[3:]) == ["packed", "rx", "tx"]
        settled(sender, receiver)


def test_no_thread_of_pythons_runs_for_a_request_without_futures(monkeypatch: pytest.MonkeyPatch) -> None:
    for watcher in ("nvtx", "opentelemetry.trace"):  # another test may have imported it: then requests have spans
        monkeypatch.delitem(sys.modules, watcher, raising=False)
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        events: list[str] = []
        for node in (sender, receiver):
            monkeypatch.setattr(node.requests, "dispatch", lambda *event: events.append(event[0]))
        for number in range(20):
            rx, tx = receiver.receive(f"{number}", [1], 16), sender.send(f"{number}", [2], 16)
            tx.send_layers()
            rx.wait_layer(0, WAIT_S)
            rx.wait(WAIT_S)
            tx.wait(WAIT_S)
        assert {handle.request_id for handle in receiver.poll()} == {f"{number}" for number in range(20)}
        assert events == []


def test_futures_that_are_asked_for_late_tell_the_same() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        rx, tx = receiver.receive("good", [1], 16), sender.send("good", [2], 16)
        tx.send_layers()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        called: list[Future[None]] = []
        rx.future.add_done_callback(called.append)
        assert called == [rx.future]
        assert rx.future.done()
        assert tx.packed.result(0) is None
        assert all(future.done() and future.exception() is None for future in rx.layers.values())
        bad = receiver.receive("bad", [1], 16)
        early = bad.layers[0]
        bad.abort("not wanted")
        with pytest.raises(AbortedError):
            bad.wait(WAIT_S)
        assert isinstance(bad.future.exception(0), AbortedError)
        assert isinstance(early.exception(WAIT_S), AbortedError)
        assert isinstance(bad.layers[2].exception(0), AbortedError)
        assert bad.error is bad.future.exception()
        settled(sender, receiver)


def test_callbacks_come_while_layers_arrive() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):

        def move(name: str) -> None:
            rx, tx = receiver.receive(name, [1], 16), sender.send(name, [2], 16)
            order: list[int] = []
            late = threading.Event()
            tx.send_layers()
            for layer, future in rx.layers.items():  # some arrive before they are asked for
                future.add_done_callback(lambda _, layer=layer: order.append(layer))
            rx.future.add_done_callback(lambda _: late.set())
            assert late.wait(WAIT_S)
            until(lambda: len(order) == len(source.layers))

        for number in range(30):
            move(f"{number}")
        settled(sender, receiver)


def test_an_id_is_free_once_its_end_is_seen() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        for _ in range(200):
            rx, tx = receiver.receive("same", [1], 16), sender.send("same", [2], 16)
            with pytest.raises(InputError, match="'same' is under way already"):
                receiver.receive("same", [3], 16)
            tx.send_layers()
            while not rx.done():
                time.sleep(0)
            while not tx.done():
                time.sleep(0)


def test_polls_drop_nothing(caplog: pytest.LogCaptureFixture) -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        caplog.set_level(logging.WARNING, logger="hetkv.transport")

        def end(node: Sender | Receiver, count: int, name: str) -> None:
            for number in range(count):
                handle: Any = (
                    node.receive(f"{name}{number}", [1], 16)
                    if isinstance(node, Receiver)
                    else node.send(f"{name}{number}", [1], 16)
                )
                handle.abort()
            until(lambda: node.engine.open_requests == 0)

        assert receiver.poll() == []
        end(receiver, 4500, "a")
        found = receiver.poll()
        assert sorted(handle.request_id for handle in found) == sorted(f"a{number}" for number in range(4500))
        assert receiver.poll() == []
        end(sender, 9000, "b")
        assert not caplog.messages
        found = sender.poll()
        assert 4096 <= len(found) < 9000  # the last of each time that the node let go, and those since
        assert len({handle.request_id for handle in found}) == len(found)
        assert any(f"{9000 - len(found)} requests that ended before the first poll" in at for at in caplog.messages)
        assert all(isinstance(handle.error, AbortedError) for handle in found)


def test_a_signal_ends_a_wait() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        rx = receiver.receive("r", [1], 16)
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            rx.wait(WAIT_S)
        assert time.monotonic() - began < WAIT_S / 2
        rx.abort()
        with pytest.raises(HetkvError):
            rx.wait(WAIT_S)
        settled(sender, receiver)


def test_waits_end_with_the_node() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([_], [receiver]):
        rx = receiver.receive("r", [1], 16)
        layer = rx.layers[0]
        ended: list[BaseException] = []

        def wait() -> None:
            try:
                rx.wait_layer(0, WAIT_S)
            except HetkvError as error:
                ended.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.01)
        receiver.close()
        thread.join(WAIT_S)
        assert len(ended) == 1
        assert layer.exception(WAIT_S) is not None
        assert [handle.request_id for handle in receiver.poll()] == ["r"]
