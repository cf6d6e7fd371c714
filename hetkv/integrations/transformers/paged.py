"""transformers' `PagedAttentionCache`, the paged cache of its continuous batching, as a pool: `PagedMemory`.

memory = PagedMemory(manager.batch_processor.cache, spec)
sender = Sender(memory.pool, instance="prefill-0")
sender.send(request_id, memory.blocks_of(request_id), num_tokens)
"""

from __future__ import annotations

from typing import Any

import torch

from hetkv.errors import InputError, PoolFullError, UnsupportedError
from hetkv.integrations.engine import check_plain
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec


class PagedMemory:
    """The blocks of a cache whose layers are all full attention, without prefix sharing.

    Up to transformers 5.17 a layer's keys are a tensor `[pages x tokens, heads, head_dim]`; later ones keep all layers'
    keys and values of a block together in one tensor for the whole cache. The pool is that memory either way.
    """

    def __init__(self, cache: Any, spec: KVSpec) -> None:
        """Raises `InputError` for other layers, and `UnsupportedError` for a cache of an unknown form."""
        check_plain(spec)
        self.cache = cache
        if cache.allow_block_sharing:
            raise InputError("the cache shares blocks of equal prompts: set allow_block_sharing=False")
        allocators = getattr(cache, "group_cache_managers", None) or list(
            getattr(cache, "cache_allocators", {}).values()
        )
        if len(allocators) != 1:
            raise UnsupportedError(f"a PagedAttentionCache with {len(allocators)} allocators; one is supported")
        self._allocator = allocators[0]
        self._by_layer = hasattr(cache, "key_cache")
        self.block_size: int = cache.block_size if self._by_layer else self._allocator.tokens_per_page
        tensors = self._by_layer_tensors() if self._by_layer else self._interleaved_tensors()
        self.pool = KVPool.from_tensors(spec, tensors, "block token head channel")

    def _by_layer_tensors(self) -> list[list[torch.Tensor]]:
        cache = self.cache
        order = [cache.layer_index_to_group_indices[layer][1] for layer in range(len(cache.key_cache))]
        return [[self._pages(part[at]) for part in (cache.key_cache, cache.value_cache)] for at in order]

    def _pages(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, self.block_size, *tensor.shape[1:])

    def _interleaved_tensors(self) -> list[list[torch.Tensor]]:
        allocator = self._allocator
        heads, channels = allocator.cache_tensor.shape[-2:]
        layers = len(allocator.layer_indices)
        blocks = allocator.cache_tensor.view(-1, layers, 2, self.block_size, heads, channels)
        return [[blocks[:, at, 0], blocks[:, at, 1]] for at in range(layers)]

    def blocks_of(self, request_id: str) -> list[list[int]]:
        """The blocks of a request, in token order, as `send` and `receive` take them."""
        return [list(self._allocator.block_table[request_id])]

    def allocate(self, state: Any, num_tokens: int) -> None:
        """Room for `num_tokens` tokens of a `RequestState` that has none yet. Raises `PoolFullError`."""
        if not self._by_layer:
            if not self.cache.can_store_request_tokens(state, num_tokens):
                raise PoolFullError(f"{num_tokens} tokens: the cache has no room")
            return
        allocated = self.cache.allocate_blocks(-(-num_tokens // self.block_size), state.request_id, 0)
        if allocated is None:
            raise PoolFullError(f"{num_tokens} tokens: the cache has {self.cache.get_num_free_blocks()} blocks left")
        state.allocated_blocks = allocated

    def free(self, request_id: str) -> None:
        """Give a request's blocks back."""
        self.cache.free_blocks(request_id)
