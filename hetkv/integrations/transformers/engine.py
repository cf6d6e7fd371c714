"""transformers as an `Engine`: any Llama-like model, its KV in a `CacheMemory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from hetkv.errors import InputError
from hetkv.integrations.engine import Engine, Logits, Ready, Sequence
from hetkv.integrations.fingerprint import checkpoint_fingerprint
from hetkv.integrations.transformers.cache import CacheMemory, PooledCache, cache_keyword
from hetkv.kv.dtypes import DType


class TransformersEngine(Engine):
    """A checkpoint, loaded by `AutoModelForCausalLM`."""

    name = "transformers"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        slots: int = 4,
        capacity: int = 1024,
        chunk: int = 512,
        device: str = "cpu",
    ) -> None:
        """`chunk`: tokens that are computed at once. Raises `InputError`."""
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=DType.parse(dtype).torch, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{model}: transformers does not load it: {error}") from None
        self.model = loaded.eval().to(device)
        self.keyword = cache_keyword(self.model)
        self.chunk = chunk
        self.memory = CacheMemory.of(self.model, slots=slots, capacity=capacity)
        self.pool = self.memory.pool
        self.fingerprint = checkpoint_fingerprint(Path(model), self.model.config.to_dict())
        self.facts = {"transformers": transformers.__version__, "torch": str(torch.__version__), "dtype": dtype}

    def open(self, num_tokens: int) -> TransformersSequence:
        return TransformersSequence(self, self.memory.take(num_tokens))


class TransformersSequence(Sequence):
    """One `PooledCache`."""

    def __init__(self, engine: TransformersEngine, cache: PooledCache) -> None:
        self._engine, self.cache = engine, cache
        self.blocks = cache.blocks

    def prefill(self, tokens: list[int], ready: Ready) -> Logits:
        self.cache.on_write = ready
        step = self._engine.chunk
        try:
            for start in range(0, len(tokens), step):
                logits = self._forward(tokens[start : start + step])
        finally:
            self.cache.on_write = None
        return logits

    def adopt(self, num_tokens: int) -> None:
        self.cache.fill(num_tokens)

    def step(self, token: int) -> Logits:
        return self._forward([token])

    def close(self) -> None:
        self.cache.close()

    @torch.inference_mode()
    def _forward(self, tokens: list[int]) -> Logits:
        model = self._engine.model
        ids = torch.tensor([tokens], device=model.device)
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._engine.keyword: self.cache})
        return np.asarray(out.logits[0, -1].float().cpu().numpy())
