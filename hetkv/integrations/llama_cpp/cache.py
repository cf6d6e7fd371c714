"""Between llama.cpp's KV cache and a pool in its cells' layout: `CacheMemory`.

A slot of the pool is a sequence of the context. llama.cpp keeps K as rows of one token, and V as such rows or, without
flash attention, transposed. Where it applies rotary embeddings to neighbouring channels (its `NORM` type, as for Llama)
it keeps the two halves of a head that others rotate against each other interleaved: channel c of other engines is at
`2 * (c % (d / 2)) + c // (d / 2)`. The pool's map says all that; nothing is permuted by a pass of its own.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from hetkv.errors import HetkvError, InputError, UnsupportedError
from hetkv.integrations.engine import Slots
from hetkv.integrations.llama_cpp.state import Bytes, StateForm
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec

TYPES = {llama_cpp.GGML_TYPE_F32: DType.FLOAT32, llama_cpp.GGML_TYPE_F16: DType.FLOAT16, 30: DType.BFLOAT16}
"""Of `ggml_type`. Quantised caches keep float16 scales inside their rows, which a pool's map does not know."""
PROBE_TOKENS = 2


class CacheMemory(Slots):
    """The pool of one context. `save` copies a sequence's KV into its slot, `load` makes a slot a sequence's KV."""

    def __init__(self, context: Any, model: Any, *, capacity: int) -> None:
        """`context` and `model`: pointers of `llama_cpp`; the context has no sequences yet. `capacity`: tokens of each.

        Raises `UnsupportedError` for a cache that is not known here: quantised, of sliding windows, recurrent.
        """
        super().__init__(llama_cpp.llama_n_seq_max(context), capacity)
        self._context = context
        self.form = self._probe()
        kinds = {part.type for part in self.form.parts}
        if len(kinds) != 1 or (kind := kinds.pop()) not in TYPES:
            raise UnsupportedError(f"a cache of ggml types {sorted(kinds) or kind}: f32, f16 or bf16, K and V alike")
        self.dtype = TYPES[kind]
        layers, heads = len(self.form.parts) // 2, llama_cpp.llama_model_n_head_kv(model)
        rows = [{part.row for part in side} for side in (self.form.parts[:layers], self.form.parts[layers:])]
        if any(len(sizes) != 1 for sizes in rows) or layers != llama_cpp.llama_model_n_layer(model):
            raise UnsupportedError("a model whose layers' caches differ is not supported")
        sizes = [sizes.pop() // self.dtype.itemsize // heads for sizes in rows]
        self.spec = KVSpec.uniform(layers, heads, *sizes)
        plain = np.dtype(np.uint16) if self.dtype is DType.BFLOAT16 else self.dtype.numpy
        k_shape: tuple[int, ...] = (self.count, capacity, heads, sizes[0])
        v_shape, k_axes, v_axes = (*k_shape[:-1], sizes[1]), "block token head channel", "block token head channel"
        if interleaved(model, sizes[0]):
            k_shape, k_axes = (*k_shape[:-1], sizes[0] // 2, 2), "block token head inner outer"
        if self.form.transposed:
            v_shape, v_axes = (self.count, heads, sizes[1], capacity), "block head channel token"
        self._arrays = [[np.zeros(shape, plain) for _ in range(layers)] for shape in (k_shape, v_shape)]
        self.pool = KVPool.from_tensors(
            self.spec,
            list(zip(*self._arrays, strict=True)),
            {"k": k_axes, "v": v_axes},
            dtype=self.dtype.value,
        )

    def save(self, slot: int, num_tokens: int) -> None:
        """Copy the KV of a sequence's `num_tokens` tokens, which are all it has, to the pool. Raises `HetkvError`."""
        state = self._state(slot)
        if len(state) != len(self.form.make(slot, num_tokens)[0]):
            raise HetkvError(f"llama.cpp's sequence {slot} has other tokens than the {num_tokens} that were computed")
        for data, place in zip(self.form.data(state, slot, num_tokens), self._places(slot, num_tokens), strict=True):
            place[...] = data.view(place.dtype).reshape(place.shape)

    def load(self, slot: int, num_tokens: int) -> None:
        """Make the first `num_tokens` tokens of a slot the whole KV of its sequence. Raises `HetkvError`."""
        state, parts = self.form.make(slot, num_tokens)
        for data, place in zip(parts, self._places(slot, num_tokens), strict=True):
            data.view(place.dtype).reshape(place.shape)[...] = place
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama_cpp.llama_state_seq_set_data(self._context, pointer, len(state), slot) != len(state):
            raise HetkvError(f"llama.cpp did not take the KV of {num_tokens} tokens: has its cache room for them?")

    def _places(self, slot: int, num_tokens: int) -> list[npt.NDArray[Any]]:
        """Where the parts of a sequence's state are in the pool."""
        keys, values = self._arrays
        if self.form.transposed:
            return [*(array[slot, :num_tokens] for array in keys), *(array[slot, ..., :num_tokens] for array in values)]
        return [array[slot, :num_tokens] for array in (*keys, *values)]

    def _state(self, slot: int) -> Bytes:
        size = llama_cpp.llama_state_seq_get_size(self._context, slot)
        state = np.empty(size, np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if size == 0 or llama_cpp.llama_state_seq_get_data(self._context, pointer, size, slot) != size:
            raise HetkvError(f"llama.cpp did not give the state of sequence {slot}")
        return state

    def _probe(self) -> StateForm:
        """The form of a state, read from a sequence of a few tokens."""
        last = self.count - 1
        try:
            evaluate(self._context, last, [0] * PROBE_TOKENS, 0)
            return StateForm.parse(self._state(last), last, PROBE_TOKENS)
        finally:
            forget(self._context, last)


def interleaved(model: Any, channels: int) -> bool:
    """Whether K keeps rotary pairs side by side. Raises `UnsupportedError` where only some channels are rotated."""
    kind = llama_cpp.llama_model_rope_type(model)
    if kind not in (llama_cpp.LLAMA_ROPE_TYPE_NONE, llama_cpp.LLAMA_ROPE_TYPE_NORM, llama_cpp.LLAMA_ROPE_TYPE_NEOX):
        raise UnsupportedError(f"rotary embeddings of llama.cpp's type {kind} are not supported")
    architecture = metadata(model, "general.architecture")
    rotated = int(metadata(model, f"{architecture}.rope.dimension_count") or channels)
    if kind == llama_cpp.LLAMA_ROPE_TYPE_NORM and rotated != channels:
        raise UnsupportedError(f"{rotated} of {channels} channels are rotated: only all of them are supported")
    return bool(kind == llama_cpp.LLAMA_ROPE_TYPE_NORM)


def metadata(model: Any, key: str) -> str:
    """A value of the model file's metadata as text; empty where it has none."""
    buffer = ctypes.create_string_buffer(1024)
    size = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode(errors="replace") if size >= 0 else ""


def evaluate(context: Any, sequence: int, tokens: list[int], position: int) -> None:
    """Compute tokens of a sequence from `position`; logits are made for the last. Raises `HetkvError`."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, position + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = place == len(tokens) - 1
        code = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if code != 0:
        raise HetkvError(f"llama_decode of {len(tokens)} tokens at {position} ended with {code}")


def forget(context: Any, sequence: int) -> None:
    """Empty a sequence."""
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), sequence, -1, -1)


def check_tokens(tokens: list[int], vocabulary: int) -> None:
    """Raise `InputError` for ids that are none: llama.cpp ends the process for some of them."""
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise InputError(f"token id {wrong}: the vocabulary has {vocabulary}")
