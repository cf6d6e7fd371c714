"""Paged KV of one sequence: which blocks it owns (`BlockAllocator`), and reading and writing them (`Pages`).

Every access goes through `KVPool.view`, so it is the same code for every layout: index by block, then by token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetkv.errors import HetkvError, InputError
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.segment import SegmentLayout


class PoolFull(HetkvError):
    """A cache group has too few free blocks. Nothing was allocated; try again once a sequence has ended."""


class BlockAllocator:
    """Free blocks of a pool, per cache group. Last freed, first used."""

    def __init__(self, pool: KVPool) -> None:
        groups = range(pool.spec.num_groups)
        self._block_size = [pool.cache_groups[group][0] if group in pool.cache_groups else None for group in groups]
        self._free = [
            list(range(pool.cache_groups[group][1]))[::-1] if group in pool.cache_groups else [] for group in groups
        ]
        self._owned: list[set[int]] = [set() for _ in groups]

    def free_blocks(self, group: int = 0) -> int:
        """Blocks of a cache group that can be allocated now."""
        return len(self._free[group])

    def allocate(self, num_tokens: int) -> list[list[int]]:
        """Block ids for `num_tokens` tokens, one list per cache group. `PoolFull` if any group is short.

        Empty for a group that has no layers in this pool (it is another pipeline stage's).
        """
        return self.extend([[] for _ in self._block_size], num_tokens)

    def extend(self, block_ids: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """`block_ids`, followed by what `num_tokens` tokens need more. `PoolFull` if any group is short."""
        wanted = [
            max(0, -(-num_tokens // size) - len(ids)) if size else 0
            for size, ids in zip(self._block_size, block_ids, strict=True)
        ]
        for group, count in enumerate(wanted):
            if count > len(self._free[group]):
                raise PoolFull(
                    f"{num_tokens} tokens need {count} blocks of {self._block_size[group]} in cache group {group}, "
                    f"{len(self._free[group])} are free"
                )
        taken = [[self._free[group].pop() for _ in range(count)] for group, count in enumerate(wanted)]
        for group, ids in enumerate(taken):
            self._owned[group].update(ids)
        return [[*ids, *more] for ids, more in zip(block_ids, taken, strict=True)]

    def free(self, block_ids: Sequence[Sequence[int]]) -> None:
        """Give back what `allocate` returned (or part of it). `InputError` for a block that is not allocated."""
        for group, ids in enumerate(block_ids):
            wrong = [block for block in ids if block not in self._owned[group]]
            if wrong:
                raise InputError(f"block {wrong[0]} of cache group {group} is not allocated")
            if len(set(ids)) < len(ids):
                raise InputError(f"cache group {group}: a block is given back twice in {list(ids)}")
        for group, ids in enumerate(block_ids):
            self._owned[group].difference_update(ids)
            self._free[group].extend(reversed(ids))


class Pages:
    """One sequence's blocks in a pool. It borrows both: whoever allocated the blocks frees them.

    `block_ids`: one list per cache group, in token order. Values are cast to the pool's dtype when written (saturating
    for FP8, divided by the segment's static scale) and cast up when read.
    """

    def __init__(self, pool: KVPool, block_ids: Sequence[Sequence[int]]) -> None:
        if len(block_ids) != pool.spec.num_groups:
            raise InputError(f"the model has {pool.spec.num_groups} cache groups, got block ids for {len(block_ids)}")
        self.pool = pool
        self.block_ids = [list(ids) for ids in block_ids]
        device = pool.view(
            *next((layer, name) for layer, at in pool.layers.items() for name in at.layout.segments)
        ).device
        self._tables = [torch.tensor(ids, dtype=torch.long, device=device) for ids in self.block_ids]
        self._views: dict[tuple[int, str], torch.Tensor] = {}
        self._last: tuple[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] | None = None
        self.capacity = min(len(self.block_ids[group]) * size for group, (size, _) in pool.cache_groups.items())
        """Tokens that the blocks hold, in the cache group of this pool that holds fewest."""
        for group, (size, _) in pool.cache_groups.items():
            pool.check_blocks(group, self.block_ids[group], 0, len(self.block_ids[group]) * size)
        for layer, memory in pool.layers.items():
            for name, part in memory.layout.segments.items():
                if not part.dtype.torch.is_floating_point:
                    raise InputError(
                        f"layer {layer}, segment {name!r}: the runtime does not compute with {part.dtype.value} KV"
                    )
                if part.scale is not None and not part.scale.values:
                    raise InputError(
                        f"layer {layer}, segment {name!r}: the runtime does not read scales kept in the block"
                    )
                view = pool.view(layer, name)
                # FP8 has no indexed copy on every device; moves of one-byte codes need no arithmetic.
                self._views[layer, name] = view.view(torch.uint8) if part.dtype.itemsize == 1 else view

    def write(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store keys and values `[tokens, heads, channels]` of tokens `start`, `start + 1`, ... of the sequence.

        Of a `latent` layer they are the latent and its rotary key: the two segments of a layer's spec, in order.
        """
        blocks, offsets = self._slots(self.pool.spec.group_of(layer), start, k.shape[0])
        for (name, _, _), values in zip(self.pool.spec.layers[layer].segments, (k, v), strict=True):
            part, view = self.pool.layers[layer].layout.segments[name], self._views[layer, name]
            view[blocks, offsets] = _encode(values, part).reshape(-1, *view.shape[2:])

    def read(self, layer: int, stop: int, dtype: torch.dtype, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What `write` stored, `[stop - start, heads, channels]`, of tokens `start` to `stop`. One gather each."""
        memory = self.pool.layers[layer]
        size = memory.layout.block_size
        first = start // size
        blocks = self._tables[self.pool.spec.group_of(layer)][first : -(-stop // size)]
        gathered = []
        for name, _, _ in self.pool.spec.layers[layer].segments:
            part = memory.layout.segments[name]
            rows = self._views[layer, name][blocks].reshape(-1, part.heads, part.channels)
            gathered.append(_decode(rows[start - first * size : stop - first * size], part, dtype))
        return gathered[0], gathered[1]

    def _slots(self, group: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block id and place inside the block of each token; kept, because every layer of a pass asks for the same."""
        key = (group, start, count)
        if self._last is None or self._last[0] != key:
            size, _ = self.pool.cache_groups[group]
            table = self._tables[group]
            tokens = torch.arange(start, start + count, device=table.device)
            self._last = (key, (table[tokens // size], tokens % size))
        return self._last[1]


def _encode(values: torch.Tensor, part: SegmentLayout) -> torch.Tensor:
    target = part.dtype.torch
    if part.scale is not None:
        values = values.float() / _scale(part.scale, values)
    if target.itemsize == 1:
        limit = torch.finfo(target).max
        return values.float().clamp(-limit, limit).to(target).view(torch.uint8)
    return values.to(target)


def _decode(codes: torch.Tensor, part: SegmentLayout, dtype: torch.dtype) -> torch.Tensor:
    values = codes.view(part.dtype.torch) if part.dtype.itemsize == 1 else codes
    if part.scale is not None:
        return (values.float() * _scale(part.scale, values)).to(dtype)
    return values.to(dtype)


def _scale(scale: ScaleLayout, like: torch.Tensor) -> torch.Tensor:
    """Static scale as `[1 or heads, 1]`, to go with `[tokens, heads, channels]`."""
    return torch.tensor(scale.values, dtype=torch.float32, device=like.device)[:, None]
