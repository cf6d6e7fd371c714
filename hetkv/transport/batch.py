"""`SendBatch`: what one step of an engine computes of several requests, sent with one call a layer.

batch = sender.batch([(a, (0, 512)), (b, (4096, 4097)), c])    # once a step
for layer in range(num_layers):
    ...                                                        # compute the layer for all of them
    batch.send_layer(layer)                                    # one event, one hand-over for all
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hetkv.errors import InputError

if TYPE_CHECKING:
    from hetkv.transport.sender import Sender, SendHandle

_ALL_LAYERS = -1
Tokens = tuple[int, int] | None
"""Tokens `[start, stop)` of a request; `None`: all of it."""


class SendBatch:
    """Tokens of several requests of one sender, computed together in every layer. Made by `Sender.batch`."""

    def __init__(self, sender: Sender, items: Iterable[SendHandle | tuple[SendHandle, Tokens]]) -> None:
        from hetkv.core import core

        self._sender, self._device = sender, sender.device
        self._group_of = sender.group_of
        states = sender.pool.spec.state_groups
        pairs = [item if isinstance(item, tuple) else (item, None) for item in items]
        foreign = [tx.request_id for tx, _ in pairs if tx.sender is not sender]
        if foreign:
            raise InputError(f"requests {foreign} are another sender's")
        ranges = [[tx.tokens_of(group, tokens, group in states) for tx, tokens in pairs]
                  for group in range(sender.pool.spec.num_groups)]  # fmt: skip
        for group, spans in enumerate(ranges):
            for (tx, _), (start, stop) in zip(pairs, spans, strict=True):
                tx.batched(group, start, stop)
        self._core = core.SendBatch([tx.handle for tx, _ in pairs], ranges)

    def send_layer(self, layer: int, *, stream: Any = None) -> None:
        """`SendHandle.send_layer` for all requests of the batch at once: one event of the stream, one hand-over.

        A record of a `state` layer goes with the request's last tokens. Raises what that does; nothing is sent then.
        A stream that captures a graph is rejected, as what it holds runs only when the graph is launched: launch the
        graph, then send its layers from the stream that it was launched into.
        """
        if layer not in self._group_of:
            raise InputError(f"layer {layer}: the pool holds layers {list(self._group_of)}")
        self._send(layer, stream)

    def send_layers(self, *, stream: Any = None) -> None:
        """`send_layer` for every layer of the pool, in one call."""
        self._send(_ALL_LAYERS, stream)

    def _send(self, layer: int, stream: Any) -> None:
        device = self._device
        if device is None and stream is not None:
            raise InputError("the pool is in host memory: no stream has to be waited for")
        self._sender.engine.send_batch(self._core, layer, device.stream(stream) if device else None)
