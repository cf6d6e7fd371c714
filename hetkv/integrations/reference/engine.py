"""hetkv's own decoder as an `Engine`: a paged pool of any layout, block size and dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hetkv.integrations.engine import Engine, Logits, Ready, Sequence
from hetkv.integrations.fingerprint import checkpoint_fingerprint
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.runtime.generation import prefill
from hetkv.runtime.model import Decoder
from hetkv.runtime.paged import BlockAllocator, Pages


class ReferenceEngine(Engine):
    """A checkpoint in `hetkv.runtime.model.Decoder`."""

    name = "reference"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        slots: int = 4,
        capacity: int = 1024,
        chunk: int = 512,
        device: str = "cpu",
        block_size: int = 16,
        layout: str = "hnd",
    ) -> None:
        """Raises `InputError`."""
        self.model = Decoder.load(model, DType.parse(dtype).torch, device)
        self.chunk = chunk
        blocks = slots * -(-capacity // block_size)
        self.pool = KVPool.allocate(
            self.model.kv_spec, blocks, layout=layout, block_size=block_size, dtype=dtype, device=device
        )
        self.allocator = BlockAllocator(self.pool)
        self.fingerprint = checkpoint_fingerprint(Path(model))
        self.facts = {"torch": str(torch.__version__), "dtype": dtype, "block_size": block_size, "layout": layout}

    def open(self, num_tokens: int) -> ReferenceSequence:
        return ReferenceSequence(self, self.allocator.allocate(num_tokens))


class ReferenceSequence(Sequence):
    """One sequence's pages."""

    def __init__(self, engine: ReferenceEngine, blocks: list[list[int]]) -> None:
        self._engine, self.blocks = engine, blocks
        self._pages, self._length = Pages(engine.pool, blocks), 0

    def prefill(self, tokens: list[int], ready: Ready) -> Logits:
        logits = prefill(self._engine.model, tokens, self._pages, chunk=self._engine.chunk, on_layer=ready)
        self._length = len(tokens)
        return _plain(logits)

    def adopt(self, num_tokens: int) -> None:
        self._length = num_tokens

    def step(self, token: int) -> Logits:
        logits = self._engine.model.decode_step(token, self._length, self._pages)
        self._length += 1
        return _plain(logits)

    def close(self) -> None:
        self._engine.allocator.free(self.blocks)


def _plain(logits: torch.Tensor | None) -> Logits:
    assert logits is not None  # of one rank
    return np.asarray(logits.float().cpu().numpy())
