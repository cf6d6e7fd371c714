"""Prefill whole or in chunks, and greedy decoding: for one process, and as the halves that two instances run.

Of a model that is split over ranks, every rank makes the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch

from hetkv.errors import InputError
from hetkv.kv.pool import KVPool
from hetkv.runtime.model import AroundLayer, Decoder
from hetkv.runtime.paged import BlockAllocator, Pages

OnChunkLayer = Callable[[int, int, int], None]
"""Called with (layer, start, stop) once the KV of tokens `start` to `stop` of that layer is in the pool."""


def greedy(logits: torch.Tensor) -> int:
    """The likeliest token of logits `[vocab]`; the lowest id on a tie."""
    return int(logits.argmax())


def choose(model: Decoder, logits: torch.Tensor | None) -> int:
    """`greedy`, the same on every rank of the model's group; `logits` are `None` on a rank that has none."""
    return model.group.agree(None if logits is None else greedy(logits))


def prefill(
    model: Decoder, tokens: Sequence[int], pages: Pages, *, start: int = 0, chunk: int | None = None,
    on_layer: OnChunkLayer | None = None, around_layer: AroundLayer = nullcontext,
) -> torch.Tensor | None:  # fmt: skip
    """Run a prompt, `chunk` tokens a pass (default: one pass); logits `[vocab]` after its last token.

    `None` on a rank of a pipeline stage that has no logits; `choose` then gives the token.

    `tokens[start:]` are computed; the KV of `tokens[:start]` must be in `pages` already (a cached prefix).
    """
    if not 0 <= start < len(tokens):
        raise InputError(f"a prompt of {len(tokens)} tokens cannot be computed from token {start}")
    if chunk is not None and chunk < 1:
        raise InputError(f"a prefill chunk of {chunk} tokens")
    step = chunk or len(tokens)
    logits = None
    for begin in range(start, len(tokens), step):
        end = min(begin + step, len(tokens))
        logits = model.prefill(tokens[begin:end], begin, pages, _bind(on_layer, begin, end), around_layer)
    return logits


def _bind(on_layer: OnChunkLayer | None, start: int, stop: int) -> Callable[[int], None] | None:
    return None if on_layer is None else lambda layer: on_layer(layer, start, stop)


def decode(
    model: Decoder, first: int, position: int, pages: Pages, max_new_tokens: int, eos_ids: Sequence[int] | None = None
) -> Iterator[int]:
    """Yield `first`, which is at `position`, and then greedy tokens: `max_new_tokens` in all, or up to an end token.

    Each token is yielded before its successor is computed. `eos_ids` default to the checkpoint's; the end token is
    yielded too. The last token's own KV is not computed, so `pages` need `position + max_new_tokens - 1` tokens.
    """
    stops = model.config.eos_ids if eos_ids is None else eos_ids
    token = first
    for index in range(max_new_tokens):
        yield token
        if token in stops or index == max_new_tokens - 1:
            return
        token = choose(model, model.decode_step(token, position + index, pages))


def generate(
    model: Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    pool: KVPool,
    *,
    allocator: BlockAllocator | None = None,
    chunk: int | None = None,
    eos_ids: Sequence[int] | None = None,
) -> list[int]:
    """Greedy continuation of a prompt in one process; the end token, where there is one, included.

    Blocks come from `allocator` (default: the whole pool is free) and go back when done. `PoolFullError` if it has too
    few.
    """
    if not prompt_ids or max_new_tokens < 1:
        raise InputError(f"a prompt of {len(prompt_ids)} tokens, {max_new_tokens} new tokens: both must be at least 1")
    allocator = allocator or BlockAllocator(pool)
    blocks = allocator.allocate(len(prompt_ids) + max_new_tokens - 1)
    try:
        pages = Pages(pool, blocks)
        first = choose(model, prefill(model, prompt_ids, pages, chunk=chunk))
        return list(decode(model, first, len(prompt_ids), pages, max_new_tokens, eos_ids))
    finally:
        allocator.free(blocks)
