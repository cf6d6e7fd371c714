"""Senders and receivers in one process, and what a transfer must leave in every byte of the receiver's memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from hetkv.control.conversion import segment_conversion
from hetkv.errors import HetkvError
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import Interval, KVSpec
from hetkv.reference import remap as reference
from hetkv.transport.config import TransferConfig
from hetkv.transport.link_plan import wanted
from hetkv.transport.receiver import Receiver
from hetkv.transport.sender import Sender

SECRET = b"a secret of tests"
WAIT_S = 20.0
Blocks = list[list[int]]


def randomise(pool: KVPool, seed: int) -> KVPool:
    """Every byte of the pool's memory random: all codes of all formats, NaN and infinity too."""
    generator = torch.Generator().manual_seed(seed)
    for memory in pool.layers.values():
        for tensor in memory.tensors.values():
            tensor.copy_(torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=generator))
    return pool


def duplicate(pool: KVPool) -> KVPool:
    """A pool of the same layouts over a copy of the memory."""
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return copies.setdefault(tensor.data_ptr(), tensor.clone())

    layers = {
        index: memory._replace(tensors={name: copy(tensor) for name, tensor in memory.tensors.items()})
        for index, memory in pool.layers.items()
    }
    return KVPool(pool.spec, pool.shard, layers)


def same_bytes(a: KVPool, b: KVPool) -> bool:
    """Whether two pools of the same layouts hold the same bytes everywhere."""
    return all(
        torch.equal(tensor, b.layers[index].tensors[name])
        for index, memory in a.layers.items()
        for name, tensor in memory.tensors.items()
    )


def side(pool: KVPool, layer: int, name: str, blocks: Blocks, token: int, head: int) -> reference.Paged:
    """One sequence's segment for the oracle; `head` is global."""
    memory, group = pool.layers[layer], pool.spec.group_of(layer)
    first = head - pool.shard.heads[layer].start
    return reference.Paged(
        memory.tensors[name],
        memory.layout.segments[name],
        memory.layout.block_size,
        memory.num_blocks,
        blocks[group],
        token,
        first,
    )


def deliver(
    sources: Sequence[tuple[KVPool, Blocks]], pool: KVPool, blocks: Blocks, want: Sequence[tuple[int, int]]
) -> None:
    """What a correct transfer does, by the oracle, head by head: `want` tokens of all layers of `pool`."""
    for layer, memory in pool.layers.items():
        start, stop = want[pool.spec.group_of(layer)]
        if start == stop:
            continue
        for segment in pool.spec.layers[layer].segments:
            for head in range(*pool.shard.heads[layer]):
                one = Interval(head, head + 1)
                source, held = next(
                    (s, b) for s, b in sources if layer in s.layers and (s.shard.heads[layer] & one).size == 1
                )
                here, there = source.layers[layer].layout.segments[segment.name], memory.layout.segments[segment.name]
                step = segment_conversion(here, there, one, source.shard.heads[layer], pool.shard.heads[layer])
                size = (stop - start) * segment.channels * step.wire.itemsize
                wire = reference.Canonical(torch.zeros(size, dtype=torch.uint8), step.wire)
                shape = stop - start, 1, segment.channels
                reference.remap(side(source, layer, segment.name, held, start, head), wire, *shape, step.pack)
                reference.remap(wire, side(pool, layer, segment.name, blocks, start, head), *shape, step.unpack)


def pick_blocks(pool: KVPool, tokens: Sequence[int], generator: torch.Generator) -> Blocks:
    """Shuffled distinct block ids that hold `tokens` of each cache group."""
    out = []
    for group, count in enumerate(tokens):
        size, blocks = pool.cache_groups.get(group, (1, count))
        out.append(torch.randperm(blocks, generator=generator)[: -(-count // size)].tolist())
    return out


@contextlib.contextmanager
def connected(
    sources: Sequence[KVPool],
    destinations: Sequence[KVPool],
    config: TransferConfig | None = None,
    receiver_config: TransferConfig | None = None,
    **options: Any,
) -> Iterator[tuple[list[Sender], list[Receiver]]]:
    """Senders and receivers over these pools, each pair that shares heads linked; instances of one rank each, or whole
    instances where the pools are shards."""
    with contextlib.ExitStack() as stack:

        def nodes(kind: type[Any], pools: Sequence[KVPool], prefix: str, settings: TransferConfig | None) -> list[Any]:
            shards = [pool.shard for pool in pools]
            one = len(pools) > 1 and options.get("sharded", False)
            return [
                stack.enter_context(
                    kind(
                        pool,
                        secret=SECRET,
                        instance=prefix if one else f"{prefix}{rank}",
                        rank=rank if one else 0,
                        instance_shards=shards if one else (),
                        config=settings,
                        tls=options.get("tls"),
                    )
                )
                for rank, pool in enumerate(pools)
            ]

        senders = nodes(Sender, sources, "p", config)
        receivers = nodes(Receiver, destinations, "d", receiver_config or config)
        for sender in senders:
            address = sender.listen()
            for receiver in receivers:
                heads = zip(sender.pool.shard.heads, receiver.pool.shard.heads, strict=True)
                layers = sender.pool.shard.layers & receiver.pool.shard.layers
                if any((a & b).size for index, (a, b) in enumerate(heads) if layers.start <= index < layers.stop):
                    receiver.connect(address)
        for sender in senders:
            links = sum(sender.description.instance in {p.description.instance for p in r.peers} for r in receivers)
            until(lambda sender=sender, links=links: options.get("sharded", False) or len(sender.peers) == links)
        yield senders, receivers


AT_REST = ("open_requests", "pending_tickets", "granted_slots")
"""What `stats` counts as 0 where nothing is under way."""


def settled(*nodes: Sender | Receiver) -> None:
    """Wait until no node holds a request, a ticket or a slot, as after any request they must."""
    for node in nodes:
        until(
            lambda node=node: (
                not any(node.stats()[key] for key in ("open_requests", "pending_tickets", "granted_slots"))
            ),
            lambda node=node: f"{node.role} still holds {node.stats()}",
        )
        until(lambda node=node: not node.requests.watched)


def until(
    condition: Callable[[], bool], why: Callable[[], str] = lambda: "condition not met", seconds: float = 5.0
) -> None:
    """Poll for something that happens in another thread or process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.002)


@contextlib.contextmanager
def attacked(make_peer: Callable[[Receiver], Any], spec: KVSpec, config: TransferConfig) -> Iterator[tuple[Any, Any]]:
    """A hostile peer, and a request for which it was granted all four slots; no byte of the pool changes."""
    pool = randomise(KVPool.allocate(spec, 16), 1)
    before = duplicate(pool)
    with Receiver(pool, secret=SECRET, instance="d", config=config) as receiver:
        peer = make_peer(receiver)
        try:
            until(lambda: bool(receiver.peers))
            want = receiver.receive("r", [1, 2], 32)
            until(lambda: receiver.stats()["granted_slots"] == 4)
            yield peer, want
        finally:
            peer.close()
        assert same_bytes(pool, before)
        with pytest.raises(HetkvError):
            want.wait(WAIT_S)


def check_transfer(
    source: KVPool,
    destination: KVPool,
    sender: Sender,
    receiver: Receiver,
    tokens: int | list[int],
    *,
    request: str = "request",
    num_cached_tokens: int = 0,
    seed: int = 0,
    tickets_first: bool = True,
    send: Callable[[Any], None] | None = None,
) -> None:
    """One request with random blocks on both sides; every byte of the receiver's pool is as the oracle says."""
    generator = torch.Generator().manual_seed(seed)
    spec = source.spec
    counts = [tokens] * spec.num_groups if isinstance(tokens, int) else list(tokens)
    for layer in spec.layers:
        if layer.kind == "state":
            counts[layer.group] = 1
    from_blocks, to_blocks = pick_blocks(source, counts, generator), pick_blocks(destination, counts, generator)
    expected = duplicate(destination)
    kept = [
        0 if any(x.kind == "state" and x.group == g for x in spec.layers) else num_cached_tokens
        for g in range(spec.num_groups)
    ]
    deliver([(source, from_blocks)], expected, to_blocks, wanted(receiver.description, counts, kept))
    rx = receiver.receive(request, to_blocks, tokens, num_cached_tokens=num_cached_tokens) if tickets_first else None
    tx = sender.send(request, from_blocks, tokens)
    (send or (lambda tx: tx.send_layers()))(tx)
    rx = rx or receiver.receive(request, to_blocks, tokens, num_cached_tokens=num_cached_tokens)
    rx.wait(WAIT_S)
    tx.wait(WAIT_S)
    tx.wait_packed(WAIT_S)
    for layer in rx.layers:
        rx.wait_layer(layer, 0)
    assert same_bytes(destination, expected)
