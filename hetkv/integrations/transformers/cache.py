"""A cache of transformers that lives in a pool: what the model writes can be sent, what arrives can be read.

memory = CacheMemory.of(model, slots=8, capacity=2048)
sender = Sender(memory.pool, instance="prefill-0", fingerprint=...)
cache = memory.take()
request = sender.send("request-1", cache.blocks, num_tokens)
cache.on_write = lambda layer, start, stop: request.send_layer(layer, (start, stop))
model(input_ids, **{cache_keyword(model): cache})           # each layer leaves while the next one computes
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from hetkv.errors import InputError, PoolFullError
from hetkv.integrations.engine import Slots, check_plain
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec
from hetkv.models import parse_config

OnWrite = Callable[[int, int, int], None]
"""Called with (layer, start, stop) once the KV of these tokens is in the pool, or will be once the stream has run."""


def cache_keyword(model: Any) -> str:
    """What this version's `forward` and `generate` call a cache: `cache`, or `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class CacheMemory:
    """KV of up to `slots` sequences of up to `capacity` tokens each, as a pool with one block for each sequence.

    A layer's keys are one tensor `[slots, heads, capacity, head_dim]`, so that a sequence's part of it is what
    transformers' caches hold: `[1, heads, tokens, head_dim]`.
    """

    def __init__(
        self, spec: KVSpec, *, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """Raises `InputError` for layers that are not plain attention over all tokens."""
        self.slots = Slots(slots, capacity)
        check_plain(spec)
        self._tensors = [
            [
                torch.zeros(slots, segment.heads, capacity, segment.channels, dtype=dtype, device=device)
                for segment in layer.segments
            ]
            for layer in spec.layers
        ]
        self.pool = KVPool.from_tensors(spec, self._tensors, "block head token channel")

    @classmethod
    def of(cls, model: Any, *, slots: int, capacity: int) -> CacheMemory:
        """For a loaded `PreTrainedModel`, in its dtype and on its device. Raises `InputError`."""
        spec = parse_config(model.config.to_dict(), "the model's config").kv_spec()
        return cls(spec, slots=slots, capacity=capacity, dtype=model.dtype, device=model.device)

    def take(self, num_tokens: int = 0) -> PooledCache:
        """An empty cache for one sequence of up to `num_tokens` tokens. Raises `PoolFullError`."""
        return PooledCache(self, self.slots.take(num_tokens), [(k, v) for k, v in self._tensors])


class PooledLayer(DynamicLayer):
    """Keys and values of one sequence in one layer: views of the pool, written in place.

    What makes other tensors of them (beams, several sequences of one prompt) leaves the pool: from then on the layer
    grows as a `DynamicLayer` does, and nothing is reported.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, written: Callable[[int, int], None]) -> None:
        super().__init__()
        self._all = keys, values
        self._written = written
        self.device, self.dtype = keys.device, keys.dtype
        self.fill(0)
        self.is_initialized = True

    def fill(self, num_tokens: int) -> None:
        """The first `num_tokens` tokens are there."""
        self.keys, self.values = (part[:, :, :num_tokens] for part in self._all)

    def lazy_initialization(self, *_: torch.Tensor) -> None:
        """Nothing: the memory is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._pooled or key_states.shape[0] != 1:
            if self.get_seq_length() == 0:
                self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
            grown: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        start = self.get_seq_length()
        stop, room = start + key_states.shape[-2], self._all[0].shape[-2]
        if stop > room:
            raise PoolFullError(f"{stop} tokens: the sequence has room for {room}")
        self.fill(stop)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        self._written(start, stop)
        return self.keys, self.values

    def reset(self) -> None:
        self.fill(0)

    @property
    def _pooled(self) -> bool:
        return self.keys.untyped_storage().data_ptr() == self._all[0].untyped_storage().data_ptr()


class PooledCache(Cache):
    """A sequence's cache in a `CacheMemory`. `close` gives its place back."""

    def __init__(self, memory: CacheMemory, slot: int, tensors: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.on_write: OnWrite | None = None
        self.blocks = [[slot]]
        self._memory, self._slot = memory, slot
        super().__init__(
            layers=[
                PooledLayer(keys[slot : slot + 1], values[slot : slot + 1], self._reporter(number))
                for number, (keys, values) in enumerate(tensors)
            ]
        )

    def fill(self, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens has been received: the model goes on after them."""
        for layer in self.layers:
            layer.fill(num_tokens)

    def store(self, cache: Cache) -> None:
        """Copy what another cache of one sequence holds (a `DynamicCache` that a model has filled), to send it."""
        for number, layer in enumerate(cache.layers):
            if layer.keys.shape[0] != 1:
                raise InputError(f"a cache of {layer.keys.shape[0]} sequences; one is sent at a time")
            self.layers[number].fill(0)
            self.layers[number].update(layer.keys, layer.values)

    def dynamic(self) -> DynamicCache:
        """A `DynamicCache` with a copy of it, independent of the pool."""
        copy = DynamicCache()
        for number, layer in enumerate(self.layers):
            copy.update(layer.keys.clone(), layer.values.clone(), number)
        return copy

    def close(self) -> None:
        """Give the place back. The cache must not be used any more."""
        self._memory.slots.give_back(self._slot)

    def _reporter(self, layer: int) -> Callable[[int, int], None]:
        def written(start: int, stop: int) -> None:
            if self.on_write is not None:
                self.on_write(layer, start, stop)

        return written
