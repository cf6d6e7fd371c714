"""What a text should be: greedy tokens by `transformers`, or by one process of hetkv that moves nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.runtime.generation import choose, decode, prefill
from hetkv.runtime.model import Decoder
from hetkv.runtime.paged import BlockAllocator, Pages
from hetkv.runtime.plan import InstancePlan, SideOptions
from hetkv.runtime.prompts import Prompt, first_line

Reference = Literal["transformers", "self", "none"]
Pair = tuple[InstancePlan, InstancePlan]
"""The prefill and the decode instance of a request."""


def default_reference() -> Reference:
    """`transformers` where it is installed."""
    return "transformers" if find_spec("transformers") else "self"


def rounds(pair: Pair, compute_dtype: str) -> bool:
    """Whether KV or compute has fewer bits than the fp32 that `transformers` is run with."""
    return any(DType.parse(name) is not DType.FLOAT32 for name in (compute_dtype, *(side.pool.dtype for side in pair)))


class SelfReference:
    """One process, which prefills in a pool of the prefill instance's kind, converts it once to the decode instance's,
    and decodes there: the same rounding without a transfer."""

    def __init__(self, model: str, compute_dtype: str, chunk: int | None) -> None:
        self._model, self._chunk = Decoder.load(model, DType.parse(compute_dtype).torch), chunk

    def tokens(self, prompt: Sequence[int], count: int, pair: Pair) -> list[int]:
        """Greedy tokens, the end token included."""
        source, destination = (self._pages(side.pool, len(prompt) + count) for side in pair)
        first = choose(self._model, prefill(self._model, prompt, source, chunk=self._chunk))
        if pair[0].pool.dtype == pair[1].pool.dtype:
            destination = source
        else:
            for layer in source.pool.layers:
                destination.write(layer, 0, *source.read(layer, len(prompt), torch.float32))
        return list(decode(self._model, first, len(prompt), destination, count))

    def _pages(self, side: SideOptions, tokens: int) -> Pages:
        blocks = -(-tokens // side.block_size)
        pool = KVPool.allocate(
            self._model.kv_spec, blocks, layout=side.layout, block_size=side.block_size, dtype=side.dtype
        )
        return Pages(pool, BlockAllocator(pool).allocate(tokens))


class TransformersReference:
    """`transformers` itself, on the CPU, in fp32."""

    def __init__(self, model: str, eos_ids: Sequence[int]) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        transformers: Any = import_module("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._path, self._transformers = model, transformers
        try:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, local_files_only=True
            )
        except Exception as error:  # whatever the library makes of a checkpoint that it does not read
            raise InputError(f"{model}: transformers does not load it: {first_line(error)}") from None
        self._model: Any = loaded.eval()
        # The checkpoint's own settings are not merged in: greedy decoding is compared.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=list(eos_ids) or None, pad_token_id=0
        )

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy tokens, the end token included."""
        ids = torch.tensor([list(prompt)])
        out = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def same_ids(self, prompts: Sequence[Prompt], ids: Sequence[list[int]]) -> bool | None:
        """Whether `transformers`' own tokenizer makes the same tokens of the texts; None where it reads none."""
        try:
            tokenizer = self._transformers.AutoTokenizer.from_pretrained(self._path, local_files_only=True)
        except Exception:  # a tokenizer.json alone is enough for hetkv
            return None
        return all(self._ids(tokenizer, prompt) == ours for prompt, ours in zip(prompts, ids, strict=True))

    def _ids(self, tokenizer: Any, prompt: Prompt) -> list[int]:
        if prompt.messages is None:
            made = tokenizer(prompt.text)
        else:
            made = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, return_dict=True)
        ids: list[int] = made["input_ids"]
        return ids
