"""transformers' continuous batching as an `Engine`: its scheduler, paged attention and `PagedAttentionCache`.

Requests are computed one after another here, with the tokens that the instance chooses; a serving process that drives
a `ContinuousBatchingManager` of its own needs `PagedMemory` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from hetkv.errors import HetkvError, InputError, PoolFullError
from hetkv.integrations.engine import Engine, Logits, Ready, Sequence
from hetkv.integrations.fingerprint import checkpoint_fingerprint
from hetkv.integrations.transformers.paged import PagedMemory
from hetkv.kv.dtypes import DType
from hetkv.models import parse_config

SETTINGS = {field.name for field in fields(ContinuousBatchingConfig)}
"""The settings that this version of transformers has."""
NO_LIMIT = 1 << 30
"""New tokens of a request: the instance decides when it ends."""


class BatchingEngine(Engine):
    """A checkpoint, loaded by `AutoModelForCausalLM`, in a `ContinuousBatchingManager` that is stepped from here."""

    name = "transformers-paged"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        slots: int = 4,
        capacity: int = 1024,
        chunk: int = 512,
        block_size: int = 32,
        device: str = "cpu",
        attention: str = "sdpa",
    ) -> None:
        """`slots` sequences of `capacity` tokens; `chunk`: tokens of a step; `attention`: transformers' name of it.
        Raises `InputError`."""
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, dtype=DType.parse(dtype).torch, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{model}: transformers does not load it: {error}") from None
        self.model = loaded.eval().to(self.device)
        # Versions without this setting take a name without "paged|" for a wish, and look for a better one elsewhere.
        plain = "auto_switch_to_flash" in SETTINGS
        self.model.set_attn_implementation(attention if plain else f"paged|{attention}")
        self.room = capacity
        blocks = slots * -(-capacity // block_size) + 2
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=_config(block_size, blocks, max(chunk, slots)),
        )
        self.processor = self.manager._create_batch_processor()
        self.manager.batch_processor, self.manager.current_batch = self.processor, 0
        spec = parse_config(self.model.config.to_dict(), "the model's config").kv_spec()
        self.memory = PagedMemory(self.processor.cache, spec)
        self.pool = self.memory.pool
        self.fingerprint = checkpoint_fingerprint(Path(model), self.model.config.to_dict())
        self.facts = {
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
            "dtype": dtype,
            "device": device,
            "block_size": block_size,
        }
        self.count = 0
        self._logits: torch.Tensor | None = None
        self._written: Callable[[int], None] | None = None
        self.model.register_forward_hook(self._keep)
        self._update = self.processor.cache.update
        self.processor.cache.update = self._report

    def open(self, num_tokens: int) -> BatchingSequence:
        if num_tokens > self.room:
            raise PoolFullError(f"{num_tokens} tokens: a sequence has room for {self.room}")
        return BatchingSequence(self, num_tokens)

    def forward(self, state: RequestState, tokens: list[int], ready: Ready | None) -> Logits:
        """Compute these tokens of a sequence after what it has, as steps of a batch with nothing else in it."""
        active = self.processor.scheduler.active_requests
        state.remaining_prefill_tokens, state.tokens_to_process = list(tokens), []
        state.status = RequestStatus.PREFILLING
        active[state.request_id] = state
        try:
            while state.remaining_prefill_tokens:
                self._step(state, ready)
        finally:
            active.pop(state.request_id, None)
        assert self._logits is not None
        return np.asarray(self._logits[0, -1].float().cpu().numpy())

    def _step(self, state: RequestState, ready: Ready | None) -> None:
        start = state.position_offset
        if not self.processor.prepare_next_batch():
            raise HetkvError(f"transformers does not schedule request {state.request_id}")
        stop, reported = state.position_offset, set()

        def written(layer: int) -> None:
            reported.add(layer)
            if ready is not None:
                ready(layer, start, stop)

        self._written = written
        try:
            self.manager._generation_step()
            self.processor.update_batch()
        finally:
            self._written = None
        if ready is not None:
            for layer in range(len(self.pool.spec.layers)):
                if layer not in reported:  # an attention that writes the cache by itself
                    ready(layer, start, stop)

    def _keep(self, _model: Any, _inputs: Any, output: Any) -> None:
        self._logits = output.logits

    def _report(self, *given: Any, **named: Any) -> Any:
        """`PagedAttentionCache.update`: the layer's KV is written by what the current stream holds when it returns."""
        found = self._update(*given, **named)
        if self._written is not None:
            self._written(named["layer_idx"] if "layer_idx" in named else given[2])
        return found


class BatchingSequence(Sequence):
    """One request of the scheduler, which is in its batches only while this is computed."""

    def __init__(self, engine: BatchingEngine, num_tokens: int) -> None:
        engine.count += 1
        self._engine = engine
        self._state = RequestState(
            request_id=f"hetkv-{engine.count}", initial_tokens=[], max_new_tokens=NO_LIMIT, eos_token_id=-1
        )
        engine.memory.allocate(self._state, num_tokens)
        self.blocks = engine.memory.blocks_of(self._state.request_id)

    def prefill(self, tokens: list[int], ready: Ready) -> Logits:
        return self._engine.forward(self._state, tokens, ready)

    def adopt(self, num_tokens: int) -> None:
        self._state.position_offset = num_tokens

    def step(self, token: int) -> Logits:
        return self._engine.forward(self._state, [token], None)

    def close(self) -> None:
        self._engine.memory.free(self._state.request_id)


def _config(block_size: int, blocks: int, batch: int) -> ContinuousBatchingConfig:
    """Without what would share, move or replay a sequence's blocks. Its field for their size has had two names."""
    named: dict[str, Any] = {"page_size" if "page_size" in SETTINGS else "block_size": block_size}
    if "auto_switch_to_flash" in SETTINGS:
        named["auto_switch_to_flash"] = False
    return ContinuousBatchingConfig(
        **named,
        num_blocks=blocks,
        max_batch_tokens=batch,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        max_blocks_per_request=0,
        max_memory_percent=0.9,
        safety_margin=0.0,
    )
