"""Pools on a device, through the real engine over a host implementation of the backend contract: what arrives, in what
order, what waits for what, and what is left when a device, a peer or a caller fails. Kernels have tests of their own.
"""

from __future__ import annotations

import gc
import os
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from device_host import HostStream, device, library, library_path, options
from transfer_peers import SECRET, WAIT_S, check_transfer, connected, duplicate, randomise, same_bytes, settled, until

from hetkv import wire
from hetkv.config import TransferConfig
from hetkv.core import core
from hetkv.errors import (
    AbortedError,
    DeviceError,
    InputError,
    MalformedError,
    PeerLostError,
    ProtocolError,
    TransportError,
    UnsupportedError,
)
from hetkv.layout import ScaleLayout
from hetkv.pool import KVPool
from hetkv.spec import KVSpec
from hetkv.transfer import Receiver, Sender
from hetkv.wire_types import Grant, Prelude, SlotGrant, Type

SPEC = KVSpec.uniform(3, 2, 32)
SMALL = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, staging_slots=2, trace=True)


@pytest.fixture(autouse=True)
def _plain_backend() -> Iterator[None]:
    with options():
        yield


@pytest.fixture(params=["device-device", "device-host", "host-device"])
def sides(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which side's pool lies on a device: the sender's on device 0, the receiver's on device 1."""
    on_device(monkeypatch, *(name == "device" for name in request.param.split("-")))
    return str(request.param)


def on_device(monkeypatch: pytest.MonkeyPatch, source: bool = True, destination: bool = True) -> None:
    """Pools of NHD lie on device 0 and all others on device 1, where the side has one."""

    def place(pool: KVPool) -> object:
        first = pool.layers[0].layout.segments["k"].token_stride > pool.layers[0].layout.segments["k"].head_stride
        return device(int(not first)) if (source if first else destination) else None

    monkeypatch.setattr("hetkv.node.device_of", place)


def pools(blocks: int = 24, **settings: object) -> tuple[KVPool, KVPool]:
    made = [
        randomise(KVPool.allocate(SPEC, blocks, layout=layout, block_size=size, **settings), index)  # type: ignore[arg-type]
        for index, (layout, size) in enumerate([("nhd", 16), ("hnd", 32)])
    ]
    return made[0], made[1]


REACHES = {
    "device-device": {"auto": "peer", "put": "put", "host windows": "shared"},
    "device-host": {"auto": "shared", "put": "put", "host windows": "shared"},
    "host-device": {"auto": "shared", "put": "put", "host windows": "shared"},
}


@pytest.mark.parametrize("how", ["auto", "put", "host windows"])
def test_every_reach(sides: str, how: str) -> None:
    settings = {"auto": {}, "put": {"direct": False, "window": "host"}, "host windows": {"window": "host"}}[how]
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, staging_slots=2, **settings)  # type: ignore[arg-type]
    if sides == "device-host" and how == "host windows":
        config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096)
    source, destination = pools()
    with connected([source], [destination], config) as ([sender], [receiver]):
        for number in range(3):
            check_transfer(source, destination, sender, receiver, 201, request=f"{number}", seed=number)
        assert sender.reach(sender.peers[0]) == REACHES[sides][how]
        stats = sender.stats()
        assert stats["peer_frames"] == (stats["frames"] if REACHES[sides][how] == "peer" else 0)
        settled(sender, receiver)


def test_conversion_with_scales_per_head(sides: str) -> None:
    scales = ScaleLayout((0.5, 2.0))
    source, _ = pools(dtype="fp8_e4m3fn", scale=scales)
    _, destination = pools(dtype="bfloat16")
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 77)
        settled(sender, receiver)


def test_prefill_first_chunks_and_a_held_prefix(sides: str) -> None:
    source, destination = pools()

    def chunks(tx: object) -> None:
        for start in range(0, 300, 100):
            for layer in range(3):
                tx.send_layer(layer, (start, start + 100))  # type: ignore[attr-defined]

    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 300, held=37, tickets_first=False, send=chunks)
        settled(sender, receiver)


def test_a_layer_leaves_behind_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
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
        from transfer_peers import deliver

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
        assert receiver.stats()["lent_slots"] <= 4
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
            rx.wait_stream(stream.number, layer)
            stream.copy(seen[layer], destination.layers[layer].tensors["k"])
        rx.wait_stream(stream.number)
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
        rx.wait_stream(stream.number, 0)  # has arrived: nothing to wait for
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
        rx.wait_stream(stream.number, 1)
        rx.wait_stream(stream.number)
        rx.abort() if end == "abort" else receiver.close()
        stream.wait()
    stream.close()


def test_no_block_goes_back_while_a_kernel_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abort is told only after the packs in flight have ended; so is a close."""
    on_device(monkeypatch)
    source, destination = pools()
    for end in ("abort", "close"):
        with options("slow=150000"), connected([source], [destination], SMALL) as ([sender], [receiver]):
            tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
            tx.send_layer(0)
            until(lambda receiver=receiver: receiver.stats()["lent_slots"] > 0)
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


def test_a_failing_device_fails_the_request_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, destination=False)
    source, destination = pools()
    for fault, words in (("refuse-remap=2", "launch refused"), ("fail-remap=2", "a kernel failed")):
        with options(fault), connected([source], [destination], SMALL) as ([sender], [receiver]):
            tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
            tx.send_layers()
            with pytest.raises(DeviceError, match=rf"cuda:0: .*{words}"):
                tx.wait(WAIT_S)
            with pytest.raises(Exception, match=words):
                rx.wait(WAIT_S)
            settled(sender, receiver)
            if fault.startswith("refuse"):
                check_transfer(source, destination, sender, receiver, 100, request="next")


def test_a_failing_receiver_device(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch, source=False)
    source, destination = pools()
    with options("refuse-remap=2"), connected([source], [destination], SMALL) as ([sender], [receiver]):
        tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
        tx.send_layers()
        with pytest.raises(DeviceError, match=r"cuda:1: .*launch refused"):
            rx.wait(WAIT_S)
        with pytest.raises(Exception, match="launch refused"):
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


def test_windows_that_no_one_can_reach_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    with options("no-peer"), connected([source], [destination], SMALL) as ([sender], [receiver]):
        tx, _ = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
        tx.send_layers()
        until(lambda: not sender.peers)
    with options("no-ipc"), pytest.raises(DeviceError, match="neither the driver nor UCX"):
        Receiver(destination, secret=SECRET, instance="d", config=SMALL)


def window_key(**changes: Any) -> bytes:
    """The key of a slot in device memory (docs/wire-format.md, section 2), as changed."""
    fields = {
        "magic": b"hetkvwin", "version": 1, "ucx": 0, "process": bytes(range(16)), "backend": b"cuda", "device": 1,
        "reserved": 0, "handle": b"/dev/shm/hetkv-none", "offset": 0, "length": 16384,
    }  # fmt: skip
    return struct.pack("<8sII16s16sII64sQQ", *{**fields, **changes}.values())


BAD_KEYS = {
    "cut short": (window_key()[:-1], MalformedError, "cut short"),
    "longer than it says": (window_key() + bytes(8), MalformedError, "another length"),
    "later version": (window_key(version=2), UnsupportedError, "has version 2, this side reads 1"),
    "reserved bytes": (window_key(reserved=1), MalformedError, "must be zero"),
    "name without an end": (window_key(backend=b"c" * 16), MalformedError, "must be zero"),
    "slot beyond the allocation": (window_key(length=8192), ProtocolError, "more device memory than its handle"),
    "offset that overflows": (window_key(offset=2**64 - 1), ProtocolError, "more device memory than its handle"),
    "handle that does not open": (window_key(), TransportError, "cannot store into and UCX cannot reach"),
    "another vendor's": (window_key(backend=b"hip"), TransportError, "cannot store into and UCX cannot reach"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_end_the_link(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    key, error, words = BAD_KEYS[name]
    on_device(monkeypatch)
    source, destination = pools()
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, heartbeat_s=60, peer_timeout_s=600)
    with connected([source], [destination], config) as ([sender], [receiver]):
        tx = sender.send("r", [3, 1, 2], 40)
        rx = receiver.receive("r", [7, 5], 40)
        until(lambda: sender.reach(sender.peers[0]) == "peer")
        [peer] = receiver.peers
        grant = Grant((SlotGrant(9, 0, 4096, 16384, key),))
        prelude = Prelude(Type.GRANT, receiver.engine.next_sequence(peer.link))
        receiver.engine.inject(peer.link, wire.encode(prelude, grant, peer.connection.data_keys.send))
        with pytest.raises(error, match=words):
            tx.wait(WAIT_S)
        with pytest.raises(PeerLostError):
            rx.wait(WAIT_S)


def test_a_grant_of_this_process_names_only_its_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of the process is no secret, so an address beside it must be one of a window."""
    on_device(monkeypatch)
    source, destination = pools()
    config = TransferConfig(slot_bytes=4096, window_bytes=4 * 4096, heartbeat_s=60, peer_timeout_s=600)
    with connected([source], [destination], config) as ([sender], [receiver]):
        tx = sender.send("r", [3, 1, 2], 40)
        receiver.receive("r", [7, 5], 40)
        until(lambda: sender.reach(sender.peers[0]) == "peer")
        key = window_key(process=core.process_number())
        [peer] = receiver.peers
        grant = Grant((SlotGrant(9, 0, destination.base(0, "k"), 4096, key),))
        prelude = Prelude(Type.GRANT, receiver.engine.next_sequence(peer.link))
        receiver.engine.inject(peer.link, wire.encode(prelude, grant, peer.connection.data_keys.send))
        with pytest.raises(ProtocolError, match="no window of this process"):
            tx.wait(WAIT_S)


def test_bad_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    other, capturing = HostStream(1), HostStream(0)
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
        with pytest.raises(InputError, match="stream is one of device 1, the pool lies on device 0"):
            tx.send_layer(0, stream=other.number)
        capturing.capture(True)
        with pytest.raises(InputError, match="captures a graph"):
            tx.send_layer(0, stream=capturing.number)
        with pytest.raises(InputError, match="a stream is an integer"):
            tx.send_layer(0, stream="default")
        with pytest.raises(InputError, match="name the stream"):
            rx.wait_stream()
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
            rx.wait_stream(stream.number)
        rx.abort()
    stream.close()


def test_streams_of_a_pool_in_host_memory() -> None:
    source, destination = pools()
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        tx, rx = sender.send("r", [3, 1, 2], 40), receiver.receive("r", [7, 5], 40)
        with pytest.raises(InputError, match="host memory"):
            tx.send_layer(0, stream=1)
        with pytest.raises(InputError, match="host memory"):
            rx.wait_stream(1)
        tx.send_layers()
        rx.wait(WAIT_S)
    with pytest.raises(InputError, match="window='device'"):
        Receiver(destination, secret=SECRET, instance="d", config=TransferConfig(window="device"))


def test_out_of_device_memory_at_the_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    before = library().host_blocks_in_use()
    for memory, refused in ((2048, 1 << 20), ((1 << 20) + 2048, 4096)):
        with options(f"memory={memory}"):
            with pytest.raises(DeviceError, match=rf"cuda:1: allocating {refused} bytes: out of memory"):
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


def test_spans_come_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    with options("slow=20000"), connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 40)
        spans = [*sender.engine.take_trace(), *receiver.engine.take_trace()]
        packs = [stop - start for kind, _, _, start, stop, _ in spans if kind in (1, 3)]
        assert len(packs) >= 6
        assert min(packs) > 15e6, packs
        assert statistics.median(packs) < 60e6, packs


WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import hetkv.node
from device_host import device, HostStream
hetkv.node.device_of = lambda pool: device(0)
from hetkv.config import TransferConfig
from hetkv.pool import KVPool
from hetkv.spec import KVSpec
from hetkv.transfer import Sender
from transfer_peers import randomise, SECRET
spec = KVSpec.uniform(3, 2, 32)
pool = randomise(KVPool.allocate(spec, 24, layout="nhd", block_size=16), 0)
sender = Sender(pool, secret=SECRET, instance="p0", config=TransferConfig(slot_bytes=4096, window_bytes=16384))
print(sender.listen(), flush=True)
for line in sys.stdin:
    request = line.split()[0]
    tx = sender.send(request, [3, 1, 2], 40)
    tx.send_layers()
    if line.split()[1] == "wait":
        tx.wait(20)
        print(sender.reach(sender.peers[0]), flush=True)
    else:
        time.sleep(60)
"""


def start_worker(backend: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, os.path.dirname(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HETKV_HOST_BACKEND": backend, "HETKV_HOST_BACKEND_LIBRARY": library_path()},
    )


def test_another_process_stores_through_an_ipc_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device(monkeypatch)
    source, destination = pools()
    expected = duplicate(destination)
    from transfer_peers import deliver

    worker = start_worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    with Receiver(destination, secret=SECRET, instance="d0", config=SMALL) as receiver:
        receiver.connect(worker.stdout.readline().strip())
        rx = receiver.receive("one", [7, 5], 40)
        print("one wait", file=worker.stdin, flush=True)
        rx.wait(WAIT_S)
        assert worker.stdout.readline().strip() == "peer"
        deliver([(source, [[3, 1, 2]])], expected, [[7, 5]], [(0, 40)])
        assert same_bytes(destination, expected)
        worker.stdin.close()
        assert worker.wait(20) == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_lost_in_the_middle_of_a_pack(monkeypatch: pytest.MonkeyPatch, how: signal.Signals) -> None:
    """A killed sender's slots get new memory; a stopped one's stay in quarantine until it is gone."""
    on_device(monkeypatch)
    _, destination = pools()
    worker = start_worker("slow=2000000")
    assert worker.stdin is not None
    assert worker.stdout is not None
    config = TransferConfig(slot_bytes=4096, window_bytes=16384, heartbeat_s=0.2, peer_timeout_s=1.5)
    with Receiver(destination, secret=SECRET, instance="d0", config=config) as receiver:
        receiver.connect(worker.stdout.readline().strip())
        rx = receiver.receive("one", [7, 5], 40)
        print("one go", file=worker.stdin, flush=True)
        until(lambda: receiver.stats()["lent_slots"] > 0)
        time.sleep(0.3)
        worker.send_signal(how)
        with pytest.raises(PeerLostError):
            rx.wait(WAIT_S)
        if how == signal.SIGSTOP:
            assert receiver.stats()["quarantined_slots"] > 0
            worker.kill()
        worker.wait(10)
        until(lambda: receiver.stats()["quarantined_slots"] == 0)
        worker.stdin.close()
        worker.stdout.close()


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
