"""llama.cpp as an `Engine`: a GGUF file, or a Hugging Face directory that is written as one first."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import llama_cpp
import numpy as np

from hetkv.errors import InputError
from hetkv.integrations.engine import Engine, Logits, Ready, Sequence
from hetkv.integrations.llama_cpp import gguf_file
from hetkv.integrations.llama_cpp.cache import CacheMemory, check_tokens, evaluate, forget
from hetkv.integrations.llama_cpp.fingerprint import fingerprint_of

CACHE_TYPES = {"float32": llama_cpp.GGML_TYPE_F32, "float16": llama_cpp.GGML_TYPE_F16, "bfloat16": 30}
_quiet = llama_cpp.llama_log_callback(lambda *_: None)


class LlamaCppEngine(Engine):
    """A model in one context of `slots` sequences."""

    name = "llama.cpp"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        slots: int = 4,
        capacity: int = 1024,
        chunk: int = 512,
        threads: int = 1,
        flash_attention: bool = False,
    ) -> None:
        """`dtype`: of the weights, where `model` is a directory, and of the cache. Raises `InputError`."""
        if dtype not in CACHE_TYPES:
            raise InputError(f"dtype {dtype}: {', '.join(CACHE_TYPES)}")
        llama_cpp.llama_log_set(_quiet, None)
        self._stack = ExitStack()
        file = Path(model)
        if file.is_dir():
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hetkv-"))
            file = gguf_file.write(file, Path(folder) / "model.gguf", dtype)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise InputError(f"{file}: llama.cpp does not load it")
        self._stack.callback(llama_cpp.llama_model_free, self._model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = slots * capacity, slots
        settings.n_batch = settings.n_ubatch = chunk
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = CACHE_TYPES[dtype]
        settings.flash_attn_type = int(flash_attention)
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise InputError(f"{file}: llama.cpp makes no context of {slots} sequences of {capacity} tokens")
        self._stack.callback(llama_cpp.llama_free, self._context)
        self.chunk = chunk
        self.memory = CacheMemory(self._context, self._model, capacity=capacity)
        self.pool = self.memory.pool
        self.fingerprint = fingerprint_of(self._model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self.facts = {
            "llama_cpp_python": llama_cpp.__version__,
            "dtype": dtype,
            "flash_attention": flash_attention,
            "v_transposed": self.memory.form.transposed,
        }

    def open(self, num_tokens: int) -> LlamaCppSequence:
        return LlamaCppSequence(self, self.memory.take(num_tokens))

    def compute(self, sequence: int, tokens: list[int], position: int) -> Logits:
        """Logits after the last of these tokens of a sequence, which begin at `position`."""
        check_tokens(tokens, self.vocabulary)
        evaluate(self._context, sequence, tokens, position)
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.array(np.ctypeslib.as_array(pointer, (self.vocabulary,)))

    def forget(self, sequence: int) -> None:
        """Empty a sequence."""
        forget(self._context, sequence)

    def close(self) -> None:
        self._stack.close()


class LlamaCppSequence(Sequence):
    """One of the context's sequences."""

    def __init__(self, engine: LlamaCppEngine, slot: int) -> None:
        self._engine, self._slot, self._length = engine, slot, 0
        self.blocks = [[slot]]

    def prefill(self, tokens: list[int], ready: Ready) -> Logits:
        step = self._engine.chunk
        for start in range(0, len(tokens), step):
            logits = self._engine.compute(self._slot, tokens[start : start + step], start)
        self._length = len(tokens)
        self._engine.memory.save(self._slot, len(tokens))
        for layer in self._engine.pool.layers:
            ready(layer, 0, len(tokens))
        return logits

    def adopt(self, num_tokens: int) -> None:
        self._engine.memory.load(self._slot, num_tokens)
        self._length = num_tokens

    def step(self, token: int) -> Logits:
        logits = self._engine.compute(self._slot, [token], self._length)
        self._length += 1
        return logits

    def close(self) -> None:
        self._engine.forget(self._slot)
        self._engine.memory.give_back(self._slot)
