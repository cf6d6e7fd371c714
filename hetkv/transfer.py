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

from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from operator import index
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from hetkv.config import MAX_SECONDS
from hetkv.errors import HetkvError, InputError, PeerLostError
from hetkv.link import linked_ranks, wanted
from hetkv.node import COMPLETE, FAILED, LAYER, PACKED, Node, Peer
from hetkv.pending import Pending, RequestId, request_key, running, settle, wait_for
from hetkv.spec import Interval, KVSpec

if TYPE_CHECKING:
    from hetkv import _core

MAX_TOKENS = 1 << 31
Reach = Literal["put", "shared", "peer"]
"""`peer`: packed straight into memory of the peer's device. `shared`: packed straight into host memory that both sides
map. `put`: packed into staging, and put by UCX."""
_REACHES: tuple[Reach | None, ...] = (None, "put", "shared", "peer")
BlockIds = Sequence[int] | Sequence[Sequence[int]]
"""Block ids of one sequence in token order: one list, or one list per cache group."""


class Transmission(Pending):
    """A request that this side sends. Complete when every receiver of the request has verified its part."""

    def __init__(
        self, request_id: RequestId, sender: Sender, handle: int, tokens: list[Interval], blocks: list[array[int]]
    ) -> None:
        super().__init__(request_id, sender.engine, handle)
        self.packed = running()
        """Done when the request's blocks are not read any more: they may be freed though the transfer goes on."""
        self._pool, self._device = sender.pool, sender.device
        self._tokens, self._blocks = tokens, blocks
        self._group_of = {layer: self._pool.spec.group_of(layer) for layer in self._pool.layers}

    def send_layer(self, layer: int, tokens: tuple[int, int] | None = None, *, stream: Any = None) -> None:
        """The KV of a global layer is in the pool, for `tokens` `[start, stop)` or the whole request; returns at once.

        Legal before any ticket. Those tokens of the layer must not change until `packed`. Tokens of one layer are sent
        once; chunks may come in any order. A `state` layer is one record: leave `tokens` out.

        Where the pool lies on a device, the layer will be in it once the work that `stream` holds now has run: an
        integer (`cudaStream_t`, `hipStream_t`), a `torch.cuda.Stream`, or PyTorch's current stream by default. Raises
        `InputError` for a stream of another device, or one that captures a graph.
        """
        group = self._group_of.get(layer)
        if group is None:
            raise InputError(f"layer {layer}: the pool holds layers {list(self._group_of)}")
        start, stop = tokens or (0, self._tokens[group].stop)
        if not 0 <= start <= stop <= self._tokens[group].stop:
            raise InputError(
                f"layer {layer}, tokens [{start}, {stop}): the request has {self._tokens[group].stop} tokens"
            )
        if stop > len(self._blocks[group]) * self._pool.groups[group][0]:
            raise InputError(
                f"layer {layer}, tokens [{start}, {stop}): the request has {len(self._blocks[group])} blocks"
            )
        if self._device is None and stream is not None:
            raise InputError("the pool lies in host memory: no stream has to be waited for")
        if stop > start:
            behind = self._device.stream(stream) if self._device else None
            self._engine.send_layer(self.handle, layer, start, stop, behind)

    def send_layers(self, *, stream: Any = None) -> None:
        """`send_layer` for every layer of the pool: what a prefill did that finished before."""
        for layer in self._group_of:
            self.send_layer(layer, stream=stream)

    def extend(self, block_ids: Sequence[int], group: int = 0) -> None:
        """More blocks of a cache group, as a chunked prefill allocates them. Raises `InputError`."""
        if group not in self._pool.groups:
            raise InputError(f"cache group {group} has no layers in this pool")
        more = block_array(_plain(block_ids))
        blocks = self._blocks[group] + more
        span, room = self._tokens[group], len(blocks) * self._pool.groups[group][0]
        self._pool.check_blocks(group, blocks, span.start, min(span.stop, room))
        self._engine.extend(self.handle, group, more)
        self._blocks[group] = blocks  # only now may a thread send layers that lie in them

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

    def _make_engine(self, config: _core.EngineConfig, device: _core.Device | None) -> Any:
        from hetkv.core import core

        return core.Sender(config, device)

    def send(
        self,
        request_id: RequestId,
        block_ids: BlockIds,
        num_tokens: int | Sequence[int],
        *,
        hold_s: float | None = None,
    ) -> Transmission:
        """Announce a request of `num_tokens` tokens (of each cache group) in these blocks; returns at once.

        It takes no slot and no copy, and needs no receiver yet: the first instance that asks for it gets it, on all its
        ranks. The request fails with `LeaseExpiredError` when it is not complete within `hold_s` seconds (default: the
        configuration's). Block ids that cannot be, and the id of a request that is under way, raise `InputError`. With
        chunked prefill, `block_ids` may be only the first blocks: see `Transmission.extend`. Of a sliding-window group
        only the blocks that the window reaches are looked at.
        """
        key = request_key(request_id)
        tokens, blocks = per_group(self.pool.spec, num_tokens, block_ids)
        spans = wanted(self.description, tokens, [0] * len(tokens))
        for group, (start, _) in enumerate(spans):
            room = len(blocks[group]) * self.pool.groups[group][0] if group in self.pool.groups else 0
            self.pool.check_blocks(group, blocks[group], start, min(tokens[group], room))
        hold_ms = milliseconds("hold_s", self.config.hold_s if hold_s is None else hold_s)

        def make() -> Transmission:
            handle = self.engine.submit(key, spans, blocks, hold_ms)
            return Transmission(request_id, self, handle, spans, blocks)

        return self._submit(key, make)

    def refuse(self, request_id: RequestId, reason: str) -> None:
        """The request has ended and will not be sent again: who asks for it is refused at once with `AbortedError`.

        Without this a ticket for an id that is not under way waits for it until its lease is over. Remembered for ten
        minutes, of the last 4,096 ids; sending the id after all forgets it. Nothing happens where it is under way.
        """
        self.engine.refuse(request_key(request_id), reason)

    def reach(self, peer: Peer) -> Reach | None:
        """How payloads get to a peer, once it has lent a slot: see `Reach`."""
        code: int = self.engine.reach(peer.link)
        return _REACHES[code]

    def _retire(self, peer: Peer) -> None:
        pass  # what a receiver that ended leaves behind is its own


class Reception(Pending):
    """A request that this side receives. Complete when every layer is verified and in the pool."""

    def __init__(self, request_id: RequestId, receiver: Receiver, handle: int, layers: Sequence[int]) -> None:
        super().__init__(request_id, receiver.engine, handle)
        self._device = receiver.device
        self.layers: dict[int, Future[None]] = {layer: running() for layer in layers}
        """By global layer: done when that layer is verified and in the pool."""

    def wait(self, timeout: float | None = None, *, stream: Any = None) -> None:
        """Block until the request is complete, or make `stream` wait for that while the host goes on.

        What is put into the stream later runs behind it. It also runs once the request has failed, over undefined
        blocks: look at `future` before anything computed from them is used. `stream` is as for `send_layer`.

        Raises the request's `HetkvError`, and `WaitTimeoutError` after `timeout` seconds, which a stream does not
        count. With `stream`: `InputError` where the pool lies in host memory or the stream on another device,
        `UnsupportedError` where the device cannot do that (`hetkv probe` says so).
        """
        if stream is None:
            super().wait(timeout)
        else:
            self._stream_waits(stream, -1)

    def wait_layer(self, layer: int, timeout: float | None = None, *, stream: Any = None) -> None:
        """As `wait`, for one layer: a decoder can start on it while others travel."""
        if layer not in self.layers:
            raise InputError(f"layer {layer}: the pool holds layers {list(self.layers)}")
        if stream is None:
            wait_for(self.layers[layer], timeout)
        else:
            self._stream_waits(stream, layer)

    def _stream_waits(self, stream: Any, layer: int) -> None:
        if self._device is None:
            raise InputError("the pool lies in host memory: wait on the host")
        self._engine.wait_stream(self.handle, layer, self._device.stream(stream))

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

    def _make_engine(self, config: _core.EngineConfig, device: _core.Device | None) -> Any:
        from hetkv.core import core

        return core.Receiver(config, device)

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

        `block_ids` cover `num_tokens` tokens; the first `held` of them are in the pool already and are not sent (one
        number leaves the record of a `state` group to be sent: it belongs to the last token). `source` names the
        sending instance; it may be left out where only one is connected. Block ids that cannot be, and the id of a
        request that is under way, raise `InputError`, a rank of the source that is not connected `PeerLostError`.
        """
        key = request_key(request_id)
        tokens, blocks = per_group(self.pool.spec, num_tokens, block_ids)
        if isinstance(held, SupportsIndex):
            states = state_groups(self.pool.spec)
            kept = [0 if group in states else index(held) for group in range(len(tokens))]
        else:
            kept = [index(count) for count in held]
        if len(kept) != len(tokens) or any(not 0 <= a <= b for a, b in zip(kept, tokens, strict=True)):
            raise InputError(f"{held} tokens held of {num_tokens}")
        want = wanted(self.description, tokens, kept)
        for group, ids in enumerate(blocks):
            self.pool.check_blocks(group, ids, *want[group])
        links = [peer.link for peer in self._sources(source)]
        lease_ms = milliseconds("lease_s", self.config.lease_s if lease_s is None else lease_s)

        def make() -> Reception:
            handle = self.engine.receive(key, want, blocks, links, lease_ms)
            return Reception(request_id, self, handle, list(self.pool.layers))

        return self._submit(key, make)

    def _sources(self, source: str | None) -> list[Peer]:
        """Every rank of the source instance that holds something this rank holds too."""
        peers = self.peers
        names = sorted({peer.description.instance for peer in peers})
        if source is None and len(names) != 1:
            raise PeerLostError(
                f"connected instances are {names}: " + ("name the source" if names else "connect one first")
            )
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


def per_group(spec: KVSpec, num_tokens: int | Sequence[int], block_ids: BlockIds) -> tuple[list[int], list[array[int]]]:
    """Token counts and block ids per cache group; a `state` group has one record, whatever the token count.

    Anything that holds integers will do: lists, arrays, tensors. Raises `InputError`.
    """
    groups = spec.num_groups
    lists = _plain(block_ids)
    nested = bool(lists) and not isinstance(lists[0], SupportsIndex)
    blocks = [block_array(_plain(ids)) for ids in (lists if nested else [lists])]
    counts = _plain(num_tokens)
    try:
        tokens = [index(count) for count in counts] if isinstance(counts, Sequence) else [index(counts)] * groups
    except TypeError:
        raise InputError(f"token counts are integers, not {num_tokens!r}") from None
    if len(blocks) != groups or len(tokens) != groups:
        raise InputError(
            f"the model has {groups} cache groups; got block ids of {len(blocks)}, token counts of {len(tokens)}"
        )
    for group in state_groups(spec):
        tokens[group] = 1
    if any(not 1 <= count < MAX_TOKENS for count in tokens):
        raise InputError(f"a request has 1 to {MAX_TOKENS - 1} tokens, not {num_tokens}")
    return tokens, blocks


def state_groups(spec: KVSpec) -> set[int]:
    """Cache groups whose layers hold one record a request."""
    return {layer.group for layer in spec.layers if layer.kind == "state"}


def block_array(block_ids: Any) -> array[int]:
    """Block ids as the extension takes them, int32. Raises `InputError`."""
    try:
        return array("i", block_ids)
    except OverflowError:
        wrong = next(b for b in block_ids if not -(1 << 31) <= b < 1 << 31)
        raise InputError(f"block id {wrong} is out of range") from None
    except TypeError:
        raise InputError("block ids are integers, in one list or in one list per cache group") from None


def milliseconds(name: str, seconds: float) -> int:
    """A time limit for the engine. Raises `InputError`."""
    if not 0 < seconds <= MAX_SECONDS:
        raise InputError(f"{name} must be above 0 and at most {MAX_SECONDS:g} seconds, not {seconds}")
    return max(1, round(seconds * 1000))


def _plain(values: Any) -> Any:
    """Lists of what NumPy and PyTorch hold; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") and not isinstance(values, array) else values
