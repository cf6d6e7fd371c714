"""What a caller says of a request, as the extension takes it: token counts, block ids, time limits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import index
from typing import Any, SupportsIndex

from hetkv.errors import InputError
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import MAX_SECONDS

MAX_TOKENS = 1 << 31
BlockIds = Sequence[int] | Sequence[Sequence[int]]
"""Block ids of one sequence in token order: one list, or one list per cache group."""


def per_group(spec: KVSpec, num_tokens: int | Sequence[int], block_ids: BlockIds) -> tuple[list[int], list[array[int]]]:
    """Token counts and block ids per cache group; a `state` group has one record, whatever the token count.

    Anything that holds integers will do: lists, arrays, tensors. Raises `InputError`.
    """
    groups = spec.num_groups
    lists = plain(block_ids)
    nested = bool(lists) and not isinstance(lists[0], SupportsIndex)
    blocks = [block_array(plain(ids)) for ids in (lists if nested else [lists])]
    counts = plain(num_tokens)
    try:
        tokens = [index(count) for count in counts] if isinstance(counts, Sequence) else [index(counts)] * groups
    except TypeError:
        raise InputError(f"token counts are integers, not {num_tokens!r}") from None
    if len(blocks) != groups or len(tokens) != groups:
        raise InputError(
            f"the model has {groups} cache groups; got block ids of {len(blocks)}, token counts of {len(tokens)}"
        )
    for group in state_groups(spec):
        tokens[group] = 1
    if any(not 1 <= count < MAX_TOKENS for count in tokens):
        raise InputError(f"a request has 1 to {MAX_TOKENS - 1} tokens, not {num_tokens}")
    return tokens, blocks


def state_groups(spec: KVSpec) -> set[int]:
    """Cache groups whose layers hold one record a request."""
    return {layer.group for layer in spec.layers if layer.kind == "state"}


def block_array(block_ids: Any) -> array[int]:
    """Block ids as the extension takes them, int32. Raises `InputError`."""
    try:
        return array("i", block_ids)
    except OverflowError:
        wrong = next(b for b in block_ids if not -(1 << 31) <= b < 1 << 31)
        raise InputError(f"block id {wrong} is out of range") from None
    except TypeError:
        raise InputError("block ids are integers, in one list or in one list per cache group") from None


def milliseconds(name: str, seconds: float) -> int:
    """A time limit for the engine. Raises `InputError`."""
    if not 0 < seconds <= MAX_SECONDS:
        raise InputError(f"{name} must be above 0 and at most {MAX_SECONDS:g} seconds, not {seconds}")
    return max(1, round(seconds * 1000))


def plain(values: Any) -> Any:
    """Lists of what NumPy and PyTorch hold; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") and not isinstance(values, array) else values
