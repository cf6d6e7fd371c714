"""The public API: a `Sender` beside the prefill pool, a `Receiver` beside the decode pool.

    sender = Sender(prefill_pool, secret=secret, instance="prefill-0")
    address = sender.listen("0.0.0.0:7000")
    tx = sender.send("request-1", block_ids, num_tokens)       # before or after the ticket
    for layer in range(num_layers):
        ...                                                    # compute the layer
        tx.send_layer(layer)                                   # microseconds: the rest happens beside the compute

    receiver = Receiver(decode_pool, secret=secret, instance="decode-0")
    receiver.connect(address)
    receiver.receive("request-1", block_ids, num_tokens).wait()
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Union

from hetkv.errors import HetkvError, InputError, PeerLostError
from hetkv.link import linked_ranks, wanted
from hetkv.node import COMPLETE, FAILED, LAYER, PACKED, Node, Peer
from hetkv.pending import Pending, RequestId, request_key, settle, wait_for
from hetkv.spec import KVSpec

if TYPE_CHECKING:
    from hetkv import _core

BlockIds = Union[Sequence[int], Sequence[Sequence[int]]]
"""Block ids of one sequence in token order: one list, or one list per cache group."""


class Transmission(Pending):
    """A request that this side sends. Complete when every receiver of the request has verified its part."""

    def __init__(self, request_id: RequestId, sender: Sender, handle: int, tokens: list[int], blocks: list[list[int]]) -> None:
        super().__init__(request_id, sender.engine, handle)
        self.packed: Future[None] = Future()
        """Done when the request's blocks are not read any more: they may be freed though the transfer goes on."""
        self._pool = sender.pool
        self._tokens, self._blocks = tokens, blocks

    def send_layer(self, layer: int, tokens: tuple[int, int] | None = None) -> None:
        """The KV of a global layer is in the pool, for `tokens` `[start, stop)` or the whole request; returns at once.

        Legal before any ticket. Those tokens of the layer must not change until `packed`. Tokens of one layer are sent
        once; chunks may come in any order. A `state` layer is one record: leave `tokens` out.
        """
        group = self._pool.spec.layers[layer].group
        start, stop = tokens or (0, self._tokens[group])
        if layer not in self._pool.layers or not 0 <= start <= stop <= self._tokens[group]:
            raise InputError(
                f"layer {layer}, tokens [{start}, {stop}): the pool holds layers [{self._pool.shard.layers.start}, "
                f"{self._pool.shard.layers.stop}), the request {self._tokens[group]} tokens"
            )
        if stop > len(self._blocks[group]) * self._pool.groups[group][0]:
            raise InputError(f"layer {layer}, tokens [{start}, {stop}): the request has {len(self._blocks[group])} blocks")
        if stop > start:
            self._engine.send_layer(self.handle, layer, start, stop)

    def send_layers(self) -> None:
        """`send_layer` for every layer of the pool: what a prefill did that finished before."""
        for layer in self._pool.layers:
            self.send_layer(layer)

    def extend(self, block_ids: Sequence[int], group: int = 0) -> None:
        """More blocks of a cache group, as a chunked prefill allocates them."""
        blocks = self._blocks[group] + list(block_ids)
        block_size = self._pool.groups[group][0]
        self._pool.check_blocks(group, blocks, 0, min(self._tokens[group], len(blocks) * block_size))
        self._blocks[group] = blocks
        self._engine.extend(self.handle, group, list(block_ids))

    def wait_packed(self, timeout: float | None = None) -> None:
        """Block until the request's blocks may be freed."""
        wait_for(self.packed, timeout)

    def on_event(self, kind: int, layer: int, error: HetkvError | None) -> None:
        if kind in (PACKED, COMPLETE):
            settle(self.packed)
        elif kind == FAILED:
            settle(self.packed, error)
        super().on_event(kind, layer, error)


class Sender(Node[Transmission]):
    """The prefill side of one rank."""

    role = "sender"

    def _make_engine(self, config: _core.EngineConfig) -> object:
        from hetkv.core import core

        return core.Sender(config)

    def send(
        self, request_id: RequestId, block_ids: BlockIds, num_tokens: int | Sequence[int], *, hold_s: float | None = None
    ) -> Transmission:
        """Announce a request of `num_tokens` tokens (of each cache group) in these blocks; returns at once.

        It takes no slot and no copy. The request fails with `LeaseExpiredError` when it is not complete within `hold_s`
        seconds (default: the configuration's). Block ids that cannot be raise `InputError`. With chunked prefill,
        `block_ids` may be only the first blocks: see `Transmission.extend`.
        """
        key = request_key(request_id)
        tokens, blocks = per_group(self.pool.spec, num_tokens, block_ids)
        for group, ids in enumerate(blocks):
            room = len(ids) * self.pool.groups[group][0] if group in self.pool.groups else 0
            self.pool.check_blocks(group, ids, 0, min(tokens[group], room))
        hold = self.config.hold_s if hold_s is None else hold_s

        def make() -> Transmission:
            handle = self.engine.submit(key, tokens, blocks, round(hold * 1000))
            return Transmission(request_id, self, handle, tokens, blocks)

        return self._submit(make)

    def _retire(self, peer: Peer) -> None:
        pass  # what a receiver that ended leaves behind is its own


class Reception(Pending):
    """A request that this side receives. Complete when every layer is verified and in the pool."""

    def __init__(self, request_id: RequestId, engine: Any, handle: int, layers: Sequence[int]) -> None:
        super().__init__(request_id, engine, handle)
        self.layers: dict[int, Future[None]] = {layer: Future() for layer in layers}
        """By global layer: done when that layer is verified and in the pool."""

    def wait_layer(self, layer: int, timeout: float | None = None) -> None:
        """Block until one layer is in the pool: a decoder can start on it while others travel."""
        wait_for(self.layers[layer], timeout)

    def on_event(self, kind: int, layer: int, error: HetkvError | None) -> None:
        if kind == LAYER:
            settle(self.layers[layer])
        else:
            for future in self.layers.values():
                settle(future, error)
        super().on_event(kind, layer, error)


class Receiver(Node[Reception]):
    """The decode side of one rank. Until a request is complete its blocks are undefined; no other byte ever changes."""

    role = "receiver"

    def _make_engine(self, config: _core.EngineConfig) -> object:
        from hetkv.core import core

        return core.Receiver(config)

    def receive(
        self,
        request_id: RequestId,
        block_ids: BlockIds,
        num_tokens: int | Sequence[int],
        *,
        held: int | Sequence[int] = 0,
        source: str | None = None,
        lease_s: float | None = None,
    ) -> Reception:
        """Ask for a request's KV: give its senders a ticket. Returns at once.

        `block_ids` cover `num_tokens` tokens; the first `held` of them are in the pool already and are not sent. `source`
        names the sending instance; it may be left out where only one is connected. Block ids that cannot be raise
        `InputError`, a rank of the source that is not connected `PeerLostError`.
        """
        key = request_key(request_id)
        tokens, blocks = per_group(self.pool.spec, num_tokens, block_ids)
        kept = [held] * len(tokens) if isinstance(held, int) else list(held)
        if len(kept) != len(tokens) or any(not 0 <= a <= b for a, b in zip(kept, tokens, strict=True)):
            raise InputError(f"{held} tokens held of {num_tokens}")
        want = wanted(self.description, tokens, kept)
        for group, ids in enumerate(blocks):
            self.pool.check_blocks(group, ids, *want[group])
        links = [peer.link for peer in self._sources(source)]
        lease = self.config.lease_s if lease_s is None else lease_s

        def make() -> Reception:
            handle = self.engine.receive(key, want, blocks, links, max(1, round(lease * 1000)))
            return Reception(request_id, self.engine, handle, list(self.pool.layers))

        return self._submit(make)

    def _sources(self, source: str | None) -> list[Peer]:
        """Every rank of the source instance that holds something this rank holds too."""
        peers = self.peers
        names = sorted({peer.description.instance for peer in peers})
        if source is None and len(names) != 1:
            raise PeerLostError(f"connected instances are {names}: " + ("name the source" if names else "connect one first"))
        chosen = {peer.description.rank: peer for peer in peers if peer.description.instance == (source or names[0])}
        if not chosen:
            raise PeerLostError(f"instance {source!r} is not connected; connected are {names}")
        theirs = next(iter(chosen.values())).description
        missing = [rank for rank in linked_ranks(self.description, theirs) if rank not in chosen]
        if missing:
            raise PeerLostError(f"ranks {missing} of instance {theirs.instance!r} are not connected")
        return list(chosen.values())

    def _retire(self, peer: Peer) -> None:
        self.engine.retire_link(peer.link)


def per_group(spec: KVSpec, num_tokens: int | Sequence[int], block_ids: BlockIds) -> tuple[list[int], list[list[int]]]:
    """Token counts and block ids per cache group; a `state` group has one record, whatever the token count."""
    groups = spec.num_groups
    blocks = [[int(b) for b in ids] for ids in block_ids] if block_ids and not isinstance(block_ids[0], int) else None
    if blocks is None:
        blocks = [[int(b) for b in block_ids]]  # type: ignore[arg-type]
    tokens = [num_tokens] * groups if isinstance(num_tokens, int) else [int(n) for n in num_tokens]
    if len(blocks) != groups or len(tokens) != groups:
        raise InputError(f"the model has {groups} cache groups; got block ids of {len(blocks)}, token counts of {len(tokens)}")
    for layer in spec.layers:
        if layer.kind == "state":
            tokens[layer.group] = 1
    if any(count < 1 for count in tokens):
        raise InputError(f"a request has at least one token, not {num_tokens}")
    return tokens, blocks
