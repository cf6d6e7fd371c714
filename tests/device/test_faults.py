"""Pools on a device that fails or is asked for what it cannot do: the caller's error, and what remains."""

from __future__ import annotations

import gc

import pytest

from hetkv.errors import (
    DeviceError,
    InputError,
    PeerLostError,
    UnsupportedError,
)
from hetkv.kv.pool import KVPool
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.device.host import SMALL, SPEC, HostStream, library, on_device, options, pools
from tests.transport.peers import SECRET, WAIT_S, check_transfer, connected, settled, until


def test_a_failing_device_fails_the_request_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, destination=False)
    source, destination = pools()
    for fault, words in (("reject-remap=2", "launch rejected"), ("fail-remap=2", "a kernel failed")):
        with options(fault), connected([source], [destination], SMALL) as ([sender], [receiver]):
            tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
            tx.send_layers()
            with pytest.raises(DeviceError, match=rf"cuda:0: .*{words}"):
                tx.wait(WAIT_S)
            with pytest.raises(Exception, match=words):
                rx.wait(WAIT_S)
            settled(sender, receiver)
            if fault.startswith("reject"):
                check_transfer(source, destination, sender, receiver, 100, request="next")


def test_a_failing_receiver_device(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, source=False)
    source, destination = pools()
    with options("reject-remap=2"), connected([source], [destination], SMALL) as ([sender], [receiver]):
        tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
        tx.send_layers()
        with pytest.raises(DeviceError, match=r"cuda:1: .*launch rejected"):
            rx.wait(WAIT_S)
        with pytest.raises(Exception, match="launch rejected"):
            tx.wait(WAIT_S)
        settled(sender, receiver)
        check_transfer(source, destination, sender, receiver, 100, request="next")


def test_memory_that_cannot_be_pinned_ends_the_link_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, destination=False)
    source, destination = pools()
    with connected([source], [destination], SMALL) as ([sender], [receiver]), options("no-register"):
        tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
        tx.send_layers()
        with pytest.raises(DeviceError, match="pinning 4096 bytes of a window: cannot pin that"):
            tx.wait(WAIT_S)
        with pytest.raises(PeerLostError):
            rx.wait(WAIT_S)


def test_windows_that_the_sender_cannot_reach_are_replaced_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and gets slots in host memory. Only where the driver has no handles at all there can be none."""
    on_device(monkeypatch)
    source, destination = pools()
    with options("no-peer"), connected([source], [destination], SMALL) as ([sender], [receiver]):
        for number in range(3):
            check_transfer(source, destination, sender, receiver, 201, request=f"{number}", seed=number)
        assert sender.path(sender.peers[0]) == "shm"
        settled(sender, receiver)
    with options("no-ipc"), pytest.raises(DeviceError, match="neither the driver nor RDMA"):
        Receiver(destination, secret=SECRET, instance="d", config=SMALL)


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_scales_in_blocks_of_a_device_pool_are_rejected_by_name(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """Its kernels take static scales alone, so the link is rejected, before any request."""
    on_device(monkeypatch, source=role == "sender", destination=role == "receiver")
    made = [
        KVPool.allocate(SPEC, 24, layout=layout, block_size=16, dtype="fp8_e4m3fn", scale="inline")
        for layout in ("nhd", "hnd")
    ]
    with (
        Sender(made[0], secret=SECRET, instance="p", config=SMALL) as sender,
        Receiver(made[1], secret=SECRET, instance="d", config=SMALL) as receiver,
    ):
        here, there = (sender, receiver) if role == "sender" else (receiver, sender)
        with pytest.raises(UnsupportedError, match="layer 0 has scales per token or head in its blocks"):
            here.connect(there.listen())
        until(lambda: not sender.peers and not receiver.peers)


def test_bad_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    other, capturing = HostStream(1), HostStream(0)
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
        with pytest.raises(InputError, match="stream is one of device 1, the pool is on device 0"):
            tx.send_layer(0, stream=other.number)
        capturing.capture(True)
        with pytest.raises(InputError, match="captures a graph"):
            tx.send_layer(0, stream=capturing.number)
        with pytest.raises(InputError, match="a stream is an integer"):
            tx.send_layer(0, stream="default")
        with pytest.raises(InputError, match="a stream is an integer"):
            rx.wait(stream="default")
        tx.send_layers()
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
    for stream in (other, capturing):
        stream.close()


def test_streams_that_cannot_wait_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    stream = HostStream(1)
    with options("no-wait-value"), connected([source], [destination], SMALL) as ([_], [receiver]):
        rx = receiver.receive("r", [7, 5], 40)
        with pytest.raises(UnsupportedError, match="cannot wait for the host"):
            rx.wait(stream=stream.number)
        rx.abort()
    stream.close()


def test_streams_of_a_pool_in_host_memory() -> None:
    source, destination = pools()
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
        with pytest.raises(InputError, match="host memory"):
            tx.send_layer(0, stream=1)
        with pytest.raises(InputError, match="host memory"):
            rx.wait(stream=1)
        tx.send_layers()
        rx.wait(WAIT_S)
    with pytest.raises(InputError, match="window='device'"):
        Receiver(destination, secret=SECRET, instance="d", config=TransferConfig(window="device"))


def test_out_of_device_memory_at_the_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    gc.collect()
    before = library().host_blocks_in_use()
    for memory, rejected in ((2048, 1 << 20), ((1 << 20) + 2048, 4096)):
        with options(f"memory={memory}"):
            with pytest.raises(DeviceError, match=rf"cuda:1: allocating {rejected} bytes: out of memory"):
                Receiver(destination, secret=SECRET, instance="d", config=SMALL)
        gc.collect()
        assert library().host_blocks_in_use() == before
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 100)
    assert library().host_blocks_in_use() == before


def test_fewer_slots_than_configured_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    with options(f"memory={2 * 4096 + 2 * (1 << 20)}"):
        with connected([source], [destination], SMALL) as ([sender], [receiver]):
            check_transfer(source, destination, sender, receiver, 200)
            settled(sender, receiver)


def test_a_pool_freed_while_registered() -> None:
    source, destination = pools()
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        source.layers[1].tensors["k"].untyped_storage().resize_(0)
        with pytest.raises(InputError, match="freed or replaced"):
            sender.send("r", [3, 1, 2], 40)
        rx = receiver.receive("r", [7, 5], 40)
        rx.abort()
