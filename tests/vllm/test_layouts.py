"""Layouts of backends that do not run here, and the CPU's own: maps against vLLM's indexing of the same tensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheTensor,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    create_kv_cache_views,
)

from hetkv.errors import InputError
from hetkv.integrations.vllm.cpulayout import Kernel, cpu_layout
from hetkv.integrations.vllm.layouts import Layer, layer_memory, layer_spec
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.pool import KVPool
from hetkv.kv.spec import KVSpec, Shard
from hetkv.kv.view import strided_view

BLOCKS, TOKENS, HEADS, CHANNELS = 5, 32, 3, 64


def layer_of(spec: AttentionSpec, backend: str, **module: Any) -> Layer:
    """A layer as vLLM's attention module describes it; only what the connector asks is there."""
    named = SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), **module)
    return Layer(f"model.layers.0.{backend}", 0, spec, named)


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory in which neighbours differ."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(count).remainder(251).to(torch.uint8).view(dtype).reshape(-1)


def views(spec: AttentionSpec, physical: KVCacheLayout, layers: int = 2) -> torch.Tensor:
    """The second layer's cache, allocated as vLLM's own code does for a physical layout."""
    page = spec.page_size_bytes
    raw = torch.arange(layers * BLOCKS * page).remainder(251).to(torch.int8)
    outer = physical.is_block_outermost
    tensor = SimpleNamespace(
        layers=[f"l{i}" for i in range(layers)],
        layer_stride=page if outer else BLOCKS * page,
        block_stride=layers * page if outer else page,
        offset=0,
    )
    assert KVCacheTensor is not None
    return create_kv_cache_views(raw, spec, BLOCKS, physical, tensor)[1]


def pool_of(layer: Layer, memory: LayerMemory, heads: int = HEADS) -> KVPool:
    spec = KVSpec((layer_spec(layer, heads),))
    return KVPool(spec, Shard.whole(spec), {0: memory})


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits: the numbers stand for any value, NaN too."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "ROCM_AITER_UNIFIED_ATTN"])
@pytest.mark.parametrize("physical", ["LBHNC", "LBNHC", "BLHNC", "BLNHC"])
def test_rows_of_k_and_v(backend: str, physical: str) -> None:
    """`[block, head, token, 2d]` in each of vLLM's physical orders."""
    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=CHANNELS, dtype=torch.bfloat16)
    tensor = views(spec, KVCacheLayout[physical])
    layer = layer_of(spec, backend)
    pool = pool_of(layer, layer_memory(layer, tensor))
    k, v = tensor.transpose(1, 2).split(CHANNELS, dim=-1)  # as the backends do
    assert same(pool.view(0, "k"), k)
    assert same(pool.view(0, "v"), v)


def test_flashinfer_heads_of_k_before_heads_of_v() -> None:
    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=CHANNELS, dtype=torch.bfloat16, num_head_slots=2 * HEADS,
        state_content_bytes=CHANNELS * 2,
    )  # fmt: skip
    tensor = views(spec, KVCacheLayout.LBHNC)
    layer = layer_of(spec, "FLASHINFER")
    pool = pool_of(layer, layer_memory(layer, tensor))
    k, v = tensor.split(HEADS, dim=1)
    assert same(pool.view(0, "k"), k.transpose(1, 2))
    assert same(pool.view(0, "v"), v.transpose(1, 2))


def test_rocm_attention() -> None:
    """K `[head, d/x, token, x]` and V `[head, d, token]`, as vLLM's `PagedAttention.split_kv_cache` sees them."""
    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=CHANNELS, dtype=torch.bfloat16, num_head_slots=2,
        state_content_bytes=HEADS * CHANNELS * 2,
    )  # fmt: skip
    tensor = views(spec, KVCacheLayout.LBHNC)
    layer = layer_of(spec, "ROCM_ATTN")
    pool = pool_of(layer, layer_memory(layer, tensor))
    halves = tensor.transpose(0, 1)
    k = halves[0].reshape(BLOCKS, HEADS, CHANNELS // 8, TOKENS, 8)
    v = halves[1].reshape(BLOCKS, HEADS, CHANNELS, TOKENS)
    assert same(pool.view(0, "k"), k.permute(0, 3, 1, 2, 4))
    assert same(pool.view(0, "v"), v.permute(0, 3, 1, 2))


def test_fp8_has_its_static_scales() -> None:
    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=CHANNELS, dtype=torch.uint8,
        kv_quant_mode=KVQuantMode.FP8_PER_TENSOR,
    )  # fmt: skip
    layer = layer_of(spec, "FLASH_ATTN", kv_cache_dtype="fp8_e4m3", _k_scale_float=0.5, _v_scale_float=2.0)
    layout = layer_memory(layer, views(spec, KVCacheLayout.LBNHC)).layout
    scales = {name: part.scale.values for name, part in layout.segments.items() if part.scale}
    assert scales == {"k": (0.5,), "v": (2.0,)}
    assert {part.dtype.value for part in layout.segments.values()} == {"float8_e4m3fn"}


def test_mla() -> None:
    spec = MLAAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    tensor = views(spec, KVCacheLayout.LBHNC)
    layer = layer_of(spec, "TRITON_MLA", impl=SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64))
    pool = pool_of(layer, layer_memory(layer, tensor), 1)
    latent, rope = tensor.transpose(1, 2).split([512, 64], dim=-1)
    assert same(pool.view(0, "latent"), latent)
    assert same(pool.view(0, "rope"), rope)


def test_mixed_fp8_record_of_mla() -> None:
    """656 bytes: 512 fp8 values, 4 float32 scales, 64 bfloat16 values."""
    spec = MLAAttentionSpec(
        block_size=64, num_kv_heads=1, head_size=576, dtype=torch.uint8, cache_dtype_str="fp8_ds_mla",
        state_content_bytes=656,
    )  # fmt: skip
    tensor = views(spec, KVCacheLayout.LBHNC)
    layer = layer_of(spec, "FLASHMLA_SPARSE", impl=SimpleNamespace(kv_lora_rank=512, qk_rope_head_dim=64))
    memory = layer_memory(layer, tensor)
    pool = pool_of(layer, memory, 1)
    records = tensor.transpose(1, 2).contiguous().view(torch.uint8)
    assert same(pool.view(0, "latent"), records[..., :512])
    assert same(pool.view(0, "rope"), records[..., 528:])
    scale = memory.layout.segments["latent"].scale
    assert scale is not None
    assert (scale.offset, scale.token_stride, scale.group_stride, scale.channels_per_scale) == (512, 656, 4, 128)


@pytest.mark.parametrize("mode", [m for m in KVQuantMode if m not in (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR)])
def test_unknown_quantisation_is_rejected_by_name(mode: KVQuantMode) -> None:
    spec = FullAttentionSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=CHANNELS, dtype=torch.uint8, kv_quant_mode=mode
    )
    with pytest.raises(InputError, match=mode.name.lower()):
        layer_memory(layer_of(spec, "TRITON_ATTN"), views(spec, KVCacheLayout.LBHNC))


def test_unknown_backend_is_rejected_by_name() -> None:
    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=CHANNELS, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="B12X"):
        layer_memory(layer_of(spec, "B12X"), views(spec, KVCacheLayout.LBHNC))


def test_sliding_window() -> None:
    spec = SlidingWindowSpec(
        block_size=TOKENS, num_kv_heads=HEADS, head_size=CHANNELS, dtype=torch.bfloat16, sliding_window=128
    )
    assert layer_spec(layer_of(spec, "FLASH_ATTN"), 6).sliding_window == 128


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize(("heads", "channels"), [(1, 64), (3, 96), (7, 128)])
@pytest.mark.parametrize("isa", ["vec", "vec16"])
def test_cpu_kernels(block_size: int, heads: int, channels: int, isa: str) -> None:
    """What the kernel stores through the tensor is read through the map."""
    tensor = torch.zeros(BLOCKS, heads, block_size, 2 * channels, dtype=torch.float32)
    layout: KVLayout = cpu_layout(tensor, Kernel(isa, "auto", torch.float32), {"k": None, "v": None})
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2 * block_size, heads, channels, generator=generator) for _ in range(2))
    slots = torch.cat([torch.arange(block_size) + b * block_size for b in (3, 1)])
    halves = tensor.view(BLOCKS, heads, 2 * block_size, -1).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, *halves, slots, isa)
    for name, stored in (("k", keys), ("v", values)):
        seen = strided_view(layout.segments[name], tensor, block_size, BLOCKS)[[3, 1]]
        assert torch.equal(seen.flatten(0, 1), stored)
