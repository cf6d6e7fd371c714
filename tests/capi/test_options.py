"""Options of the C library that only show between two nodes: priorities, and what is read again from the pool."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetkv import KVPool, KVSpec, Receiver, Sender, TransferConfig
from hetkv.errors import ChecksumError
from tests.capi.library import library

LAYERS, BLOCKS, BLOCK, WAIT_S = 2, 64, 16, 20
SPEC = KVSpec.uniform(num_layers=LAYERS, num_kv_heads=2, head_dim=64)
SECRET = b"a secret of the C library's tests"
POOL_CHECKSUM, INPUT = 14, 1
text, pointer, size, u32, u64 = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint64


def structure(**fields: Any) -> Any:
    return type("Structure", (ctypes.Structure,), {"_fields_": list(fields.items())})


Segment = structure(name=text, heads=u32, channels=u32)
Layer = structure(kind=u32, group=u32, sliding_window=u32, shares=u32, num_segments=u32, segments=pointer)
SegmentMemory = structure(
    base=pointer, dtype=u32, block_stride=u64, token_stride=u64, head_stride=u64, channel_stride=u64, pack=u64,
    pack_stride=u64, scales=pointer, num_scales=u32,
)  # fmt: skip
LayerMemory = structure(layer=u32, block_size=u32, num_blocks=u32, segments=pointer)
PoolConfig = structure(
    struct_bytes=size, layers=pointer, num_layers=u32, tp=u32, pp=u32, rank=u32, memory=pointer, num_memory=u32,
    device=text,
)  # fmt: skip
NodeConfig = structure(
    struct_bytes=size, instance=text, secret=text, secret_bytes=size, slot_bytes=u64, window_bytes=u64, threads=u32,
    heartbeat_ms=u32, peer_timeout_ms=u32, lease_ms=u32, hold_ms=u32, handshake_timeout_ms=u32, fingerprint=pointer,
    num_fingerprint=u32, verify_pool=u32, isolate_peers=u32, backends=text,
)  # fmt: skip
Blocks = structure(ids=pointer, num_ids=size, num_tokens=u64, num_cached_tokens=u64)
RequestConfig = structure(
    struct_bytes=size, id=text, groups=pointer, num_groups=u32, content=pointer, source=text, limit_ms=u32,
    priority=ctypes.c_int32,
)  # fmt: skip


def check(status: int) -> None:
    function = library().hetkv_error
    function.restype = text
    assert status == 0, function()


def address_of(array: Any) -> int:
    return ctypes.addressof(array)


class Node:
    """A node of the library over float32 memory `[layer, k or v, block, token, head, channel]`."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.memory = np.zeros((LAYERS, 2, BLOCKS, BLOCK, 2, 64), np.float32)
        segments = (Segment * 2)(*(Segment(name, 2, 64) for name in (b"k", b"v")))
        layers = (Layer * LAYERS)(*(Layer(0, 0, 0, 0, 2, address_of(segments)) for _ in range(LAYERS)))
        strides = self.memory.strides[2:5]
        parts = [
            (SegmentMemory * 2)(*(SegmentMemory(part.ctypes.data, 1, *strides, 0, 0, 0, None, 0) for part in layer))
            for layer in self.memory
        ]
        held = (LayerMemory * LAYERS)(
            *(LayerMemory(at, BLOCK, BLOCKS, address_of(one)) for at, one in enumerate(parts))
        )
        config = PoolConfig(
            ctypes.sizeof(PoolConfig), address_of(layers), LAYERS, 1, 1, 0, address_of(held), LAYERS, None
        )
        self.pool, self.node = pointer(), pointer()
        check(library().hetkv_pool_create(ctypes.byref(config), ctypes.byref(self.pool)))
        given = NodeConfig(struct_bytes=ctypes.sizeof(NodeConfig), instance=kind.encode(), **settings)
        given.secret, given.secret_bytes = SECRET, len(SECRET)
        make = getattr(library(), f"hetkv_{kind}_create")
        self.status = make(self.pool, ctypes.byref(given), ctypes.byref(self.node))

    def begin(self, how: str, name: str, first: int, count: int, priority: int = 0, source: bytes | None = None) -> Any:
        ids = (ctypes.c_int32 * count)(*range(first, first + count))
        group = (Blocks * 1)(Blocks(address_of(ids), count, count * BLOCK, 0))
        config = RequestConfig(ctypes.sizeof(RequestConfig), name.encode(), address_of(group), 1, priority=priority)
        config.source = source
        request = pointer()
        check(getattr(library(), f"hetkv_{how}")(self.node, ctypes.byref(config), ctypes.byref(request)))
        return request

    def listen(self) -> str:
        bound = ctypes.create_string_buffer(64)
        check(library().hetkv_listen(self.node, b"127.0.0.1:0", bound, size(64)))
        return bound.value.decode()


@contextmanager
def node(kind: str, **settings: Any) -> Iterator[Node]:
    made = Node(kind, **settings)
    check(made.status)
    try:
        yield made
    finally:
        library().hetkv_node_close(made.node)
        library().hetkv_pool_free(made.pool)


def wait(request: Any) -> int:
    status: int = library().hetkv_wait(request, ctypes.c_int64(WAIT_S * 1000))
    return status


def python_pool() -> KVPool:
    made = KVPool.allocate(SPEC, BLOCKS, layout="nhd", block_size=BLOCK, dtype="float32")
    for number, memory in enumerate(made.layers.values()):
        for tensor in memory.tensors.values():
            tensor.copy_(torch.randint(1, 64, tensor.shape, generator=torch.Generator().manual_seed(number)))
    return made


def test_lower_priorities_leave_first() -> None:
    """A frame of each fills the only slot."""
    priorities = [7, 0, -3, 2**31 - 1, -(2**31)]
    slot = 4 * BLOCK * 2 * 64 * 4 * 2
    config = TransferConfig(slot_bytes=slot, window_bytes=slot, trace=True, bundle_frames=1)
    with node("sender") as sender, Receiver(python_pool(), instance="d", secret=SECRET, config=config) as receiver:
        receiver.connect(sender.listen())
        sent = [sender.begin("send", f"{at}", 4 * at, 4, one) for at, one in enumerate(priorities)]
        asked = [receiver.receive(f"{at}", list(range(4 * at, 4 * at + 4)), 4 * BLOCK) for at in range(len(sent))]
        last = sender.begin("send", "last", 60, 1)
        wanted = receiver.receive("last", [60], BLOCK)
        for layer in range(LAYERS):
            check(library().hetkv_send_layer(last, layer, u64(0), u64(0), None))
        wanted.wait(WAIT_S)  # all tickets have come
        batch = (pointer * len(sent))(*sent)
        for layer in range(LAYERS):
            check(library().hetkv_send_batch(batch, size(len(sent)), layer, None, None, None))
        for handle in asked:
            handle.wait(WAIT_S)
        order = [span[1] for span in receiver.engine.take_trace() if span[0] == "unpack"]
        assert all(wait(one) == 0 for one in (*sent, last))
        for one in (*sent, last):
            library().hetkv_request_free(one)
    handles = [handle.handle for handle in asked]
    last_frame = {handles.index(one): at for at, one in enumerate(order) if one in handles}
    assert sorted(last_frame, key=last_frame.__getitem__) == [4, 2, 1, 0, 3]


def test_another_writer_to_the_pool_is_seen_where_it_is_read_again() -> None:
    for verify in (0, 1):
        with node("receiver", verify_pool=verify) as receiver:
            with Sender(python_pool(), instance="p", secret=SECRET) as sender:
                address = sender.listen()
                check(library().hetkv_connect(receiver.node, address.encode()))
                sent = [sender.send(name, [first], BLOCK) for name, first in (("a", 0), ("b", 4))]
                asked = [receiver.begin("receive", name, 3, 1) for name in "ab"]
                last, wanted = sender.send("last", [9], BLOCK), receiver.begin("receive", "last", 9, 1)
                last.send_layers()
                last.wait(WAIT_S)  # both tickets have come
                sender.batch(sent).send_layers()
                assert [wait(one) for one in (*asked, wanted)] == [POOL_CHECKSUM if verify else 0, 0, 0]
                if verify:
                    with pytest.raises(ChecksumError):
                        sent[0].wait(WAIT_S)
                for one in (*asked, wanted):
                    library().hetkv_request_free(one)


def slots_memory() -> set[str]:
    """What is mapped of windows by this process, by either side: their inodes."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "memfd:hetkv-window" in line}


@pytest.mark.parametrize("isolated", [0, 1])
def test_the_only_slot_goes_from_one_peer_to_another(isolated: int) -> None:
    slot, before, seen = 1 << 16, slots_memory(), set[str]()
    with node("receiver", isolate_peers=isolated, slot_bytes=slot, window_bytes=slot) as receiver, ExitStack() as stack:
        senders = [stack.enter_context(Sender(python_pool(), instance=name, secret=SECRET)) for name in "pq"]
        for sender in senders:
            check(library().hetkv_connect(receiver.node, sender.listen().encode()))
        for turn in range(4):
            sent = senders[turn % 2].send(f"{turn}", [turn], BLOCK)
            asked = receiver.begin("receive", f"{turn}", turn, 1, source=b"pq"[turn % 2 : turn % 2 + 1])
            sent.send_layers()
            assert wait(asked) == 0
            sent.wait(WAIT_S)
            library().hetkv_request_free(asked)
            seen |= slots_memory() - before
    assert len(seen) == (4 if isolated else 1)


@pytest.mark.parametrize("option", ["verify_pool", "isolate_peers"])
def test_another_value_is_rejected(option: str) -> None:
    made = Node("receiver", **{option: 2})
    assert made.status == INPUT
    library().hetkv_pool_free(made.pool)
