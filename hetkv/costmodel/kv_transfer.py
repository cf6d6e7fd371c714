"""Time to move a prompt's KV cache over a set of routes, and how much of it shows after the prefill has ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from hetkv.costmodel.catalogue import DTYPE_BYTES
from hetkv.costmodel.models import ModelShape
from hetkv.errors import InputError


class Link(NamedTuple):
    """One rank's port: bytes per second each way, and seconds that each layer's frame costs on top of its bytes."""

    bytes_per_second: float
    latency_s: float = 0.0


class KVRoute(NamedTuple):
    """What one source rank sends to one destination rank: `bytes_per_token` of each layer of `[start, stop)`."""

    source: int
    destination: int
    start: int
    stop: int
    bytes_per_token: float


class TransferTime(NamedTuple):
    """Seconds: `exposed` from the end of the prefill to the last byte, `alone` without overlap, `busy` on the wire."""

    exposed: float
    alone: float
    busy: float


def _intervals(total: int, parts: int) -> list[tuple[int, int]]:
    """`total` items over `parts` ranks, the first ranks one more; with fewer items than ranks they are replicated."""
    if total >= parts:
        size, more = divmod(total, parts)
        edges = [i * size + min(i, more) for i in range(parts + 1)]
        return list(pairwise(edges))
    return [(i * total // parts, i * total // parts + 1) for i in range(parts)]


def kv_routes(
    model: ModelShape, source: tuple[int, int], destination: tuple[int, int], kv_dtype: str = "bf16"
) -> list[KVRoute]:
    """Routes between instances of `(tp, pp)` ranks. Ranks count stage by stage, `tp` ranks to a stage.

    Every destination rank gets each of its layers and heads from exactly one source; replicas of the same heads take
    turns. An MLA cache is one head that every TP rank holds.
    """
    if kv_dtype not in DTYPE_BYTES:
        raise InputError(f"unknown KV dtype {kv_dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    layers = model.attention_layers
    heads = 1 if model.latent else model.kv_heads
    width = (model.kv_elements if model.latent else model.qk_dim + model.v_dim) * DTYPE_BYTES[kv_dtype]
    from_heads, to_heads = _intervals(heads, source[0]), _intervals(heads, destination[0])
    from_layers, to_layers = _intervals(layers, source[1]), _intervals(layers, destination[1])
    routes = []
    for stage_to, (low_to, high_to) in enumerate(to_layers):
        for rank_to, wanted in enumerate(to_heads):
            for stage, (low, high) in enumerate(from_layers):
                start, stop = max(low, low_to), min(high, high_to)
                if start >= stop:
                    continue
                held: dict[tuple[int, int], list[int]] = defaultdict(list)
                for rank, piece in enumerate(from_heads):
                    held[piece].append(rank)
                for piece, replicas in held.items():
                    common = min(piece[1], wanted[1]) - max(piece[0], wanted[0])
                    if common > 0:
                        rank = replicas[rank_to % len(replicas)]
                        sender = stage * source[0] + rank
                        routes.append(KVRoute(sender, stage_to * destination[0] + rank_to, start, stop, common * width))
    return routes


def transfer_time(routes: Sequence[KVRoute], tokens: int, prefill_seconds: float, link: Link) -> TransferTime:
    """Send `tokens` tokens layer by layer while a prefill of `prefill_seconds` computes all layers evenly.

    Layer `i` of `L` is ready after `(i + 1) / L` of the prefill. Each port, sending or receiving, moves its layers in
    order, one after the other; the last port to finish decides. The fabric that joins the ports is not a bound here.
    """
    if link.bytes_per_second <= 0 or link.latency_s < 0:
        raise InputError(f"link needs a positive bandwidth and no negative latency, got {link}")
    if not routes:
        return TransferTime(0.0, 0.0, 0.0)
    layers = max(route.stop for route in routes)
    ports: dict[tuple[str, int], list[float]] = {}
    for route in routes:
        for port in (("out", route.source), ("in", route.destination)):
            load = ports.setdefault(port, [0.0] * layers)
            for layer in range(route.start, route.stop):
                load[layer] += route.bytes_per_token * tokens
    last = longest = 0.0
    for load in ports.values():
        end = total = 0.0
        for layer, size in enumerate(load):
            if size:
                spent = size / link.bytes_per_second + link.latency_s
                total += spent
                end = max(end, prefill_seconds * (layer + 1) / layers) + spent
        last, longest = max(last, end), max(longest, total)
    return TransferTime(max(0.0, last - prefill_seconds), longest, longest)
