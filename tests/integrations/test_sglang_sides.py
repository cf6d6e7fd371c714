"""SGLang's two sides over hetkv's own nodes in one process, with queues for SGLang's sockets: no SGLang needed."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hetkv.errors import PeerLostError, to_code
from hetkv.integrations.sglang import ending, workers
from hetkv.integrations.sglang.decode import DecodeSide
from hetkv.integrations.sglang.ending import Ending
from hetkv.integrations.sglang.messages import ASK, LINKED, REGISTER, Ask, Register, encode
from hetkv.integrations.sglang.pool import pool_of
from hetkv.integrations.sglang.prefill import ABORT, PrefillSide
from hetkv.transport.config import TransferConfig
from tests.integrations.test_sglang_pool import SECRET, WAIT_S, Cache

PAGE = 16
AUX = 8
IP = "127.0.0.1"
CONFIG = TransferConfig(handshake_timeout_s=2.0)


class Rank:
    """What a rank's manager keeps of its requests, and its end of the sockets."""

    def __init__(self, sockets: dict[int, queue.Queue[list[bytes]]], port: int, seed: int) -> None:
        self.cache = Cache(PAGE, seed=seed)
        self.aux = np.random.default_rng(100 + seed).integers(0, 1 << 60, AUX)
        self.kv_args = self.cache.args
        self.kv_args.aux_item_lens, self.kv_args.aux_data_ptrs = [8], [self.aux.ctypes.data]
        self.local_ip, self.rank_port, self.waiting_timeout = IP, port, WAIT_S
        self.transfer_infos: dict[int, dict[str, Ask]] = {}
        self.status: dict[int, str] = {}
        self.on_fail: Callable[[int], None] = lambda room: None
        self._sockets = sockets
        sockets[port] = queue.Queue()

    def hear(self) -> list[bytes]:
        return self._sockets[self.rank_port].get()

    def write(self, ip: str, port: int, frames: list[bytes]) -> None:
        self._sockets[port].put(frames)

    def fail(self, room: int, reason: str) -> None:
        self.on_fail(room)
        self.status[room] = reason

    def succeed(self, room: int) -> None:
        self.status[room] = "complete"

    def ready(self, room: int, prefix: int) -> None:
        self.status[room] = "ready"

    def sending(self, room: int) -> None:
        self.status.setdefault(room, "sending")

    def conclude(self, room: int, failure: str | None) -> None:
        self.status[room] = failure or "complete"

    def take_abort(self, frames: list[bytes]) -> None:
        self.fail(int(frames[1]), "aborted")

    def take_status(self, frames: list[bytes]) -> None:
        raise KeyError("a message of another kind")

    def until(self, room: int, *wanted: str) -> str:
        """The request's status, once it is a wanted one or has an error."""
        wait(lambda: room in self.status and (self.status[room] in wanted or ":" in self.status[room]), self)
        return self.status[room]


def wait(done: Callable[[], bool], what: object = "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


class Pair:
    """A prefill and a decode rank."""

    def __init__(self, secret: bytes = SECRET) -> None:
        sockets: dict[int, queue.Queue[list[bytes]]] = {}
        self.here, self.there = Rank(sockets, 1, 0), Rank(sockets, 2, 1)
        pools = [pool_of(rank.kv_args, "float32", "cpu", 1, 0) for rank in (self.here, self.there)]
        options: list[dict[str, Any]] = [{"secret": each, "config": CONFIG} for each in (SECRET, secret)]
        self.prefill = PrefillSide(self.here, pools[0], "p", options[0])
        self.decode = DecodeSide(self.there, pools[1], "d", options[1])
        self.register()

    def register(self) -> None:
        """SGLang does it once, before the first request."""
        self.there.write(IP, 1, self.decode.registration())

    def expect(self, room: int, pages: list[int], aux: int | None = 3) -> None:
        asks = self.decode.request(bootstrap_room=room, required_dst_info_num=1, kv_indices=pages, is_dummy=False)
        self.there.write(IP, 1, asks)
        self.decode.expect(room, pages, aux, [{"rank_ip": IP, "rank_port": 1, "is_dummy": False}])
        self.here.until(room, "ready")

    def send(self, room: int, pages: list[int], aux: int | None = 5) -> None:
        """In two chunks."""
        self.prefill.send(room, pages[:1], slice(0, 1), False)
        self.prefill.send(room, pages[1:], slice(1, len(pages)), True, aux)

    def run(self, room: int) -> None:
        """One request that must arrive, KV and metadata."""
        source, target = [5, 1, 7], [2, 6, 3]
        for array in self.here.cache.k + self.here.cache.v:
            array[:] = np.random.default_rng(room).random(array.shape)
        self.here.aux[5] = room
        self.expect(room, target)
        self.send(room, source)
        assert self.there.until(room, "complete") == "complete"
        mine, theirs = self.here.cache, self.there.cache
        for a, b in zip(mine.k + mine.v, theirs.k + theirs.v, strict=True):
            assert np.array_equal(b[theirs.rows(target)], a[mine.rows(source)])
        assert self.there.aux[3] == room
        assert self.here.until(room, "complete") == "complete"
        self.prefill.forget(room)
        self.decode.forget(room)

    def close(self) -> None:
        self.prefill.close()
        self.decode.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    try:
        yield made
    finally:
        made.close()


def test_requests_arrive(pair: Pair) -> None:
    for room in range(1, 6):
        pair.run(room)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_lost_link_is_made_again_with_the_next_request(pair: Pair, side: str) -> None:
    pair.run(1)
    for room in (2, 3):
        node = getattr(pair, side).node
        node.engine.drop_link(node.peers[0].link, to_code(PeerLostError("")), "lost by the test")
        wait(lambda: not pair.prefill.node.peers and not pair.decode.node.peers)
        pair.run(room)
    wait(lambda: len(pair.prefill.node.peers) == len(pair.decode.node.peers) == 1)


def test_a_link_that_could_not_be_made_is_tried_again_with_the_next_request() -> None:
    pair = Pair(secret=b"another secret of this test.")
    try:
        pair.expect(1, [2, 6])
        assert "has not connected: SecretError" in pair.there.until(1)
        pair.prefill.node.rotate_secret(b"another secret of this test.")
        pair.run(2)
    finally:
        pair.close()


def test_registrations_of_strangers_take_few_threads(pair: Pair) -> None:
    pair.run(1)
    before = threading.active_count()
    with socket.create_server(("0.0.0.0", 0), backlog=64) as silent:
        for at in range(2 * workers.MOST):
            strange = Register(f"127.0.1.{1 + at}:{silent.getsockname()[1]}", IP, 2)
            pair.there.write(IP, 1, encode(REGISTER, strange))
        wait(lambda: len(pair.prefill._workers._keys) == workers.MOST)
        pair.run(2)
        assert threading.active_count() <= before + workers.THREADS + 1
        pair.prefill._workers.close()


def test_a_request_is_not_failed_before_its_transfer_has_ended(pair: Pair) -> None:
    """At its deadline: the prefill computes still."""
    pair.run(1)
    pair.there.waiting_timeout = 0.3
    held = []
    pair.there.on_fail = lambda room: held.append(pair.decode._in[room].rx)
    pair.expect(2, [2, 6])
    pair.prefill.send(2, [5], slice(0, 1), False)
    assert "WaitTimeoutError: nothing has come" in pair.there.until(2)
    assert held[0] is not None
    assert held[0].done()
    assert "the receiver gave the request up" in pair.here.until(2)
    pair.prefill.forget(2)
    pair.there.waiting_timeout = WAIT_S
    pair.run(3)


def test_nothing_touches_pages_that_were_given_back(pair: Pair) -> None:
    """Requests that are ended at any point of their transfer."""
    pair.run(1)
    target, source = [2, 6, 3, 4], [5, 1, 7, 0]
    cache = pair.there.cache
    for room in range(2, 60):
        pair.expect(room, target)
        pair.send(room, source)
        time.sleep((room % 8) * 0.0002)
        tx = pair.prefill._out[room].tx
        if room % 2:
            pair.prefill.forget(room)
            assert tx.done()
        pair.decode.forget(room)
        for array in cache.k + cache.v:
            array[cache.rows(target)] = -1.0  # another request's
        pair.there.aux[3] = -1
        pair.prefill.forget(room)
        assert room not in pair.decode._in
        assert room not in pair.prefill._out
        time.sleep(0.002)
        assert all(np.all(array[cache.rows(target)] == -1.0) for array in cache.k + cache.v)
        assert pair.there.aux[3] == -1
    pair.run(100)


def test_pages_of_a_transfer_that_does_not_end_stay_held(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A transfer that nobody has given up ends as little as one that hangs."""
    pair.run(1)
    monkeypatch.setattr(ending, "DRAIN_S", 0.05)
    rx = pair.decode.node.receive("sglang/2", [2, 6], 2 * PAGE)
    held = Ending(rx)
    ended: list[float] = []
    waiting = threading.Thread(target=lambda: (ending.wait_for(lambda _: held.over(), 2), ended.append(1.0)))
    with caplog.at_level(logging.ERROR):
        waiting.start()
        time.sleep(0.3)
        assert not ended
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "sglang/2" in caplog.text
        assert "stay held" in caplog.text
    rx.abort()
    waiting.join(WAIT_S)
    assert ended


def test_a_request_without_a_row_for_its_metadata_fails(pair: Pair) -> None:
    rows = pair.there.aux.copy()
    pair.expect(1, [2, 6], aux=None)
    assert "no row for its metadata" in pair.there.until(1)
    pair.expect(2, [2, 6])
    pair.send(2, [5, 1], aux=None)
    assert "no row for its metadata" in pair.here.until(2)
    assert np.array_equal(pair.there.aux, rows)
    pair.prefill.forget(2)
    pair.decode.forget(2)
    pair.run(3)


def test_an_unexpected_exception_fails_one_request(pair: Pair) -> None:
    pair.run(1)
    for rank, room in ((pair.there, 2), (pair.here, 3)):
        good, rank.kv_args.aux_item_lens = rank.kv_args.aux_item_lens, None
        pair.expect(room, [2, 6])
        pair.send(room, [5, 1])
        assert "TypeError" in rank.until(room)
        rank.kv_args.aux_item_lens = good
        pair.prefill.forget(room)
        pair.decode.forget(room)

    def fails(room: int) -> None:
        raise RuntimeError(f"SGLang's own error for {room}")

    pair.there.on_fail = fails
    pair.expect(4, [2, 6], aux=None)
    wait(lambda: 4 not in pair.decode._in)
    pair.there.on_fail = lambda room: None
    pair.run(5)


@pytest.mark.parametrize(
    "frames", [[], [b""], [REGISTER], [REGISTER, b"\xc1"], [ASK], [ASK, b"\x80"], [ABORT], [LINKED], [LINKED, b"\x90"]]
)
def test_messages_that_are_not_understood_are_dropped(pair: Pair, frames: list[bytes]) -> None:
    for port in (1, 2):
        pair.there.write(IP, port, frames)
    pair.run(1)


def test_the_decode_gives_a_request_up(pair: Pair) -> None:
    pair.run(1)
    pair.expect(2, [2, 6])
    pair.prefill.send(2, [5], slice(0, 1), False)
    pair.there.write(IP, 1, [ABORT, b"2"])
    wait(lambda: pair.here.status[2] == "aborted")
    wait(lambda: pair.prefill.drained(2))
    assert "SGLang ended the request" in pair.there.until(2)
    pair.run(3)
