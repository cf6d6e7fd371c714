"""Streams that wait for the host: no call of the driver on the way of the transfer waits for them in turn."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time

import pytest
import torch

from hetkv.errors import InputError, UnsupportedError
from tests.device.test_gpu import GPUS, SMALL, pair, to, two
from tests.transport.peers import WAIT_S, connected, deliver, same_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS == 0, reason="PyTorch sees no GPU")]
BLOCKS = [9, 3, 4, 1, 2, 30, 7]


def test_the_first_thing_that_a_process_does() -> None:
    """The runtime loads a kernel at its first launch, and waits for the device there: it is loaded before."""
    test = "tests/device/test_gpu.py::test_the_callers_stream_comes_first_and_waits[cpu-cuda:0]"
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--timeout", "60", test],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0, made.stdout[-3000:]
    assert "1 passed" in made.stdout


@pytest.mark.parametrize("streams", [1, 6])
def test_memory_is_freed_once_no_stream_waits(streams: int) -> None:
    """Closing other nodes, and links, frees device and pinned memory, which would hold up every launch."""
    mine, theirs, here, there = pair("cuda:0", "cuda:0")
    waiting = [torch.cuda.Stream("cuda:0") for _ in range(streams)]
    with connected([here], [there], SMALL) as ([sender], [receiver]):
        rx, tx = receiver.receive("r", [[1, 0]], 100), sender.send("r", [BLOCKS], 100)
        for stream in waiting:
            rx.wait(stream=stream)
        began = time.perf_counter()
        for place in ("cpu", "cuda:0"):
            _, _, a, b = pair(place, "cuda:0")
            with connected([a], [b], SMALL) as ([other], [its]):
                its_rx, its_tx = its.receive("r", [[1, 0]], 100), other.send("r", [BLOCKS], 100)
                its_tx.send_layers()
                its_rx.wait(WAIT_S)
                its_tx.wait(WAIT_S)
        assert not any(stream.query() for stream in waiting)
        tx.send_layers()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        assert time.perf_counter() - began < WAIT_S
        torch.cuda.synchronize()
        assert all(stream.query() for stream in waiting)
        deliver([(mine, [BLOCKS])], theirs, [[1, 0]], [(0, 100)])
        assert same_bytes(to(there, "cpu"), theirs)


def test_what_was_put_off_is_freed() -> None:
    """Twenty pairs come and go while a stream waits; once it goes on their memory is the device's again."""
    _, _, here, there = pair("cuda:0", "cuda:0")
    stream = torch.cuda.Stream("cuda:0")

    def come_and_go() -> None:
        _, _, a, b = pair("cpu", "cpu")
        a, b = to(a, "cuda:0"), to(b, "cuda:0")
        with connected([a], [b], SMALL) as ([sender], [receiver]):
            rx, tx = receiver.receive("r", [[1, 0]], 100), sender.send("r", [BLOCKS], 100)
            tx.send_layers()
            rx.wait(WAIT_S)
            tx.wait(WAIT_S)

    def free_bytes() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(0)[0]

    come_and_go()
    before = free_bytes()
    with connected([here], [there], SMALL) as ([sender], [receiver]):
        rx, tx = receiver.receive("r", [[1, 0]], 100), sender.send("r", [BLOCKS], 100)
        rx.wait(stream=stream)
        for _ in range(20):
            come_and_go()
        tx.send_layers()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        stream.synchronize()
    after = free_bytes()
    assert before - after < 32 << 20, f"{(before - after) >> 20} MiB are still allocated"


def test_a_stream_that_would_take_the_last_queue() -> None:
    queues = int(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "8"))
    _, _, here, there = pair("cuda:0", "cuda:0")
    streams = [torch.cuda.Stream("cuda:0") for _ in range(queues - 1)]  # two queues stay free
    with connected([here], [there], SMALL) as ([sender], [receiver]):
        rx, tx = receiver.receive("r", [[1, 0]], 100), sender.send("r", [BLOCKS], 100)
        for stream in streams[:-1]:
            rx.wait(stream=stream)
            rx.wait_layer(0, stream=stream)
        with pytest.raises(UnsupportedError, match=f"{queues - 2} streams of the device wait.*{queues} hardware"):
            rx.wait(stream=streams[-1])
        tx.send_layers()
        rx.wait(WAIT_S)
        rx.wait(stream=streams[-1])


@two
def test_streams_that_cannot_wait() -> None:
    _, _, here, there = pair("cuda:0", "cuda:1")
    with connected([here], [there], SMALL) as ([sender], [receiver]):
        rx, tx = receiver.receive("r", [[1, 0]], 100), sender.send("r", [BLOCKS], 100)
        other = torch.cuda.Stream("cuda:0")
        with pytest.raises(InputError, match="cuda:0, the pool is on cuda:1"):
            rx.wait(stream=other)
        with pytest.raises(InputError, match="stream is one of device 0, the pool is on device 1"):
            rx.wait(stream=other.cuda_stream)
        x = torch.zeros(8, device="cuda:1")
        side = torch.cuda.Stream("cuda:1")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            x.add_(1)
            with pytest.raises(InputError, match="captures a graph"):
                rx.wait(stream=side)
        tx.abort()
        rx.abort()
