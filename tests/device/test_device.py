"""Pools on a device, through the real engine over a host implementation of the backend contract: what arrives, in what
order, and what waits for what. Kernels have tests of their own.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from hetkv.errors import (
    AbortedError,
)
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import ScaleLayout
from hetkv.transport.config import TransferConfig
from hetkv.transport.sender import Sender
from tests.device.host import SMALL, SPEC, HostStream, on_device, options, pools
from tests.transport.peers import WAIT_S, check_transfer, connected, duplicate, randomise, same_bytes, settled, until


@pytest.fixture(params=["device-device", "device-host", "host-device"])
def sides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which side's pool is on a device: the sender's on device 0, the receiver's on device 1."""
    on_device(monkeypatch, *(name == "device" for name in request.param.split("-")))
    return str(request.param)


PATHS = {
    "device-device": {"auto": "device", "stream": "stream", "host windows": "shm"},
    "device-host": {"auto": "shm", "stream": "stream", "host windows": "shm"},
    "host-device": {"auto": "shm", "stream": "stream", "host windows": "shm"},
}


@pytest.mark.parametrize("how", ["auto", "stream", "host windows"])
def test_every_path(sides: str, how: str) -> None:
    settings = {"auto": {}, "stream": {"direct": False}, "host windows": {"window": "host"}}[how]
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, staging_slots=2, **settings)  # type: ignore[arg-type]
    if sides == "device-host" and how == "host windows":
        config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096)
    source, destination = pools()
    with connected([source], [destination], config) as ([sender], [receiver]):
        for number in range(3):
            check_transfer(source, destination, sender, receiver, 201, request=f"{number}", seed=number)
        assert sender.path(sender.peers[0]) == PATHS[sides][how]
        stats = sender.stats()
        assert stats["device_frames"] == (stats["frames"] if PATHS[sides][how] == "device" else 0)
        settled(sender, receiver)


def test_conversion_with_scales_per_head(sides: str) -> None:
    scales = ScaleLayout((0.5, 2.0))
    source, _ = pools(dtype="fp8_e4m3fn", scale=scales)
    _, destination = pools(dtype="bfloat16")
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 77)
        settled(sender, receiver)


def test_the_codec_is_left_out(sides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pool is on a device: its side does not name them. The link stands, and every bit arrives."""
    monkeypatch.setenv("HETKV_SOCKET_DIR", "none")
    source, destination = pools(dtype="bfloat16")
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, codec="fp8")
    with connected([source], [destination], config) as ([sender], [receiver]):
        assert [peer.codec for peer in (*sender.peers, *receiver.peers)] == ["none"] * 2
        check_transfer(source, destination, sender, receiver, 77)
        settled(sender, receiver)


def test_prefill_first_chunks_and_a_held_prefix(sides: str) -> None:
    source, destination = pools()

    def chunks(tx: object) -> None:
        for start in range(0, 300, 100):
            for layer in range(3):
                tx.send_layer(layer, (start, start + 100))  # type: ignore[attr-defined]

    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(
            source, destination, sender, receiver, 300, num_cached_tokens=37, tickets_first=False, send=chunks
        )
        settled(sender, receiver)


def test_a_layer_leaves_after_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is filled by work that is still in the stream when `send_layer` returns."""
    on_device(monkeypatch)
    source, destination = pools()
    later = randomise(duplicate(source), 99)
    stream = HostStream()
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        expected = duplicate(destination)
        blocks, to_blocks = [3, 1, 2], [7, 5]
        tx, rx = sender.send("r", blocks, 40), receiver.receive("r", to_blocks, 40)
        began = time.perf_counter()
        for layer in range(3):
            stream.delay(30_000)
            for name in "kv":
                stream.copy(source.layers[layer].tensors[name], later.layers[layer].tensors[name])
            tx.send_layer(layer, stream=stream.number)
        calls = time.perf_counter() - began
        assert calls < 0.03, "send_layer waited for the stream"
        time.sleep(0.01)
        assert not rx.layers[0].done()
        rx.wait(WAIT_S)
        assert time.perf_counter() - began > 0.09
        from tests.transport.peers import deliver

        deliver([(later, [blocks])], expected, [to_blocks], [(0, 40)])
        assert same_bytes(destination, expected)
        tx.wait(WAIT_S)
        settled(sender, receiver)
    stream.close()


def test_what_waits_for_one_stream_holds_no_other_request_up(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    slow, fast = HostStream(), HostStream()
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        late, soon = sender.send("late", [0, 1, 2], 40), sender.send("soon", [3, 4, 5], 40)
        rx_late, rx_soon = receiver.receive("late", [0, 1], 40), receiver.receive("soon", [2, 3], 40)
        slow.delay(2_500_000)
        late.send_layers(stream=slow.number)
        soon.send_layers(stream=fast.number)
        rx_soon.wait(2)
        assert not rx_late.done()
        assert receiver.stats()["granted_slots"] <= 4
        rx_late.wait(WAIT_S)
        late.wait(WAIT_S)
        settled(sender, receiver)
    slow.close()
    fast.close()


def test_a_stream_waits_for_layers_that_have_not_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    stream = HostStream(1)
    seen = [torch.zeros_like(destination.layers[layer].tensors["k"]) for layer in range(3)]
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        rx = receiver.receive("r", [7, 5], 40)
        began = time.perf_counter()
        for layer in (1, 2):
            rx.wait_layer(layer, stream=stream.number)
            stream.copy(seen[layer], destination.layers[layer].tensors["k"])
        rx.wait(stream=stream.number)
        assert time.perf_counter() - began < 0.1
        time.sleep(0.02)
        assert not seen[1].any()
        tx = sender.send("r", [3, 1, 2], 40)
        for layer in (1, 0, 2):
            tx.send_layer(layer)
        stream.wait()
        assert rx.done() or rx.wait(1) is None
        for layer in (1, 2):
            assert torch.equal(seen[layer], destination.layers[layer].tensors["k"])
        rx.wait_layer(0, stream=stream.number)  # has arrived: nothing to wait for
        stream.wait()
        tx.wait(WAIT_S)
    stream.close()


@pytest.mark.parametrize("end", ["abort", "close"])
def test_a_stream_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    stream = HostStream(1)
    with connected([source], [destination], SMALL) as ([_], [receiver]):
        rx = receiver.receive("r", [7, 5], 40)
        rx.wait_layer(1, stream=stream.number)
        rx.wait(stream=stream.number)
        rx.abort() if end == "abort" else receiver.close()
        stream.wait()
    stream.close()


def test_no_block_goes_back_while_a_kernel_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort is reported only after the packs in flight have ended; so is a close."""
    on_device(monkeypatch)
    source, destination = pools()
    for end in ("abort", "close"):
        with options("slow=150000"), connected([source], [destination], SMALL) as ([sender], [receiver]):
            tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
            tx.send_layer(0)
            until(lambda receiver=receiver: receiver.stats()["granted_slots"] > 0)
            time.sleep(0.05)
            began = time.perf_counter()
            if end == "abort":
                tx.abort()
                with pytest.raises(AbortedError):
                    tx.wait_packed(WAIT_S)
                assert time.perf_counter() - began > 0.02
                with pytest.raises(AbortedError):
                    rx.wait(WAIT_S)
            else:
                sender.close()
                assert time.perf_counter() - began > 0.02
                assert tx.done()


def test_spans_come_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    with options("slow=20000"), connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 40)
        spans = [*sender.engine.take_trace(), *receiver.engine.take_trace()]
        packs = [stop - start for kind, _, _, start, stop, _ in spans if kind in ("pack", "unpack")]
        assert len(packs) >= 6
        assert min(packs) > 15e6, packs
        assert statistics.median(packs) < 60e6, packs


def test_at_rest_nothing_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 100)
        time.sleep(0.1)
        before = sender.engine.stats()["wakeups"], receiver.engine.stats()["wakeups"]
        time.sleep(0.5)
        after = sender.engine.stats()["wakeups"], receiver.engine.stats()["wakeups"]
        assert max(b - a for a, b in zip(before, after, strict=True)) < 20
        assert isinstance(sender, Sender)


def test_a_link_that_needs_no_buffer_any_more_leaves_its_turn_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three links and one staging buffer. The second waits for it, and then has so little left to send that it is
    packed without: the third has to hear that the buffer is there."""
    on_device(monkeypatch)
    tokens, few = 6144, 64  # of a layer: 1.5 MiB, which goes through a buffer, and 16 KiB
    source = randomise(KVPool.allocate(SPEC, 3 * tokens // 16 + few // 16, layout="nhd"), 0)
    config = TransferConfig(slot_bytes=2 << 20, window_bytes=8 << 20, staging_slots=1)
    destinations = [KVPool.allocate(SPEC, (tokens + few) // 16, layout="hnd") for _ in range(3)]
    with connected([source], destinations, config) as ([sender], receivers):
        blocks = list(range(tokens // 16))
        rest = list(range(tokens // 16, (tokens + few) // 16))
        asked = [receiver.receive(name, blocks, tokens) for name, receiver in zip("abc", receivers, strict=True)]
        small = receivers[1].receive("small", rest, few)
        sent = [sender.send(name, blocks, tokens) for name in "abc"]
        until(lambda: all(receiver.stats()["granted_slots"] for receiver in receivers))
        with options("slow=500000"):
            sent[0].send_layer(0)
            time.sleep(0.1)
            sent[1].send_layers()
            time.sleep(0.05)
            sender.send("small", rest, few).send_layers()
            sent[2].send_layers()
            time.sleep(0.05)
            asked[1].abort()
            with pytest.raises(AbortedError):
                sent[1].wait(WAIT_S)
        small.wait(WAIT_S)
        asked[2].wait(5)
        for layer in (1, 2):
            sent[0].send_layer(layer)
        asked[0].wait(WAIT_S)
        settled(sender, *receivers)
