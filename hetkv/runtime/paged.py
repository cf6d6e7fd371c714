"""Paged KV of one sequence: which blocks it owns (`BlockAllocator`), and reading and writing them (`Pages`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hetkv.errors import InputError, PoolFullError
from hetkv.kv.pool import KVPool
from hetkv.runtime.pool_views import PoolViews


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
        """Block ids for `num_tokens` tokens, one list per cache group. `PoolFullError` if any group is short.

        Empty for a group that has no layers in this pool (it is another pipeline stage's).
        """
        return self.extend([[] for _ in self._block_size], num_tokens)

    def extend(self, block_ids: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """`block_ids`, followed by what `num_tokens` tokens need more. `PoolFullError` if any group is short."""
        wanted = [
            max(0, -(-num_tokens // size) - len(ids)) if size else 0
            for size, ids in zip(self._block_size, block_ids, strict=True)
        ]
        for group, count in enumerate(wanted):
            if count > len(self._free[group]):
                raise PoolFullError(
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
    """One sequence's blocks in a pool. It borrows both: the caller that allocated the blocks frees them.

    `block_ids`: one list per cache group, in token order.
    """

    def __init__(self, pool: KVPool, block_ids: Sequence[Sequence[int]]) -> None:
        if len(block_ids) != pool.spec.num_groups:
            raise InputError(f"the model has {pool.spec.num_groups} cache groups, got block ids for {len(block_ids)}")
        self.pool, self.views = pool, PoolViews.of(pool)
        self.block_ids: list[list[int]] = [[] for _ in block_ids]
        self.capacity = 0
        """Tokens that the blocks hold, in the cache group of this pool that holds fewest."""
        self.extend(block_ids)

    def extend(self, block_ids: Sequence[Sequence[int]]) -> None:
        """More blocks, one list per cache group. `InputError` for a block that the pool does not have, or twice."""
        groups = self.pool.cache_groups
        for group, (size, _) in groups.items():
            self.pool.check_blocks(group, block_ids[group], 0, len(block_ids[group]) * size)
        for mine, more in zip(self.block_ids, block_ids, strict=True):
            mine += more
        self.capacity = min(len(self.block_ids[group]) * size for group, (size, _) in groups.items())

    def write(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store keys and values `[tokens, heads, channels]` of tokens `start`, `start + 1`, ... of the sequence."""
        size, table = self._table(layer)
        tokens = torch.arange(start, start + k.shape[0], device=table.device)
        self.views.write(layer, table[tokens // size], tokens % size, k, v)

    def read(self, layer: int, stop: int, dtype: torch.dtype, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What `write` stored, `[stop - start, heads, channels]`, of tokens `start` to `stop`. One gather each."""
        size, table = self._table(layer)
        first = start // size
        k, v = self.views.gather(layer, table[first : -(-stop // size)], dtype)
        return k[start - first * size : stop - first * size], v[start - first * size : stop - first * size]

    def _table(self, layer: int) -> tuple[int, torch.Tensor]:
        group = self.pool.spec.group_of(layer)
        table = torch.tensor(self.block_ids[group], dtype=torch.long, device=self.views.device)
        return self.pool.cache_groups[group].block_size, table
