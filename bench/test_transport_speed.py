"""What a caller of the transport pays, and one small transfer, in one process over host memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from hetkv import KVPool, KVSpec, Receiver, Sender, TransferConfig

SPEC = KVSpec.uniform(80, 1, 128)
SECRET = b"of these benchmarks only"
CONFIG = TransferConfig(spin_us=20_000)
Pair = tuple[Sender, Receiver]


@pytest.fixture
def pair() -> Iterator[Pair]:
    source = KVPool.allocate(SPEC, 64, layout="nhd", block_size=16, dtype="bf16")
    destination = KVPool.allocate(SPEC, 64, layout="hnd", block_size=64, dtype="bf16")
    with Sender(source, instance="p", secret=SECRET, config=CONFIG) as sender:
        with Receiver(destination, instance="d", secret=SECRET, config=CONFIG) as receiver:
            receiver.connect(sender.listen())
            yield sender, receiver


@pytest.mark.parametrize("requests", [1, 64])
def test_a_layer_of_a_batch(benchmark: Any, pair: Pair, requests: int) -> None:
    """One call a layer, whatever the number of requests."""
    names = itertools.count()

    def setup() -> tuple[tuple[Any, int], dict[str, Any]]:
        number = next(names)
        handles = [pair[0].send(f"{number}-{i}", [i], 16) for i in range(requests)]
        return (pair[0].batch(handles), 3), {}

    benchmark.pedantic(lambda batch, layer: batch.send_layer(layer), setup=setup, rounds=200)


def test_a_layer_alone(benchmark: Any, pair: Pair) -> None:
    names = itertools.count()

    def setup() -> tuple[tuple[Any, int], dict[str, Any]]:
        return (pair[0].send(f"{next(names)}", [1], 16), 3), {}

    benchmark.pedantic(lambda handle, layer: handle.send_layer(layer), setup=setup, rounds=200)


def test_send_and_receive(benchmark: Any, pair: Pair) -> None:
    """A request's announcement and its ticket, without moving it."""
    names = itertools.count()

    def both() -> None:
        name = f"{next(names)}"
        pair[1].receive(name, [1], 16)
        pair[0].send(name, [1], 16)

    benchmark.pedantic(both, rounds=200)


def test_poll_of_nothing(benchmark: Any, pair: Pair) -> None:
    for number in range(64):
        pair[1].receive(f"{number}", [number], 16)
    benchmark(pair[1].poll)


@pytest.mark.parametrize("tokens", [1, 16])
def test_one_small_request(benchmark: Any, pair: Pair, tokens: int) -> None:
    """80 layers, from the first call of either side until the receiver sees it complete."""
    names = itertools.count()

    def move() -> None:
        name = f"{next(names)}"
        get = pair[1].receive(name, [1], tokens)
        pair[0].send(name, [1], tokens).send_layers()
        get.wait(10)

    benchmark.pedantic(move, rounds=200, warmup_rounds=5)


def test_handshake(benchmark: Any) -> None:
    """Connect and disconnect, with UCX's start of both sides outside."""
    source = KVPool.allocate(SPEC, 2, layout="nhd", block_size=16, dtype="bf16")
    destination = KVPool.allocate(SPEC, 2, layout="hnd", block_size=64, dtype="bf16")
    with Sender(source, instance="p", secret=SECRET) as sender:
        address = sender.listen()
        with Receiver(destination, instance="d", secret=SECRET) as receiver:

            def connect() -> None:
                peer = receiver.connect(address)
                receiver.disconnect(peer)
                while receiver.peers or sender.peers:
                    pass

            benchmark.pedantic(connect, rounds=10)
