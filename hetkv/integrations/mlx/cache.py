"""Between `mlx_lm`'s `KVCache`, whose arrays MLX owns and replaces, and a pool of host memory."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from hetkv.errors import InputError
from hetkv.integrations.slots import Array, HostSlots
from hetkv.kv.dtypes import DType
from hetkv.kv.spec import KVSpec


class CacheMemory(HostSlots):
    """A pool for the caches of one model. `save` puts tokens of a cache into it, `load` makes a cache of it."""

    def __init__(self, spec: KVSpec, *, slots: int, capacity: int, dtype: Any = mx.float32) -> None:
        """`dtype`: of the caches' arrays, an `mlx.core.Dtype`. Raises `InputError`."""
        kind = DType.parse(str(dtype).removeprefix("mlx.core."))
        if kind not in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16):
            raise InputError(f"caches of {dtype}: float32, float16 or bfloat16")
        self.dtype = dtype
        super().__init__(spec, slots, capacity, kind)

    def save(self, slot: int, layer: int, cache: KVCache, start: int, stop: int) -> None:
        """Copy tokens `[start, stop)` of a layer's cache to its place in the pool; computes them where MLX has not."""
        check_cache(cache)
        for array, place in zip((cache.keys, cache.values), self.arrays[layer], strict=True):
            place[slot, :, start:stop] = self._plain(array[0, :, start:stop])

    def load(self, slot: int, num_tokens: int) -> list[KVCache]:
        """Caches of all layers that hold the first `num_tokens` tokens: what `mlx_lm.generate` takes."""
        made = []
        for keys, values in self.arrays:
            cache = KVCache()
            cache.keys = self._array(keys[slot, :, :num_tokens])
            cache.values = self._array(values[slot, :, :num_tokens])
            cache.offset = num_tokens
            made.append(cache)
        return made

    def _plain(self, array: Any) -> Array:
        if array.dtype != self.dtype:
            raise InputError(f"the cache is {array.dtype}, the pool was made for {self.dtype}")
        return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)

    def _array(self, part: Array) -> Any:
        made = mx.array(np.ascontiguousarray(part[None]))
        return made.view(mx.bfloat16) if self.dtype == mx.bfloat16 else made


def check_cache(cache: Any) -> None:
    """Raise `InputError` for what is not a plain cache of one sequence: rotating, quantised, batched."""
    if type(cache) is not KVCache:
        raise InputError(f"a {type(cache).__name__} is not supported: only a KVCache is")
    if cache.keys is not None and cache.keys.shape[0] != 1:
        raise InputError(f"a cache of {cache.keys.shape[0]} sequences; one is sent at a time")
