"""Whole transfers in one process over real UCX: what arrives, byte for byte, and that nothing else changes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetkv.errors import HandshakeError, InputError, PeerLostError, WaitTimeoutError
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import KVSpec, LayerSpec, Shard
from hetkv.transport.config import TransferConfig
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender
from tests.transport.peers import (
    SECRET,
    WAIT_S,
    check_transfer,
    connected,
    deliver,
    duplicate,
    randomise,
    same_bytes,
    settled,
)

SPEC = KVSpec.uniform(2, 3, 64)
LAYOUTS = ("nhd", "hnd", "nhd_interleaved", "hnd_interleaved", "packed_nhd", "packed_hnd", "rocm")
SMALL = TransferConfig(slot_bytes=16384, window_bytes=4 * 16384)


def pools(spec: KVSpec = SPEC, blocks: int = 24, **options: object) -> tuple[KVPool, KVPool]:
    """Two random pools; options that are pairs differ between source and destination."""
    made = []
    for index in range(2):
        mine = {key: value[index] if isinstance(value, tuple) else value for key, value in options.items()}
        made.append(randomise(KVPool.allocate(spec, blocks, **mine), index))
    return made[0], made[1]


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_every_pair_of_layouts(ours: str, theirs: str) -> None:
    source, destination = pools(layout=(ours, theirs), block_size=(16, 32))
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 201, seed=hash((ours, theirs)) % 1000)
        settled(sender, receiver)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16"), ("bfloat16", "fp8_e4m3fn"),
        ("fp8_e4m3fn", "float16"), ("fp8_e4m3fn", "fp8_e4m3fnuz"), ("fp8_e5m2fnuz", "fp8_e5m2"), ("int8", "int8"),
    ],
)  # fmt: skip
def test_dtypes(ours: str, theirs: str) -> None:
    source, destination = pools(dtype=(ours, theirs), layout=("nhd", "rocm"), block_size=(16, 64))
    with connected([source], [destination]) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 77)


@pytest.mark.parametrize("theirs", ["fp8_e4m3fn", "fp8_e4m3fnuz", "bfloat16"])
def test_fp8_with_scales_per_head(theirs: str) -> None:
    scales = ScaleLayout((0.5, 0.25, 2.0)), None if theirs == "bfloat16" else ScaleLayout((1.0, 0.125, 3.0))
    source, destination = pools(dtype=("fp8_e4m3fn", theirs), scale=scales, block_size=(16, 8))
    with connected([source], [destination]) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 101)
        assert receiver.stats()["frames"] == sender.stats()["frames"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_geometry(data: st.DataObject) -> None:
    heads, dim = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 8, 64, 80, 96, 128]))
    spec = KVSpec.uniform(data.draw(st.integers(1, 3)), heads, dim, data.draw(st.sampled_from([None, 16, 40])))
    sizes = data.draw(st.tuples(*[st.sampled_from([1, 3, 16, 64, 128])] * 2))
    tokens = data.draw(st.integers(1, 300))
    held = data.draw(st.integers(0, tokens))
    names = [name for name in LAYOUTS if name != "rocm" or dim % 8 == 0]
    layouts = data.draw(st.tuples(*[st.sampled_from(names)] * 2))
    made = [
        randomise(KVPool.allocate(spec, -(-300 // size) + 3, layout=layout, block_size=size), index)
        for index, (size, layout) in enumerate(zip(sizes, layouts, strict=True))
    ]
    config = TransferConfig(
        slot_bytes=8192, window_bytes=8192 * data.draw(st.integers(1, 4)), direct=data.draw(st.booleans())
    )
    with connected(made[:1], made[1:], config) as ([sender], [receiver]):
        check_transfer(
            *made, sender, receiver, tokens, num_cached_tokens=held, seed=tokens, tickets_first=data.draw(st.booleans())
        )


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("tickets_first", [True, False])
def test_reach_and_rendezvous(direct: bool, tickets_first: bool) -> None:
    source, destination = pools(block_size=(16, 128))
    config = TransferConfig(slot_bytes=8192, window_bytes=3 * 8192, staging_slots=2, direct=direct)
    with connected([source], [destination], config) as ([sender], [receiver]):
        for number in range(5):
            check_transfer(
                source,
                destination,
                sender,
                receiver,
                300,
                request=f"{number}",
                seed=number,
                tickets_first=tickets_first,
            )
        stats = sender.stats()
        assert stats["direct_frames"] == (stats["frames"] if direct else 0)
        settled(sender, receiver)


def test_chunks_in_any_order_and_extend() -> None:
    source, destination = pools()
    blocks = list(range(24))
    random.Random(3).shuffle(blocks)
    tokens = 350
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        expected = duplicate(destination)
        to = list(range(23, 1, -1))
        deliver([(source, [blocks])], expected, [to], [(0, tokens)])
        rx = receiver.receive("chunks", to, tokens)
        tx = sender.send("chunks", blocks[:4], tokens)
        with pytest.raises(InputError, match="4 blocks"):
            tx.send_layer(0, (0, 65))
        tx.send_layer(1, (20, 64))
        tx.extend(blocks[4:13])
        tx.send_layer(0, (0, 208))
        with pytest.raises(InputError, match="given twice"):
            tx.extend(blocks[:1])
        tx.extend(np.array(blocks[13:22]))
        tx.send_layer(0, (250, 350))
        tx.send_layer(1, (64, 350))
        tx.send_layer(1, (0, 20))
        with pytest.raises(WaitTimeoutError):
            rx.wait(0.05)
        rx.wait_layer(1, WAIT_S)
        tx.send_layer(0, (208, 250))
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        assert same_bytes(destination, expected)


def test_cache_groups_windows_latent_state_and_shared_layers() -> None:
    spec = KVSpec(
        (
            LayerSpec.kv(2, 64, group=0),
            LayerSpec.kv(2, 32, group=1, sliding_window=40),
            LayerSpec.kv(2, 64, shares=0),
            LayerSpec.state(4, 100, group=2),
            LayerSpec.latent(128, 16, group=3),
        )
    )
    source = randomise(KVPool.allocate(spec, [12, 30, 3, 30], block_size=[16, 8, 1, 4]), 1)
    destination = randomise(KVPool.allocate(spec, [5, 9, 2, 60], block_size=[64, 16, 1, 2], layout="hnd"), 2)
    with connected([source], [destination], SMALL) as ([sender], [receiver]):
        check_transfer(source, destination, sender, receiver, 117)
        check_transfer(source, destination, sender, receiver, [117, 117, 1, 100], request="next", num_cached_tokens=33)
        assert receiver.stats()["failed_requests"] == 0
        settled(sender, receiver)


def sharded(spec: KVSpec, tp: int, pp: int = 1, **options: object) -> list[KVPool]:
    return [
        KVPool.allocate(spec, 20, shard=Shard.of(spec, tp, t, pp, p), **options) for p in range(pp) for t in range(tp)
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"), [((1, 1), (2, 1)), ((3, 1), (2, 1)), ((2, 2), (1, 1)), ((4, 1), (2, 2)), ((8, 1), (3, 1))]
)
def test_tensor_and_pipeline_resharding(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    spec = KVSpec.uniform(3, 6, 32)
    whole = randomise(KVPool.allocate(spec, 20), 9)
    sources, destinations = sharded(spec, *ours), sharded(spec, *theirs, layout="hnd", block_size=32)
    for pool in sources:  # each rank holds its heads of one and the same cache
        for layer in pool.layers:
            for name in "kv":
                heads = slice(*pool.shard.heads[layer])
                pool.view(layer, name).view(torch.int16).copy_(whole.view(layer, name).view(torch.int16)[:, :, heads])
    blocks, to = list(range(19, 0, -1)), list(range(3, 15))
    with connected(sources, destinations, SMALL, sharded=True) as (senders, receivers):
        expected = [duplicate(pool) for pool in destinations]
        for pool in expected:
            deliver([(whole, [blocks])], pool, [to], [(0, 290)])
        receives = [receiver.receive("sharded", to, 290) for receiver in receivers]
        sends = [sender.send("sharded", blocks, 290) for sender in senders]
        for tx in sends:
            tx.send_layers()
        for pending in [*receives, *sends]:
            pending.wait(WAIT_S)
        assert all(same_bytes(pool, wanted) for pool, wanted in zip(destinations, expected, strict=True))
        settled(*senders, *receivers)


@pytest.mark.parametrize("direct", [True, False])
def test_one_slot_and_many_senders(direct: bool) -> None:
    """Senders take turns with the only slot; one that holds it and waits for its prefill gives it back."""
    sources = [randomise(KVPool.allocate(SPEC, 24), n) for n in range(4)]
    destination = KVPool.allocate(SPEC, 4 * 13)
    config = TransferConfig(slot_bytes=4096, window_bytes=4096, staging_slots=1, direct=direct)
    with connected(sources, [destination], config) as (senders, [receiver]):
        expected = duplicate(destination)
        ids = [list(range(n * 13, n * 13 + 13)) for n in range(4)]
        for n in range(4):
            deliver([(sources[n], [list(range(13))])], expected, [ids[n]], [(0, 200)])
        lazy = receiver.receive("0", ids[0], 200, src_instance="p0")
        first = senders[0].send("0", list(range(13)), 200)
        first.send_layer(0)
        lazy.wait_layer(0, WAIT_S)  # now it holds the slot and waits for layer 1
        rest = [receiver.receive(f"{n}", ids[n], 200, src_instance=f"p{n}") for n in range(1, 4)]
        sends = [senders[n].send(f"{n}", list(range(13)), 200) for n in range(1, 4)]
        for tx in sends:
            tx.send_layers()
        for pending in [*rest, *sends]:
            pending.wait(WAIT_S)
        first.send_layer(1)
        lazy.wait(WAIT_S)
        first.wait(WAIT_S)
        assert same_bytes(destination, expected)
        settled(*senders, receiver)


def test_several_receivers_on_one_sender() -> None:
    source = randomise(KVPool.allocate(SPEC, 24), 0)
    destinations = [randomise(KVPool.allocate(SPEC, 24, layout=name), 5) for name in ("hnd", "rocm", "packed_nhd")]
    with connected([source], destinations, SMALL) as ([sender], receivers):
        for number, (pool, receiver) in enumerate(zip(destinations, receivers, strict=True)):
            check_transfer(source, pool, sender, receiver, 150, request=f"{number}")
        rx = receivers[0].receive("same", list(range(4)), 64)
        tx = sender.send("same", list(range(4)), 64)
        tx.send_layer(0)
        rx.wait_layer(0, WAIT_S)
        second = receivers[1].receive("same", list(range(4)), 64)
        with pytest.raises(Exception, match="on its way to instance d0"):
            second.wait(WAIT_S)
        tx.send_layer(1)
        rx.wait(WAIT_S)
        tx.wait(WAIT_S)
        settled(sender, *receivers)


def test_everything_held_asks_for_nothing() -> None:
    source, destination = pools()
    with connected([source], [destination]) as ([sender], [receiver]):
        for tickets_first in (True, False):
            check_transfer(
                source,
                destination,
                sender,
                receiver,
                64,
                request=f"{tickets_first}",
                num_cached_tokens=64,
                tickets_first=tickets_first,
            )
        assert receiver.stats()["frames"] == 0
        settled(sender, receiver)


def test_a_slot_that_holds_no_token_is_rejected() -> None:
    source, destination = pools()
    small, large = TransferConfig(slot_bytes=512, window_bytes=512), TransferConfig()
    for ours, theirs in ((small, large), (large, small)):
        with Sender(source, secret=SECRET, instance="p", config=ours) as sender:
            with Receiver(destination, secret=SECRET, instance="d", config=theirs) as receiver:
                # One side names slot_bytes; the other sees the link rejected, or gone if it wrote at that moment.
                with pytest.raises((PeerLostError, InputError, HandshakeError)):
                    receiver.connect(sender.listen())
                assert receiver.peers == []
