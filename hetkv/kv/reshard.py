"""Which rank sends what to which rank: interval intersection on global layers and heads (`routes`).

The rule needs no ratio between the two sides. Where several sources hold the same heads of a layer (replicas) they
share the elements evenly. Every rank of both sides computes the same routes from the same shards.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hetkv.errors import InputError
from hetkv.kv.spec import Interval, KVSpec, Shard


class Route(NamedTuple):
    """A rectangle of layers and heads that one source rank sends to one destination rank."""

    source: int
    """Index into the sources."""
    destination: int
    """Index into the destinations."""
    layers: Interval
    """Global; every layer in it has a cache of its own."""
    heads: Interval
    """Global; the same for all layers of the route."""


class _Piece(NamedTuple):
    """Heads of one layer of one destination that the same sources hold."""

    destination: int
    layer: int
    heads: Interval


def routes(spec: KVSpec, sources: Sequence[Shard], destinations: Sequence[Shard]) -> list[Route]:
    """Routes that write every element of every destination exactly once, in order of destination, source, layer, head.

    Each destination is served in full, also where destinations are replicas of each other. The elements that a set of
    replicas holds are shared evenly between them: the loads differ by less than twice the largest head of one layer,
    and by at most one head where all are equal. Replicas split destinations first, so that each has few peers; then
    heads, so that a layer leaves all of them at once; then layers. Layers that read another cache have no route.

    Raises `InputError` where a shard does not fit the spec, a layer's segments have different head counts, or a
    destination needs heads that no source holds.
    """
    for name, shards in (("source", sources), ("destination", destinations)):
        for index, shard in enumerate(shards):
            check_shard(spec, shard, f"{name} {index}")
    pieces: dict[tuple[int, ...], list[_Piece]] = {}
    for piece, holders in _pieces(spec, sources, destinations):
        pieces.setdefault(holders, []).append(piece)
    given: dict[tuple[int, int], dict[int, list[Interval]]] = {}
    for holders in sorted(pieces):
        for source, piece in _share(spec, holders, pieces[holders]):
            given.setdefault((piece.destination, source), {}).setdefault(piece.layer, []).append(piece.heads)
    return [
        Route(source, destination, layers, heads)
        for (destination, source) in sorted(given)
        for layers, heads in _rectangles(given[destination, source])
    ]


def overlap(spec: KVSpec, a: Shard, b: Shard) -> Iterator[tuple[int, Interval]]:
    """(global layer, global heads) that both shards hold, for layers with a cache of their own."""
    for layer in range(*(a.layers & b.layers)):
        heads = a.heads[layer] & b.heads[layer]
        if heads.size and spec.layers[layer].shares is None:
            yield layer, heads


def check_shard(spec: KVSpec, shard: Shard, name: str = "shard") -> None:
    """Raise `InputError` unless the shard's layers and heads exist in the spec. `name` begins the text."""
    start, stop = shard.layers
    if not 0 <= start <= stop <= len(spec.layers):
        raise InputError(f"{name}: layers [{start}, {stop}), the spec has {len(spec.layers)} layers")
    if len(shard.heads) != len(spec.layers):
        raise InputError(f"{name}: head intervals of {len(shard.heads)} layers, the spec has {len(spec.layers)}")
    for index, (first, last) in enumerate(shard.heads):
        counts = {segment.heads for segment in spec.layers[index].segments}
        if len(counts) != 1:
            raise InputError(
                f"layer {index}: segments have {sorted(counts)} heads; one head interval must serve all of them"
            )
        if not 0 <= first < last <= counts.pop():
            raise InputError(
                f"{name}: heads [{first}, {last}) of layer {index}, which has {spec.layers[index].segments[0].heads}"
            )


def head_elements(spec: KVSpec, layer: int) -> int:
    """Channels of one head of a layer, all segments: what sharing counts. For a `state` layer these are bytes."""
    return sum(segment.channels for segment in spec.layers[layer].segments)


def _pieces(
    spec: KVSpec, sources: Sequence[Shard], destinations: Sequence[Shard]
) -> Iterator[tuple[_Piece, tuple[int, ...]]]:
    """Each destination's heads, cut wherever a source begins or ends, with the sources that hold the piece."""
    held = [
        tuple((s, source.heads[layer]) for s, source in enumerate(sources) if layer in range(*source.layers))
        for layer in range(len(spec.layers))
    ]
    cut = functools.cache(_cut)  # most layers of a model are split equally
    for index, destination in enumerate(destinations):
        for layer in range(*destination.layers):
            if spec.layers[layer].shares is not None:
                continue
            for heads, holders in cut(destination.heads[layer], held[layer]):
                if not holders:
                    where = f"layer {layer}, heads [{heads.start}, {heads.stop})"
                    raise InputError(f"{where}: destination {index} needs them, no source holds them")
                yield _Piece(index, layer, heads), holders


def _cut(wanted: Interval, held: tuple[tuple[int, Interval], ...]) -> list[tuple[Interval, tuple[int, ...]]]:
    """`wanted` in pieces that are each held by one set of sources."""
    inside = [(source, heads & wanted) for source, heads in held]
    cuts = sorted({*wanted, *(edge for _, heads in inside if heads.size for edge in heads)})
    return [
        (Interval(start, stop), tuple(s for s, heads in inside if heads.start <= start and stop <= heads.stop))
        for start, stop in itertools.pairwise(cuts)
    ]


def _share(spec: KVSpec, holders: tuple[int, ...], pieces: list[_Piece]) -> Iterator[tuple[int, _Piece]]:
    """Deal the pieces to their holders: one contiguous run of single heads each, by the middle of each head's elements.

    Ordered by destination, head, layer: a run keeps to few destinations, and covers whole heads before it cuts layers.
    """
    if len(holders) == 1:
        yield from ((holders[0], piece) for piece in pieces)
        return
    units = sorted((piece.destination, head, piece.layer) for piece in pieces for head in range(*piece.heads))
    total = sum(head_elements(spec, layer) for _, _, layer in units)
    before = 0
    for destination, head, layer in units:
        size = head_elements(spec, layer)
        yield (
            holders[(2 * before + size) * len(holders) // (2 * total)],
            _Piece(destination, layer, Interval(head, head + 1)),
        )
        before += size


def _rectangles(heads_of: dict[int, list[Interval]]) -> list[tuple[Interval, Interval]]:
    """Merge touching heads of a layer, then consecutive layers with the same heads."""
    open_runs: dict[Interval, int] = {}
    done: list[tuple[Interval, Interval]] = []
    last = -1
    for layer in sorted(heads_of):
        merged = set(_merge(heads_of[layer]))
        for heads in list(open_runs):
            if heads not in merged or layer != last + 1:
                done.append((Interval(open_runs.pop(heads), last + 1), heads))
        for heads in merged:
            open_runs.setdefault(heads, layer)
        last = layer
    done += [(Interval(first, last + 1), heads) for heads, first in open_runs.items()]
    return sorted(done)


def _merge(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for interval in sorted(intervals):
        if merged and merged[-1].stop == interval.start:
            merged[-1] = Interval(merged[-1].start, interval.stop)
        else:
            merged.append(interval)
    return merged
