"""Pools on real GPUs: the same engine as test_device.py, with the vendor's backend and PyTorch's streams."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from hetkv.errors import DeviceError, InputError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import SECRET, WAIT_S, connected, deliver, duplicate, pick_blocks, randomise, same_bytes

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="PyTorch sees no GPU")]
two = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
SPEC = KVSpec.uniform(3, 4, 64)
SMALL = TransferConfig(slot_bytes=65536, window_bytes=8 * 65536, staging_slots=2)


def to(pool: KVPool, device: str) -> KVPool:
    """A pool of the same layouts over a copy of the memory on another device."""
    copies: dict[int, torch.Tensor] = {}
    layers = {
        index: memory._replace(
            tensors={n: copies.setdefault(at.data_ptr(), at.to(device, copy=True)) for n, at in memory.tensors.items()}
        )
        for index, memory in pool.layers.items()
    }
    return KVPool(pool.spec, pool.shard, layers)


def pair(source: str, destination: str, **settings: object) -> tuple[KVPool, KVPool, KVPool, KVPool]:
    """Random pools on the host, and their copies where they are to be."""
    made = [
        randomise(KVPool.allocate(SPEC, 40, layout=layout, block_size=size, **settings), index)  # type: ignore[arg-type]
        for index, (layout, size) in enumerate([("hnd", 16), ("rocm", 64)])
    ]
    return made[0], made[1], to(made[0], source), to(made[1], destination)


PLACES = [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:0"), pytest.param("cuda:0", "cuda:1", marks=two)]


@pytest.mark.parametrize("how", [{}, {"window": "host"}, {"direct": False}])
@pytest.mark.parametrize(("source", "destination"), PLACES)
def test_every_byte_arrives(source: str, destination: str, how: dict[str, object]) -> None:
    mine, theirs, here, there = pair(source, destination)
    config = TransferConfig(slot_bytes=65536, window_bytes=8 * 65536, staging_slots=2, **how)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with connected([here], [there], config) as ([sender], [receiver]):
        for number in range(4):
            blocks, to_blocks = pick_blocks(mine, [333], generator), pick_blocks(theirs, [333], generator)
            deliver([(mine, blocks)], theirs, to_blocks, [(0, 333)])
            rx = receiver.receive(f"{number}", to_blocks, 333)
            tx = sender.send(f"{number}", blocks, 333)
            tx.send_layers()
            rx.wait(WAIT_S)
            tx.wait(WAIT_S)
        assert same_bytes(to(there, "cpu"), theirs)
        path = sender.path(sender.peers[0])
    if how.get("direct") is False:
        assert path == "stream"
    else:
        both = source != "cpu" and destination != "cpu" and not how
        assert path == ("device" if both else "shm")


@pytest.mark.parametrize(("source", "destination"), PLACES)
def test_the_callers_stream_comes_first_and_waits(source: str, destination: str) -> None:
    """The pool is filled by work that is queued after a long kernel; the decoder reads after `wait(stream=...)`."""
    mine, theirs, here, there = pair(source, destination)
    fresh = to(randomise(mine, 77), source)
    with connected([here], [there], SMALL) as ([sender], [receiver]):
        rx = receiver.receive("r", [[1, 0]], 100)
        tx = sender.send("r", [[9, 3, 4, 1, 2, 30, 7]], 100)
        slept = None
        if source != "cpu":
            torch.cuda._sleep(1_000_000_000)
            slept = torch.cuda.current_stream().record_event()
        seen = None
        if destination != "cpu":
            stream = torch.cuda.Stream(destination)
            with torch.cuda.stream(stream):
                rx.wait(stream=stream)
                seen = there.layers[2].tensors["v"].clone()
        for layer in range(3):
            for name in "kv":
                here.layers[layer].tensors[name].copy_(fresh.layers[layer].tensors[name])
            tx.send_layer(layer)
        assert slept is None or not slept.query(), "a call waited for the device"
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        deliver([(mine, [[9, 3, 4, 1, 2, 30, 7]])], theirs, [[1, 0]], [(0, 100)])
        torch.cuda.synchronize()
        assert same_bytes(to(there, "cpu"), theirs)
        if seen is not None:
            torch.cuda.synchronize(destination)
            assert torch.equal(seen.cpu(), theirs.layers[2].tensors["v"])


@two
def test_default_streams_of_a_device_that_is_not_the_current_one() -> None:
    """A null stream is the pool's device's, whichever device the calling thread has made current."""
    mine, theirs, here, there = pair("cuda:0", "cuda:1")
    with connected([here], [there], SMALL) as ([sender], [receiver]):
        rx = receiver.receive("r", [[1, 0]], 100)
        tx = sender.send("r", [[9, 3, 4, 1, 2, 30, 7]], 100)
        with torch.cuda.device(0):
            rx.wait(stream=0)
        seen = there.layers[2].tensors["v"].clone()
        with torch.cuda.device(1):
            tx.send_layers()
        tx.wait(WAIT_S)
        deliver([(mine, [[9, 3, 4, 1, 2, 30, 7]])], theirs, [[1, 0]], [(0, 100)])
        assert same_bytes(to(there, "cpu"), theirs)
        assert torch.equal(seen.cpu(), theirs.layers[2].tensors["v"])


@two
def test_a_graph_captured_meanwhile_is_not_disturbed() -> None:
    _, _, here, there = pair("cuda:0", "cuda:1")
    x = torch.ones(1 << 20, device="cuda:0")
    side = torch.cuda.Stream("cuda:0")
    with connected([here], [there], SMALL) as ([sender], [receiver]):
        for number in range(20):
            rx, tx = receiver.receive(f"{number}", [[1, 0]], 100), sender.send(f"{number}", [list(range(7))], 100)
            tx.send_layer(0)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
                y = x
                for _ in range(50):
                    y = y * 1.0 + 1.0
                with pytest.raises(InputError, match="captures a graph"):
                    tx.send_layer(1, stream=side)
                time.sleep(0.005)
            tx.send_layer(1)
            tx.send_layer(2)
            graph.replay()
            torch.cuda.synchronize()
            assert float(y[0]) == 51.0
            rx.wait(WAIT_S)
            tx.wait(WAIT_S)


@two
def test_bad_places() -> None:
    _, _, here, there = pair("cuda:0", "cuda:1")
    with connected([here], [there], SMALL) as ([sender], [receiver]):
        tx, rx = sender.send("r", [list(range(7))], 100), receiver.receive("r", [[1, 0]], 100)
        other = torch.cuda.Stream("cuda:1")
        with pytest.raises(InputError, match="stream is one of cuda:1, the pool is on cuda:0"):
            tx.send_layer(0, stream=other)
        with pytest.raises(InputError, match="stream is one of device 1"):
            tx.send_layer(0, stream=other.cuda_stream)
        tx.abort()
        rx.abort()
    mixed = dict(here.layers)
    mixed[1] = there.layers[1]
    with pytest.raises(InputError, match="one device"):
        KVPool(SPEC, here.shard, mixed)


def test_out_of_device_memory_at_the_start() -> None:
    pool = KVPool.allocate(SPEC, 8, device="cuda:0")
    free, _ = torch.cuda.mem_get_info(0)
    config = TransferConfig(slot_bytes=free + (1 << 30))
    with pytest.raises(DeviceError, match=r"cuda:0: allocating \d+ bytes"):
        Receiver(pool, secret=SECRET, instance="d", config=config)
    with Receiver(pool, secret=SECRET, instance="d"):
        pass


def test_a_pool_freed_while_registered() -> None:
    pool = KVPool.allocate(SPEC, 8, device="cuda:0")
    with Sender(pool, secret=SECRET, instance="p") as sender:
        pool.layers[1].tensors["k"].untyped_storage().resize_(0)
        with pytest.raises(InputError, match="freed or replaced"):
            sender.send("r", [0], 10)


def test_pools_in_expandable_segments() -> None:
    """Memory without a legacy IPC handle: windows are allocations of their own, so the pool needs none."""
    code = (
        "from hetkv import KVPool, KVSpec, Sender;"
        "pool = KVPool.allocate(KVSpec.uniform(2, 2, 64), 8, device='cuda:0');"
        "s = Sender(pool, secret=b'a secret of tests', instance='p');"
        "i = s.device.core.pointer_info(pool.base(0, 'k')); print(i['kind'], i['ipc']); s.close()"
    )
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["device", "False"]


def test_duplicate_of_a_pool_on_a_device() -> None:
    pool = KVPool.allocate(SPEC, 8, device="cuda:0")
    assert same_bytes(pool, duplicate(pool))
