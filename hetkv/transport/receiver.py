"""The decode side of one rank: `Receiver`, and `RecvHandle` for each request.

receiver = Receiver(decode_pool, instance="decode-0")
receiver.connect(address)
receiver.receive("request-1", block_ids, num_tokens).wait()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

from hetkv.control.payloads import Ask, Payload
from hetkv.errors import HetkvError, InputError, MessageError, PeerLostError, UnsupportedError
from hetkv.kv.scale import FLOAT32_BYTES
from hetkv.transport.arrivals import Arrivals
from hetkv.transport.blocks import BlockIds, integers, milliseconds, per_group
from hetkv.transport.content import check_content
from hetkv.transport.handle import Handle, RequestId, in_time, making, request_key, timed_out
from hetkv.transport.link_plan import wanted
from hetkv.transport.node import Node
from hetkv.transport.notifications import check_messages
from hetkv.transport.payloads import Awaited, AwaitedPayloads
from hetkv.transport.peer import Peer

if TYPE_CHECKING:
    import hetkv._core as _core
    from hetkv.kv.pool import KVPool


CONTENT_SINCE = 2
"""Minor version from which tickets have contents."""


def most_growth(pool: KVPool) -> int:
    """How many bytes a byte of a payload can become in the pool, with scales that are not on the wire."""
    growth = 1
    for memory in pool.layers.values():
        for segment in memory.layout.segments.values():
            size = FLOAT32_BYTES + 1 if segment.scale_groups else segment.dtype.itemsize
            growth = max(growth, size)
    return growth


class RecvHandle(Handle):
    """A request that this side receives. Complete when every layer is verified and in the pool."""

    _arrivals: Arrivals | None = None
    awaited: Awaited | None = None
    """The payload, where it was asked for."""

    @property
    def layers(self) -> Mapping[int, Future[None]]:
        """By global layer: done when that layer is verified and in the pool."""
        if self._arrivals is None:
            with making:
                if self._arrivals is None:
                    self._arrivals = Arrivals(self._node.layers, self)
        return self._arrivals

    def wait(self, timeout: float | None = None, *, stream: Any = None) -> None:
        """Block until the request is complete, or make `stream` wait for that while the host goes on.

        What is put into the stream later runs after it. It also runs once the request has failed, over undefined
        blocks: look at `future` before anything computed from them is used. `stream` is as for `send_layer`.

        Raises the request's `HetkvError`, and `WaitTimeoutError` after `timeout` seconds, which a stream does not
        count. With `stream`: `InputError` where the pool is in host memory, the stream is on another device or
        captures a graph, `UnsupportedError` where the device cannot do that (`hetkv probe` says so), or as many of
        its streams wait as it has hardware queues, less two (6 on CUDA unless CUDA_DEVICE_MAX_CONNECTIONS says more).
        """
        if stream is None:
            super().wait(timeout)
        else:
            self._stream_waits(stream, -1)

    def wait_layer(self, layer: int, timeout: float | None = None, *, stream: Any = None) -> None:
        """As `wait`, for one layer: a decoder can start on it while others travel."""
        if layer not in self._node.layers:
            raise InputError(f"layer {layer}: the pool holds layers {list(self._node.layers)}")
        if stream is not None:
            self._stream_waits(stream, layer)
            return
        if not in_time(self.outcome.wait_layer, layer, timeout):
            raise timed_out(timeout)
        if not self.outcome.arrived(layer) and (error := self.error) is not None:
            raise error

    def payload(self, timeout: float | None = None) -> bytes:
        """What the sender's request carries besides KV (`SendHandle.carry`), with `receive(payload=True)`: waits for
        it, at most until the request's lease is over.

        Raises the request's error where it failed; `PeerLostError`, `LeaseExpiredError`; `WaitTimeoutError` after
        `timeout` seconds; `InputError` where the payload was not asked for.
        """
        if self.awaited is None:
            raise InputError(f"request {self.request_id!r}: its payload was not asked for: receive(..., payload=True)")
        self.watch("end")  # its failure wakes who waits
        found: bytes = self._node.payloads.wait(self.awaited, self, timeout)
        return found

    def _stream_waits(self, stream: Any, layer: int) -> None:
        device = self._node.device
        if device is None:
            raise InputError("the pool is in host memory: wait on the host")
        self._node.engine.wait_stream(self.outcome, layer, device.stream(stream))

    def on_event(self, kind: _core._EventKind, layer: int) -> None:
        if self.awaited is not None:
            self._node.payloads.look()
        if self._arrivals is not None:
            if kind == "layer":
                self._arrivals.arrive(layer)
            else:
                self._arrivals.end()
        super().on_event(kind, layer)


class Receiver(Node[RecvHandle]):
    """The decode side of one rank. Until a request is complete its blocks are undefined; no other byte ever changes."""

    role = "receiver"

    payloads: AwaitedPayloads
    """Those that were asked for."""

    def _make_engine(self, config: _core.EngineConfig, device: _core.Device | None) -> Any:
        from hetkv.core import core

        self.payloads = AwaitedPayloads()
        if self.config.verify == "pool":
            config.verify_bytes = config.slot_bytes * most_growth(self.pool)
        return core.Receiver(config, device)

    def receive(
        self,
        request_id: RequestId,
        block_ids: BlockIds,
        num_tokens: int | Sequence[int],
        *,
        num_cached_tokens: int | Sequence[int] = 0,
        src_instance: str | None = None,
        lease_s: float | None = None,
        content: bytes | None = None,
        payload: bool = False,
    ) -> RecvHandle:
        """Ask for a request's KV: give its senders a ticket. Returns at once.

        `block_ids` cover `num_tokens` tokens; the first `num_cached_tokens` of them are in the pool already and are not
        sent (one number leaves the record of a `state` group to be sent: it belongs to the last token). `src_instance`
        names the sending instance; it may be left out where only one is connected. Block ids that cannot be, and the id
        of a request that is under way, raise `InputError`, a rank of the source that is not connected `PeerLostError`.

        `content` (see `content_digest`) must be that of the sender's request: otherwise, also where only one side names
        one, nothing is sent and the request fails on both sides with `ContentError`. A source whose version has no
        contents raises `UnsupportedError`.

        `payload`: also ask for what the sender's request of this content carries besides KV: see `RecvHandle.payload`.
        A source whose version has no payloads raises `UnsupportedError`.
        """
        key, digest = request_key(request_id), check_content(content)
        tokens, blocks = per_group(self.pool.spec, num_tokens, block_ids)
        kept = integers("num_cached_tokens", num_cached_tokens, len(tokens))
        if self.pool.spec.state_groups and isinstance(num_cached_tokens, SupportsIndex):
            kept = [0 if group in self.pool.spec.state_groups else count for group, count in enumerate(kept)]
        if len(kept) != len(tokens) or any(not 0 <= a <= b for a, b in zip(kept, tokens, strict=True)):
            raise InputError(f"num_cached_tokens is {num_cached_tokens} of {num_tokens} tokens")
        want = wanted(self.description, tokens, kept)
        for group, ids in enumerate(blocks):
            self.pool.check_blocks(group, ids, *want[group])
        sources, links = self._sources(src_instance)
        for peer in sources if digest is not None else ():
            if peer.minor < CONTENT_SINCE:
                raise UnsupportedError(f"{peer.name} speaks version 1.{peer.minor}, which does not compare contents")
        carrier = min(sources, key=lambda peer: peer.rank)
        if payload:
            check_messages(carrier, "payloads")
        lease_ms = milliseconds("lease_s", self.config.lease_s if lease_s is None else lease_s)

        def make() -> RecvHandle:
            return RecvHandle(request_id, self, self.engine.receive(key, want, blocks, links, lease_ms, digest))

        handle = self._submit(request_id, make)
        if payload:
            handle.awaited = self.payloads.ask(carrier, key, digest or b"", lease_ms / 1000)
        return handle

    def _sources(self, src_instance: str | None) -> tuple[list[Peer], list[int]]:
        """Every rank of the source instance that holds something this rank holds too, and their links."""
        peers = self.peers
        known = self._chosen.get(src_instance)
        if known is None or known[0] != peers:
            chosen = self._choose(peers, src_instance)
            known = self._chosen[src_instance] = peers, chosen, [peer.link for peer in chosen]
        return known[1], known[2]

    @cached_property
    def _chosen(self) -> dict[str | None, tuple[list[Peer], list[Peer], list[int]]]:
        """By source instance: the peers at the time, and what `_sources` made of them."""
        return {}

    @staticmethod
    def _choose(peers: list[Peer], src_instance: str | None) -> list[Peer]:
        names = sorted({peer.instance for peer in peers})
        if not names:
            raise PeerLostError(
                "no sender is connected: call connect with its addresses first, or listen and let it connect"
            )
        if src_instance is None and len(names) != 1:
            raise PeerLostError(f"connected instances are {names}: name src_instance")
        chosen = {peer.rank: peer for peer in peers if peer.instance == (src_instance or names[0])}
        if not chosen:
            raise PeerLostError(f"instance {src_instance!r} is not connected; connected are {names}")
        some = next(iter(chosen.values()))
        missing = [rank for rank in some.agreement.ranks if rank not in chosen]
        if missing:
            raise PeerLostError(f"ranks {missing} of instance {some.instance!r} are not connected")
        return list(chosen.values())

    def _on_payload(self, peer: Peer, message: Ask | Payload) -> None:
        if not isinstance(message, Payload):
            raise MessageError(f"{peer.address}: a sender asks for a payload")
        self.payloads.take(peer, message)

    def _on_link_event(self, kind: _core._EventKind, link: int, error: HetkvError | None) -> None:
        super()._on_link_event(kind, link, error)
        self.payloads.look()

    def _forget(self, peer: Peer) -> None:
        super()._forget(peer)
        self.payloads.look()

    def close(self) -> None:
        self.payloads.end()
        super().close()

    def _retire(self, peer: Peer) -> None:
        self.engine.retire_link(peer.link)
