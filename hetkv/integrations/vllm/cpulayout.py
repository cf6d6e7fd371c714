"""Where vLLM's CPU attention keeps keys and values: read off its own cache-writing kernel, not guessed.

The CPU backend's tensor is `[block, head, token, 2 * channel]` by its shape alone. Its kernels store K and V of a head
one after the other, K transposed (`vec`, `vec16`), or in tiles (`amx`), as the instruction set asks. So two scratch
blocks are written through the kernel with numbered elements, and their places are read back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from vllm import _custom_ops as ops

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.segment import SegmentLayout


class Kernel(NamedTuple):
    """What decides how the CPU backend stores a layer."""

    isa: str
    cache_dtype: str
    """vLLM's name: `auto`, `fp8`, ..."""
    compute_dtype: torch.dtype


def cpu_layout(tensor: torch.Tensor, kernel: Kernel, scales: dict[str, ScaleLayout | None]) -> KVLayout:
    """Layout of a layer's cache `[block, head, token, 2 * channel]`. `InputError` where it is not a strided map."""
    _, heads, block_size, width = tensor.shape
    size, channels = tensor.element_size(), width // 2
    dense = (heads * block_size * width, block_size * width, width, 1)
    if tensor.stride()[1:] != dense[1:]:
        raise InputError(f"the CPU backend's cache has strides {tensor.stride()}, expected dense blocks {dense}")
    places = _places(tensor, kernel)
    segments = {}
    for name, place in places.items():
        token, head, channel = (
            int(place[index] - place[0, 0, 0]) for index in ((1, 0, 0), (0, min(1, heads - 1), 0), (0, 0, 1))
        )
        steps = [torch.arange(count) for count in place.shape]
        linear = steps[0][:, None, None] * token + steps[1][:, None] * head + steps[2] * channel
        if not torch.equal(place, place[0, 0, 0] + linear):
            raise InputError(
                f"the CPU attention kernel {kernel.isa!r} keeps {name} in tiles that no strided map describes: "
                "choose another --dtype (float16 and float32 never use AMX)"
            )
        segments[name] = SegmentLayout(
            dtype=DType.parse(tensor.dtype),
            heads=heads,
            channels=channels,
            offset=int(place[0, 0, 0]) * size,
            block_stride=tensor.stride(0) * size,
            token_stride=token * size,
            head_stride=head * size,
            inner_stride=channel * size,
            pack=channels,
            scale=scales[name],
        )
    return KVLayout(f"vllm_cpu_{kernel.isa}", block_size, segments, shared=True)


def _places(tensor: torch.Tensor, kernel: Kernel) -> dict[str, torch.Tensor]:
    """For `k` and `v`: offset in elements from a block's start of each (token, head, channel)."""
    _, heads, block_size, width = tensor.shape
    count = block_size * heads * (width // 2)
    number = torch.arange(count)
    return {name: _place(tensor, kernel, name == "k", number) for name in ("k", "v")}


def _place(tensor: torch.Tensor, kernel: Kernel, keys: bool, number: torch.Tensor) -> torch.Tensor:
    """The numbers are written bit by bit, as ones and zeros, which every dtype holds exactly."""
    _, heads, block_size, width = tensor.shape
    shape = (block_size, heads, width // 2)

    def written(values: torch.Tensor) -> torch.Tensor:
        """Which elements of block 1 the kernel makes non-zero when it stores `values` and nothing else."""
        cache = torch.zeros(2, heads, block_size, width, dtype=tensor.dtype)
        mine = values.to(kernel.compute_dtype).reshape(shape)
        pair = (mine, torch.zeros_like(mine)) if keys else (torch.zeros_like(mine), mine)
        halves = cache.view(2, heads, block_size * 2, -1).chunk(2, dim=2)
        slots = torch.arange(block_size, 2 * block_size)
        ops.cpu_attn_reshape_and_cache(*pair, *halves, slots, kernel.isa, 1.0, 1.0, kernel.cache_dtype)
        return cache.view(2, -1)[1].view(torch.uint8).view(-1, cache.element_size()).any(dim=1)

    found = torch.zeros(heads * block_size * width, dtype=torch.int64)
    for bit in range(max(1, (number.numel() - 1).bit_length())):
        found |= written((number >> bit) & 1).to(torch.int64) << bit
    offsets = torch.full((number.numel(),), -1)
    used = written(torch.ones_like(number)).nonzero().flatten()
    offsets[found[used]] = used
    if used.numel() != number.numel() or (offsets < 0).any():
        raise InputError(f"the CPU attention kernel {kernel.isa!r} does not store one element for each of its input")
    return offsets.reshape(shape)
