"""The prefill side of one rank: `Sender`, and `SendHandle` for each request.

sender = Sender(prefill_pool, instance="prefill-0")
address = sender.listen("0.0.0.0:7000")
tx = sender.send("request-1", block_ids, num_tokens)       # before or after the ticket
for layer in range(num_layers):
    ...                                                    # compute the layer
    tx.send_layer(layer)                                   # microseconds: the rest runs during the compute
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from operator import index
from typing import TYPE_CHECKING, Any, Literal

from hetkv.control.payloads import Ask, Payload, as_payload
from hetkv.errors import InputError, MessageError
from hetkv.kv.spec import Interval
from hetkv.transport.batch import SendBatch
from hetkv.transport.blocks import BlockIds, block_array, milliseconds, per_group
from hetkv.transport.content import check_content
from hetkv.transport.handle import (
    Handle,
    RequestId,
    in_time,
    making,
    request_key,
    running,
    settle,
)
from hetkv.transport.link_plan import wanted
from hetkv.transport.node import Node
from hetkv.transport.payloads import OfferedPayloads
from hetkv.transport.peer import Peer

if TYPE_CHECKING:
    import hetkv._core as _core

Path = Literal["rma", "shm", "device", "stream"]
"""`device`: packed straight into memory of the peer's device. `shm`: packed straight into host memory that both sides
map. `rma`: packed into staging, then put by UCX."""


def check_priority(priority: int) -> None:
    """Raise `InputError` for what is no priority."""
    if not isinstance(priority, int) or not -(2**31) <= priority < 2**31:
        raise InputError(f"priority is {priority!r}: an integer of 32 bits")


class SendHandle(Handle):
    """A request that this side sends. Complete when every receiver of the request has verified its part."""

    _packed: Future[None] | None = None
    _carries: Callable[[bytes, int | None], None] | None

    def __init__(
        self,
        request_id: RequestId,
        sender: Sender,
        outcome: _core.Outcome,
        tokens: list[Interval],
        blocks: list[array[int]],
        carries: Callable[[bytes, int | None], None],
    ) -> None:
        super().__init__(request_id, sender, outcome)
        self._carries = carries
        self.sender = sender
        self._pool, self._device, self._engine = sender.pool, sender.device, sender.engine
        self._tokens, self._blocks = tokens, blocks
        self._room = [len(ids) * sender.pool.block_size_of(group) for group, ids in enumerate(blocks)]
        """Tokens by cache group that the blocks hold; none where the pool has no layers of the group."""
        self._batched = [0] * len(tokens)
        """Tokens by cache group that are in batches: those hand them over in every layer."""
        self._given: dict[int, int] = {}
        """Tokens of each layer that were handed over, needed or not: other ranks or the receiver may have them."""
        self._group_of = sender.group_of

    def send_layer(self, layer: int, tokens: tuple[int, int] | None = None, *, stream: Any = None) -> None:
        """The KV of a global layer is in the pool, for `tokens` `[start, stop)` or the whole request; returns at once.

        Legal before any ticket. Those tokens of the layer must not change until `packed`. Tokens of one layer are sent
        once; chunks may come in any order. A `state` layer is one record: leave `tokens` out. Nothing happens where the
        request has failed, as a prefill learns that late, or where no receiver needs this rank's part of it. A layer
        that was handed over whole, of a request that is complete, raises `InputError`.

        Where the pool is on a device, the layer will be in it once the work that `stream` holds now has run: an
        integer (`cudaStream_t`, `hipStream_t`), a `torch.cuda.Stream`, or PyTorch's current stream by default. Raises
        `InputError` for a stream of another device, or one that captures a graph.
        """
        group = self._group_of.get(layer)
        if group is None:
            raise InputError(f"layer {layer}: the pool holds layers {list(self._group_of)}")
        try:
            start, stop = self.tokens_of(group, tokens)
        except InputError as error:
            raise InputError(f"layer {layer}: {error}") from None
        given, counted = self._given.get(layer, 0), self._counted(group, start, stop)
        whole = counted and given + self._batched[group] >= self._tokens[group].size
        if whole and self.outcome.ended and self.error is None:
            raise InputError(f"layer {layer}: request {self.request_id!r} is complete, every layer of it was sent")
        if self._device is not None:
            stream = self._device.stream(stream)
        elif stream is not None:
            raise InputError("the pool is in host memory: no stream has to be waited for")
        if stop > start:
            self._engine.send_layer(self.handle, layer, start, stop, stream)
        self._given[layer] = given + counted

    def send_layers(self, *, stream: Any = None) -> None:
        """`send_layer` for every layer of the pool: what a prefill did that finished before."""
        if self.done() and self.error is None and all(map(self._sent_whole, self._group_of)):
            raise InputError(f"request {self.request_id!r} is complete, every layer of it was sent")
        SendBatch(self.sender, [self]).send_layers(stream=stream)

    def _sent_whole(self, layer: int) -> bool:
        group = self._group_of[layer]
        return self._given.get(layer, 0) + self._batched[group] >= self._tokens[group].size

    def _counted(self, group: int, start: int, stop: int) -> int:
        """How many of these tokens the request has: a sliding window leaves those before it out."""
        span = self._tokens[group]
        return max(0, min(stop, span.stop) - max(start, span.start))

    def batched(self, group: int, start: int, stop: int) -> None:
        """A batch sends these tokens in every layer of the cache group."""
        self._batched[group] += self._counted(group, start, stop)

    def tokens_of(self, group: int, tokens: tuple[int, int] | None, whole: bool = False) -> tuple[int, int]:
        """`tokens`, or all of them, as the engine takes them of a cache group. Raises `InputError`.

        `whole`: the group's layers have one record, which goes with the request's last tokens.
        """
        count, room = self._tokens[group].stop, self._room[group]
        if tokens is None and count <= room:
            return 0, count
        if group not in self._pool.cache_groups:
            return 0, 0
        try:
            start, stop = (0, count) if tokens is None else (index(at) for at in tokens)
        except (TypeError, ValueError):
            raise InputError(f"tokens are (start, stop), not {tokens!r}") from None
        if whole and tokens is not None:
            return (0, count) if stop >= max(span.stop for span in self._tokens) else (0, 0)
        if not 0 <= start <= stop <= count:
            raise InputError(f"tokens [{start}, {stop}): the request has {count} tokens")
        if stop > room:
            raise InputError(f"tokens [{start}, {stop}): the request has {len(self._blocks[group])} blocks")
        return start, stop

    def carry(self, payload: bytes | bytearray | memoryview, *, keep_s: float | None = None) -> None:
        """Give the receivers up to 64 KiB besides the KV, once, when it is known: the first token, say, after the last
        layer was sent, also where the request is complete by then. Returns at once.

        Receivers that asked for it get it (`RecvHandle.payload`); it is kept for them for `keep_s` seconds, by default
        the request's `hold_s`. A receiver of several ranks' KV asks the lowest of them, so every rank should give the
        same. Raises `InputError` for more than 64 KiB and for a second one.
        """
        data = as_payload(payload)
        keep_ms = None if keep_s is None else milliseconds("keep_s", keep_s)
        with making:
            carries, self._carries = self._carries, None
        if carries is None:
            raise InputError(f"request {self.request_id!r} carries a payload already")
        carries(data, keep_ms)

    def extend(self, block_ids: Any, group: int = 0) -> None:
        """More blocks of a cache group, as a chunked prefill allocates them. Raises `InputError`."""
        if group not in self._pool.cache_groups:
            raise InputError(f"cache group {group} has no layers in this pool")
        more = block_array(block_ids)
        blocks = self._blocks[group] + more
        span, room = self._tokens[group], len(blocks) * self._pool.block_size_of(group)
        self._pool.check_blocks(group, blocks, span.start, min(span.stop, room))
        self._engine.extend(self.handle, group, more)
        self._blocks[group], self._room[group] = blocks, room  # only now may a thread send layers that are in them

    @property
    def packed(self) -> Future[None]:
        """Done when the request's blocks are not read any more: they may be freed though the transfer goes on."""
        if self._packed is None:
            with making:
                self._packed = self._packed or running()
            self.watch("packed")
        if self.is_packed:
            settle(self._packed, self.error)
        return self._packed

    @property
    def is_packed(self) -> bool:
        """Whether the request has ended, or its blocks are not read any more."""
        return self.outcome.packed

    def wait_packed(self, timeout: float | None = None) -> None:
        """Block until the request's blocks may be freed."""
        self.check_end(in_time(self.outcome.wait_packed, timeout), timeout)

    def on_event(self, kind: _core._EventKind, layer: int) -> None:
        if self._packed is not None:
            settle(self._packed, self.error)
        super().on_event(kind, layer)


class Sender(Node[SendHandle]):
    """The prefill side of one rank."""

    role = "sender"

    _payloads: OfferedPayloads

    def _make_engine(self, config: _core.EngineConfig, device: _core.Device | None) -> Any:
        from hetkv.core import core

        self._payloads = OfferedPayloads()
        return core.Sender(config, device)

    def send(
        self,
        request_id: RequestId,
        block_ids: BlockIds,
        num_tokens: int | Sequence[int],
        *,
        hold_s: float | None = None,
        content: bytes | None = None,
        priority: int = 0,
        payload: bytes | bytearray | memoryview | None = None,
    ) -> SendHandle:
        """Announce a request of `num_tokens` tokens (of each cache group) in these blocks; returns at once.

        It takes no slot and no copy, and needs no receiver yet: the first instance that asks for it gets it, on all its
        ranks. The request fails with `LeaseExpiredError` when it is not complete within `hold_s` seconds (default: the
        configuration's). Block ids that cannot be, and the id of a request that is under way, raise `InputError`. With
        chunked prefill, `block_ids` may be only the first blocks: see `SendHandle.extend`. Of a sliding-window group
        only the blocks that the window reaches are looked at.

        `content` (see `content_digest`) is compared with the ticket's: where the receiver asks for other content under
        this id, nothing is sent and the request fails on both sides with `ContentError`.

        `priority` is as vLLM's: what a request of a lower number has ready goes before all of higher numbers on the
        same link, whenever it came. Among equals the requests that came first end first, and small ones do not wait
        for large ones. Links share staging buffers, slots and the copy engine evenly, whatever their priorities. A link
        that always has requests of a lower number moves no others, which fail when their lease is over.

        `payload`: what `SendHandle.carry` takes, where it is known already.
        """
        key, digest = request_key(request_id), check_content(content)
        first = None if payload is None else as_payload(payload)
        check_priority(priority)
        tokens, blocks = per_group(self.pool.spec, num_tokens, block_ids)
        spans = wanted(self.description, tokens, [0] * len(tokens))
        for group, (start, _) in enumerate(spans):
            room = len(blocks[group]) * self.pool.cache_groups[group][0] if group in self.pool.cache_groups else 0
            self.pool.check_blocks(group, blocks[group], start, min(tokens[group], room))
        hold_ms = milliseconds("hold_s", self.config.hold_s if hold_s is None else hold_s)

        def make() -> SendHandle:
            outcome = self.engine.submit(key, spans, blocks, hold_ms, digest, priority)
            self._payloads.begin(key)
            return SendHandle(request_id, self, outcome, spans, blocks, carries)

        def carries(data: bytes, keep_ms: int | None) -> None:
            self._payloads.give(key, digest or b"", data, (keep_ms or hold_ms) / 1000)

        handle = self._submit(request_id, make)
        if first is not None:
            handle.carry(first)
        return handle

    def batch(self, items: Iterable[SendHandle | tuple[SendHandle, tuple[int, int] | None]]) -> SendBatch:
        """Requests of this sender that one step computes together, each with the tokens that it computes (all of them
        where none are named): `batch.send_layer(layer)` is then one call for all. Raises `InputError` for tokens or
        blocks that a request does not have."""
        return SendBatch(self, items)

    def reject(self, request_id: RequestId, reason: str) -> None:
        """The request has ended and will not be sent again: who asks for it is rejected at once with `AbortedError`.

        Without this a ticket for an id that is not under way waits for it until its lease is over. Remembered for ten
        minutes, of the last 4,096 ids; sending the id after all forgets it. Nothing happens where it is under way.
        """
        self.engine.reject(request_key(request_id), reason)

    def path(self, peer: Peer) -> Path | None:
        """How payloads get to a peer, once it has granted a slot: see `Path`."""
        engine: _core.Sender = self.engine
        return engine.path(peer.link)

    def _on_payload(self, peer: Peer, message: Ask | Payload) -> None:
        if not isinstance(message, Ask):
            raise MessageError(f"{peer.address}: a payload from a receiver")
        self._payloads.ask(peer, message)

    def _forget(self, peer: Peer) -> None:
        super()._forget(peer)
        self._payloads.forget(peer)

    def _retire(self, peer: Peer) -> None:
        pass  # a receiver that ended leaves nothing to retire here
