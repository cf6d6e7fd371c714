"""MLX as an `Engine`: a checkpoint that `mlx_lm.load` reads, its KV through a `CacheMemory`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from hetkv.errors import InputError
from hetkv.integrations.engine import Engine, Logits, Ready, Sequence
from hetkv.integrations.fingerprint import checkpoint_fingerprint
from hetkv.integrations.mlx.cache import CacheMemory, check_cache
from hetkv.models import read_config


class MlxEngine(Engine):
    """A checkpoint in `mlx_lm`."""

    name = "mlx"

    def __init__(
        self, model: str, *, dtype: str = "float32", slots: int = 4, capacity: int = 1024, chunk: int = 512
    ) -> None:
        """`chunk`: tokens that are computed, and sent, at once. Raises `InputError`."""
        kind = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}.get(dtype)
        if kind is None:
            raise InputError(f"dtype {dtype}: float32, float16 or bfloat16")
        try:
            self.model: Any = load_model(Path(model))[0]
        except (OSError, ValueError) as error:
            raise InputError(f"{model}: mlx_lm does not load it: {error}") from None
        self.model.set_dtype(kind)
        for cache in make_prompt_cache(self.model):
            check_cache(cache)
        self.chunk = chunk
        self.memory = CacheMemory(read_config(Path(model)).kv_spec(), slots=slots, capacity=capacity, dtype=kind)
        self.pool = self.memory.pool
        self.fingerprint = checkpoint_fingerprint(Path(model))
        self.facts = {"mlx": version("mlx"), "mlx_lm": version("mlx-lm"), "dtype": dtype}

    def open(self, num_tokens: int) -> MlxSequence:
        return MlxSequence(self, self.memory.take(num_tokens))


class MlxSequence(Sequence):
    """A list of `KVCache`, one for each layer."""

    def __init__(self, engine: MlxEngine, slot: int) -> None:
        self._engine, self._slot = engine, slot
        self.blocks = [[slot]]
        self.caches: list[Any] = make_prompt_cache(engine.model)

    def prefill(self, tokens: list[int], ready: Ready) -> Logits:
        step, last = self._engine.chunk, len(tokens) - 1
        for start in range(0, last, step):
            self._forward(tokens[start : min(start + step, last)])
            self._save(start, min(start + step, last), ready)
        logits = self.step(tokens[last])
        self._save(last, last + 1, ready)
        return logits

    def adopt(self, num_tokens: int) -> None:
        self.caches = self._engine.memory.load(self._slot, num_tokens)

    def step(self, token: int) -> Logits:
        return np.array(self._forward([token])[0, -1].astype(mx.float32))

    def close(self) -> None:
        self._engine.memory.give_back(self._slot)

    def _forward(self, tokens: list[int]) -> Any:
        """Logits of every token: MLX computes those that are looked at."""
        logits = self._engine.model(mx.array([tokens]), cache=self.caches)
        mx.eval([(cache.keys, cache.values) for cache in self.caches])
        return logits

    def _save(self, start: int, stop: int, ready: Ready) -> None:
        for layer, cache in enumerate(self.caches):
            self._engine.memory.save(self._slot, layer, cache, start, stop)
            ready(layer, start, stop)
