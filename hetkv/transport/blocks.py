"""What a caller says of a request, as the extension takes it: token counts, block ids, time limits."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from operator import index
from typing import Any, SupportsIndex

from hetkv.errors import InputError
from hetkv.kv.memory import is_torch
from hetkv.kv.spec import KVSpec
from hetkv.transport.config import MAX_SECONDS

MAX_TOKENS = 1 << 31
BlockIds = Any
"""Block ids of one sequence in token order: one list, or one list per cache group. A list is any iterable of integers
with an order: also an array of NumPy or PyTorch, an `array.array`, a generator."""


def per_group(spec: KVSpec, num_tokens: int | Sequence[int], block_ids: BlockIds) -> tuple[list[int], list[array[int]]]:
    """Token counts and block ids per cache group; a `state` group has one record for any token count.

    Raises `InputError`.
    """
    groups = spec.num_groups
    blocks = [block_array(ids) for ids in _lists(block_ids)]
    tokens = integers("num_tokens", num_tokens, groups)
    if len(blocks) != groups or len(tokens) != groups:
        raise InputError(
            f"the model has {groups} cache groups; got block ids of {len(blocks)}, token counts of {len(tokens)}"
        )
    for group in spec.state_groups:
        tokens[group] = 1
    if any(not 1 <= count < MAX_TOKENS for count in tokens):
        raise InputError(f"a request has 1 to {MAX_TOKENS - 1} tokens, not {num_tokens}")
    return tokens, blocks


def integers(name: str, value: Any, count: int) -> list[int]:
    """One integer for each of `count` cache groups, or each one's own. Raises `InputError`."""
    if type(value) is int:
        return [value] * count
    value = plain(value)
    try:
        return [index(value)] * count if isinstance(value, SupportsIndex) else [index(at) for at in value]
    except TypeError:
        raise InputError(f"{name} is an integer, or one for each cache group, not {value!r}") from None


def _lists(block_ids: BlockIds) -> list[Any]:
    """One list for each cache group that was given."""
    if type(block_ids) is list and block_ids and type(block_ids[0]) is int:
        return [block_ids]
    if isinstance(block_ids, (set, frozenset, Mapping, str, bytes)) or not isinstance(block_ids, Iterable):
        raise InputError(f"block ids are in token order, so not in a {type(block_ids).__name__}")
    if hasattr(block_ids, "ndim"):
        return list(block_ids) if block_ids.ndim == 2 else [block_ids]
    if isinstance(block_ids, array):
        return [block_ids]
    lists = block_ids if isinstance(block_ids, (list, tuple, range)) else list(block_ids)
    nested = len(lists) > 0 and (not isinstance(lists[0], SupportsIndex) or getattr(lists[0], "ndim", 0) > 0)
    return list(lists) if nested else [lists]


def block_array(block_ids: Any) -> array[int]:
    """Block ids as the extension takes them, int32; arrays without a loop of Python's. Raises `InputError`."""
    if isinstance(block_ids, array) and block_ids.typecode == "i":
        return block_ids
    if is_torch(block_ids):
        block_ids = block_ids.detach().cpu().numpy()
    if hasattr(block_ids, "__array_interface__"):
        return _of_numpy(block_ids)
    if isinstance(block_ids, (set, frozenset, Mapping)):
        raise InputError(f"block ids are in token order, so not in a {type(block_ids).__name__}")
    ids = block_ids if isinstance(block_ids, (list, tuple, range, array)) else _listed(block_ids)
    try:
        return array("i", ids)
    except OverflowError:
        wrong = next(b for b in ids if not -(1 << 31) <= b < 1 << 31)
        raise InputError(f"block id {wrong} is out of range") from None
    except TypeError:
        raise InputError("block ids are integers, in one list or in one list per cache group") from None


def _listed(values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise InputError(f"block ids are integers in a list or an array, not {values!r}") from None


def _of_numpy(ids: Any) -> array[int]:
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise InputError(f"block ids are integers in one axis, not {ids.dtype} of shape {ids.shape}")
    if ids.size and not -(1 << 31) <= int(ids.min()) <= int(ids.max()) < 1 << 31:
        raise InputError(f"block id {ids[(ids < 0) | (ids >= 1 << 31)][0]} is out of range")
    found = array("i")
    found.frombytes(ids.astype("i4").tobytes())
    return found


def milliseconds(name: str, seconds: float) -> int:
    """A time limit for the engine. Raises `InputError`."""
    if not isinstance(seconds, Real) or not 0 < seconds <= MAX_SECONDS:
        raise InputError(f"{name} must be above 0 and at most {MAX_SECONDS:g} seconds, not {seconds}")
    return max(1, round(seconds * 1000))


def plain(values: Any) -> Any:
    """Lists of what NumPy and PyTorch hold; anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") and not isinstance(values, array) else values
