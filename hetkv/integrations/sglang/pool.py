"""SGLang's KV cache of one rank as a pool, and what of SGLang is not served: `pool_of`, `check`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec, Shard

MOST_AUX_BYTES = 64 * 1024


class _At:
    """Memory by its address: `[block, token, head, channel]`."""

    def __init__(self, address: int, shape: Sequence[int], itemsize: int, device: str) -> None:
        fields = {"data": (address, False), "shape": tuple(shape), "typestr": f"|V{itemsize}", "version": 3}
        if itemsize > 2:
            fields["typestr"] = "<f4"
        setattr(self, "__array_interface__" if device == "cpu" else "__cuda_array_interface__", fields)


def check(args: Any, parallel: Any, policy: str, is_mla: bool) -> None:
    """Raise `InputError` for what this backend does not move, by name. `args`: SGLang's `KVArgs`."""
    rejected = {
        "models with MLA": is_mla or bool(getattr(args, "is_hybrid_mla_backend", False)),
        "layers that keep a state, or a pool of their own for a sliding window": bool(args.state_types),
        "draft models": bool(args.num_draft_entries),
        "pipeline parallelism": parallel.pp_size > 1,
        "context parallelism": parallel.attn_cp_size > 1 or parallel.attn_dcp_size > 1,
        "data-parallel attention": parallel.attn_dp_size > 1,
        f"the allocation policy {policy}": policy != "early",
        f"the KV layout {args.kv_layout}": args.kv_layout is not None,
    }
    for name, asked in rejected.items():
        if asked:
            raise InputError(f"SGLang's {name}: not supported by the transfer backend hetkv")
    if sum(args.aux_item_lens) > MOST_AUX_BYTES:
        raise InputError(
            f"SGLang's metadata has {sum(args.aux_item_lens)} bytes a request, over the {MOST_AUX_BYTES} of a payload"
        )


def pool_of(args: Any, dtype: str, device: str, tp: int, tp_rank: int) -> KVPool:
    """The pool of a rank: K of all layers, then V of all, each `[page, token, head, channel]`.

    `args`: SGLang's `KVArgs`; `device`: `cpu` or `cuda`. Raises `InputError` where the sizes do not fit together.
    """
    kind = DType.parse(dtype)
    count, odd = divmod(len(args.kv_data_ptrs), 2)
    row = args.page_size * args.kv_head_num * kind.itemsize
    if odd or not count or any(size % row for size in args.kv_item_lens):
        raise InputError(
            f"SGLang's {len(args.kv_data_ptrs)} buffers with pages of {sorted(set(args.kv_item_lens))} bytes are not K "
            f"and V of {args.kv_head_num} heads in {dtype}, {args.page_size} tokens a page"
        )
    dims = [size // row for size in args.kv_item_lens]
    if len(set(dims[:count])) > 1 or len(set(dims[count:])) > 1:
        raise InputError(f"SGLang's layers have heads of {dims} channels: not of one size")
    spec = KVSpec.uniform(count, args.total_kv_head_num, dims[0], dims[count])
    shard = Shard.of(spec, tp=tp, tp_rank=tp_rank)
    tensors = []
    for layer in range(count):
        parts = {}
        for name, at in (("k", layer), ("v", count + layer)):
            pages = args.kv_data_lens[at] // args.kv_item_lens[at]
            shape = (pages, args.page_size, args.kv_head_num, dims[at])
            parts[name] = _At(args.kv_data_ptrs[at], shape, kind.itemsize, device)
        tensors.append(parts)
    return KVPool.from_tensors(spec, tensors, "block token head channel", shard=shard, dtype=kind.value)


def read_aux(args: Any, index: int) -> bytes:
    """What SGLang keeps of a request besides KV: its row of each buffer, in host memory."""
    pairs = zip(args.aux_data_ptrs, args.aux_item_lens, strict=True)
    return b"".join(ctypes.string_at(address + index * size, size) for address, size in pairs)


def write_aux(args: Any, index: int, data: bytes) -> None:
    """The same into this side's buffers. Raises `InputError` where the other side's have other sizes."""
    if len(data) != sum(args.aux_item_lens):
        raise InputError(f"the prefill's metadata has {len(data)} bytes, the decode's {sum(args.aux_item_lens)}")
    at = 0
    for address, size in zip(args.aux_data_ptrs, args.aux_item_lens, strict=True):
        ctypes.memmove(address + index * size, data[at : at + size], size)
        at += size
