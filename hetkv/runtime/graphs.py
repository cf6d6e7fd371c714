"""Steps of decoding as CUDA graphs: `DecodeGraphs`. A step of small batches is bound by the host's launches otherwise.

A graph has a fixed number of sequences and of tokens that each looks at: powers of two, and those times one and a
half. Shorter batches are padded with a copy of their first sequence, which writes what that sequence writes. A large
batch that padding would more than quadruple is left to the caller, as is anything but one token for each sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from hetkv.kv.pool import KVPool
from hetkv.runtime.batch import Alike, Span
from hetkv.runtime.pool_views import PoolViews

LEAST_TOKENS = 512
"""Least tokens that a graph's sequences look at."""
MOST_TOKENS = 1 << 17
"""Most tokens that all sequences of a graph look at: what is gathered of a layer must fit next to the pool."""
PADDING = 4
"""Most tokens read for each that is needed, in graphs of more than `FEW_TOKENS`."""
FEW_TOKENS = 1 << 15
"""Reading so many, needed or not, takes less time than the host's launches of a step."""


class FixedBatch:
    """One token for each of some sequences of one pool, read from a tensor of fixed shape. Answers as `Batch` does.

    `inputs`, int64 `[sequences, columns(pool, tokens)]`: token id, position, then a block table for each cache group.
    Made anew for each pass, since it keeps what is the same for all layers of one.
    """

    def __init__(self, pool: KVPool, inputs: torch.Tensor, tokens: int) -> None:
        self._views, self._group_of = PoolViews.of(pool), pool.spec.group_of
        self.ids, self.positions = inputs[:, 0], inputs[:, 1]
        self.ends = slice(None)
        self.parts = [Alike([], slice(None), 1)]
        self._tables, self._sizes = {}, {}
        first = 2
        for group, width in widths(pool, tokens).items():
            self._sizes[group] = pool.cache_groups[group].block_size
            self._tables[group] = inputs[:, first : first + width]
            first += width
        self._places: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """As `Batch.write`."""
        group = self._group_of(layer)
        if group not in self._places:
            size = self._sizes[group]
            blocks = self._tables[group].gather(1, (self.positions // size)[:, None])[:, 0]
            self._places[group] = blocks, self.positions % size
        self._views.write(layer, *self._places[group], k, v)

    def read(
        self, part: int, layer: int, dtype: torch.dtype, window: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `Batch.read`."""
        group = self._group_of(layer)
        table = self._tables[group]
        if (group, window) not in self._masks:
            last = self.positions[:, None]
            tokens = torch.arange(table.shape[1] * self._sizes[group], device=table.device)
            mask = tokens <= last
            self._masks[group, window] = (mask if window is None else mask & (tokens > last - window))[:, None, None]
        return *self._views.gather(layer, table, dtype), self._masks[group, window]


Compute = Callable[[FixedBatch], torch.Tensor]


class Recorded(NamedTuple):
    """A graph, and where it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    logits: torch.Tensor


class DecodeGraphs:
    """Graphs of one model, recorded when a shape comes for the first time, and kept as long as their pool.

    Does not hold the model, which holds this: its memory is given back with the last reference to it.
    """

    def __init__(self) -> None:
        self._recorded: WeakKeyDictionary[KVPool, dict[tuple[int, int], Recorded]] = WeakKeyDictionary()

    def step(self, spans: Sequence[Span], compute: Compute) -> torch.Tensor | None:
        """Logits `[spans, vocab]`, in memory of the caller's; None, with nothing done, where no graph fits."""
        shape = fixed_shape(spans)
        if shape is None:
            return None
        pool = spans[0].pages.pool
        inputs = torch.from_numpy(fixed_inputs(pool, spans, *shape))
        graphs = self._recorded.setdefault(pool, {})
        if shape not in graphs:
            # Graphs of one pool share memory: they run one after another, and end together.
            memory = next(iter(graphs.values())).graph.pool() if graphs else None
            graphs[shape] = _record(compute, pool, inputs, shape[1], memory)
        recorded = graphs[shape]
        recorded.inputs.copy_(inputs)
        recorded.graph.replay()
        return recorded.logits[: len(spans)].clone()


def _record(compute: Compute, pool: KVPool, values: torch.Tensor, tokens: int, memory: Any) -> Recorded:
    device = PoolViews.of(pool).device
    with torch.cuda.device(device):
        inputs = values.to(device)
        aside: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose kernels and allocate at first use, which no graph may do
            compute(FixedBatch(pool, inputs, tokens))
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Threads of the transport use the device meanwhile.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits = compute(FixedBatch(pool, inputs, tokens))
    return Recorded(graph, inputs, logits)


def widths(pool: KVPool, tokens: int) -> dict[int, int]:
    """Blocks of each cache group that hold `tokens` tokens."""
    return {group: -(-tokens // size) for group, (size, _) in sorted(pool.cache_groups.items())}


def fixed_shape(spans: Sequence[Span]) -> tuple[int, int] | None:
    """Sequences and tokens of the graph that fits; None where none does."""
    pool = spans[0].pages.pool
    if any(len(span.tokens) != 1 or span.pages.pool is not pool for span in spans):
        return None
    stops = [span.stop for span in spans]
    rows, tokens = _rounded(len(spans)), max(LEAST_TOKENS, _rounded(max(stops)))
    fits = rows * tokens <= min(MOST_TOKENS, max(FEW_TOKENS, PADDING * sum(stops)))
    return (rows, tokens) if fits else None


def _rounded(count: int) -> int:
    """The least power of two, or that times one and a half, that is no less."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


def fixed_inputs(pool: KVPool, spans: Sequence[Span], rows: int, tokens: int) -> np.ndarray:
    """Values of `FixedBatch.inputs`. Padded with what is read, and masked, already: a block of the sequence's own. Its
    blocks of later tokens are not read: what others left there may be no number, and masked it would still be one."""
    found = np.empty((rows, 2 + sum(widths(pool, tokens).values())), np.int64)
    for row, span in zip(found, spans, strict=False):
        row[:2] = span.tokens[0], span.start
        first = 2
        held = widths(pool, span.stop)
        for group, width in widths(pool, tokens).items():
            blocks = span.pages.block_ids[group][: held[group]]
            row[first : first + len(blocks)] = blocks
            row[first + len(blocks) : first + width] = blocks[0]
            first += width
    found[len(spans) :] = found[0]
    return found
