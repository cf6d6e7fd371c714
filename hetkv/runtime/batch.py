"""What one forward pass computes: `Batch`, spans of sequences, and where their keys and values are.

Tokens that decode are attended to together, those of sequences of similar length; a chunk of a prompt is on its own.
Tables, places and masks are the same for all layers of a cache group, and are made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hetkv.runtime.paged import Pages
from hetkv.runtime.pool_views import PoolViews

IntArray = NDArray[np.int64]
Rows = torch.Tensor | slice


class Span(NamedTuple):
    """Consecutive tokens of one sequence: `tokens[j]` is at position `start + j`; all before are in `pages`."""

    pages: Pages
    start: int
    tokens: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class Alike(NamedTuple):
    """Spans that are attended to in one product: all of one token, or a single longer one."""

    spans: list[Span]
    rows: Rows
    """Their tokens' rows in the batch."""
    queries: int
    """Tokens of each."""


class Reach(NamedTuple):
    """What the tokens of `Alike` spans look at in one cache group."""

    blocks: torch.Tensor
    """`[spans, blocks]`."""
    keys: slice
    """Of the blocks' tokens."""
    mask: torch.Tensor | None
    """`[spans or 1, 1, queries, keys]`, True where a query may look; None: plain causal attention says the same."""


class Batch:
    """Spans, each of a sequence of its own, usually all of one pool."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans, self._device = spans, spans[0].pages.views.device
        self._counts = np.array([len(span.tokens) for span in spans])
        self._stops = np.cumsum(self._counts)
        self._positions = _ranges([span.start for span in spans], self._counts)
        self.ids = self._tensor(np.fromiter(chain.from_iterable(span.tokens for span in spans), np.int64))
        self.positions = self._tensor(self._positions)
        self.ends = self._tensor(self._stops - 1)
        """Rows of the last token of each span."""
        self.parts = [
            Alike([spans[i] for i in numbers], self._rows(numbers), len(spans[numbers[0]].tokens))
            for numbers in _alike(spans)
        ]
        pools: dict[PoolViews, list[int]] = {}
        for number, span in enumerate(spans):
            pools.setdefault(span.pages.views, []).append(number)
        self._pools = list(pools.items())
        self._places: dict[int, list[tuple[PoolViews, Rows, torch.Tensor, torch.Tensor]]] = {}
        self._reach: dict[tuple[int, int, int | None], Reach] = {}

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store keys and values `[tokens, heads, channels]` of all spans."""
        group = self.spans[0].pages.pool.spec.group_of(layer)
        if group not in self._places:
            self._places[group] = [(views, *self._placed(group, numbers)) for views, numbers in self._pools]
        for views, rows, blocks, offsets in self._places[group]:
            views.write(layer, blocks, offsets, k[rows], v[rows])

    def read(
        self, part: int, layer: int, dtype: torch.dtype, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys, values `[spans, keys, heads, channels]` and `Reach.mask` of one of `parts`; with a sliding `window`."""
        spans = self.parts[part].spans
        pages = spans[0].pages
        group = pages.pool.spec.group_of(layer)
        reach = self._reach.get((part, group, window))
        if reach is None:
            make = _one if len(spans) == 1 else _several
            size = pages.pool.cache_groups[group].block_size
            reach = self._reach[part, group, window] = make(spans, group, size, window, self._device)
        k, v = pages.views.gather(layer, reach.blocks, dtype)
        return k[:, reach.keys], v[:, reach.keys], reach.mask

    def _placed(self, group: int, numbers: list[int]) -> tuple[Rows, torch.Tensor, torch.Tensor]:
        """Rows of some spans of one pool, and the block and the place in it of each of their tokens."""
        size = self.spans[numbers[0]].pages.pool.cache_groups[group].block_size
        rows = np.concatenate([np.arange(self._stops[i] - self._counts[i], self._stops[i]) for i in numbers])
        tokens = [self._positions[self._stops[i] - self._counts[i] : self._stops[i]] // size for i in numbers]
        blocks = np.concatenate(
            [np.asarray(self.spans[i].pages.block_ids[group])[at] for i, at in zip(numbers, tokens, strict=True)]
        )
        whole = slice(None) if len(rows) == len(self._positions) else self._tensor(rows)
        return whole, self._tensor(blocks), self._tensor(self._positions[rows] % size)

    def _rows(self, numbers: list[int]) -> Rows:
        first, last = numbers[0], numbers[-1]
        if last - first + 1 == len(numbers):
            return slice(int(self._stops[first] - self._counts[first]), int(self._stops[last]))
        return self._tensor(self._stops[numbers] - 1)

    def _tensor(self, values: IntArray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _alike(spans: Sequence[Span]) -> Iterable[list[int]]:
    """Numbers of spans: those of one token by length, so that padding never doubles what is read; others alone."""
    lengths: dict[tuple[PoolViews, int], list[int]] = {}
    for number, span in enumerate(spans):
        if len(span.tokens) == 1:
            lengths.setdefault((span.pages.views, span.stop.bit_length()), []).append(number)
        else:
            yield [number]
    yield from lengths.values()


def _ranges(starts: list[int], counts: IntArray) -> IntArray:
    """`start, start + 1, ...` of each, joined."""
    before = np.cumsum(counts) - counts
    found: IntArray = np.arange(counts.sum()) + np.repeat(np.array(starts) - before, counts)
    return found


def _one(spans: Sequence[Span], group: int, size: int, window: int | None, device: torch.device) -> Reach:
    [span] = spans
    begin = 0 if window is None else max(0, span.start - window + 1)
    first, last = begin // size, -(-span.stop // size)
    blocks = torch.tensor([span.pages.block_ids[group][first:last]], device=device)
    mask = causal_mask(span.start, span.stop, begin, window, device)
    return Reach(blocks, slice(begin - first * size, span.stop - first * size), mask)


def _several(spans: Sequence[Span], group: int, size: int, window: int | None, device: torch.device) -> Reach:
    stops = np.array([span.stop for span in spans])
    begins = np.zeros_like(stops) if window is None else np.maximum(0, stops - window)
    firsts, lasts = begins // size, -(-stops // size)
    width = int((lasts - firsts).max())
    # Padded with a block of the sequence's own: what is masked must still be a number.
    blocks = np.repeat(
        [[span.pages.block_ids[group][first]] for span, first in zip(spans, firsts, strict=True)], width, 1
    )
    for row, span, first, last in zip(blocks, spans, firsts, lasts, strict=True):
        row[: last - first] = span.pages.block_ids[group][first:last]
    tokens = firsts[:, None] * size + np.arange(width * size)
    mask = (tokens >= begins[:, None]) & (tokens < stops[:, None])
    return Reach(torch.from_numpy(blocks).to(device), slice(None), torch.from_numpy(mask).to(device)[:, None, None])


def causal_mask(start: int, stop: int, begin: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """`[1, 1, queries start to stop, keys begin to stop]`; None where plain causal attention says the same."""
    if stop - start == 1 or (start == 0 and (window is None or stop <= window)):
        return None
    queries = torch.arange(start, stop, device=device)[:, None]
    keys = torch.arange(begin, stop, device=device)[None]
    mask = keys <= queries
    return (mask if window is None else mask & (queries - keys < window))[None, None]
