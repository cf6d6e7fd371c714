"""From vLLM's KV cache tensors to a `KVPool`: the model's spec, this rank's shard, and each layer's layout.

vLLM binds one logical tensor `[block, head, token, content]` a layer; its strides give its order in memory, and the
attention backend says what a row of content is. Backends whose rows are known are listed here; others are rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    RSWASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import KVSpec, LayerSpec, Segment, Shard

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

ROWS = {"FLASH_ATTN", "FLASH_ATTN_DIFFKV", "FLASHINFER", "FLEX_ATTENTION", "ROCM_AITER_UNIFIED_ATTN", "TRITON_ATTN",
        "TRITON_ATTN_DIFFKV"}  # fmt: skip
"""Backends whose content is a row of K, followed by the row of V of the same token and head."""
LATENT = {"AITER_TRITON_MLA", "CPU_MLA", "CUTLASS_MLA", "FLASHINFER_MLA", "FLASHMLA", "FLASHMLA_SPARSE",
          "FLASH_ATTN_MLA", "ROCM_AITER_MLA", "TRITON_MLA"}  # fmt: skip
"""MLA backends whose content is the compressed latent, followed by the rotary part."""
ROCM_UNIT_BYTES = 16
"""Width of the innermost run of K in ROCm paged attention."""
DS_MLA_BYTES = 656
"""A record of `fp8_ds_mla`: 512 fp8 values, 4 float32 scales of 128 values each, 64 bfloat16 rotary values."""


class Layer(NamedTuple):
    """One attention layer of vLLM that has a cache of its own."""

    name: str
    group: int
    """Position among the cache groups that take part in transfers."""
    spec: AttentionSpec
    module: Any
    """vLLM's attention module: backend, static scales, MLA dimensions."""


class Caches(NamedTuple):
    """The pool, and what translates vLLM's names and block ids into it."""

    pool: KVPool
    instance_shards: tuple[Shard, ...]
    rank: int
    index_of: dict[str, int]
    """Global layer index of each layer name."""
    kernel_blocks: tuple[int, ...]
    """Per cache group: blocks of the pool that one of vLLM's blocks is split into."""

    def blocks(self, groups: tuple[list[int], ...]) -> list[list[int]]:
        """Block ids of the pool for vLLM's."""
        return [
            ids if ratio == 1 else [block * ratio + part for block in ids for part in range(ratio)]
            for ids, ratio in zip(groups, self.kernel_blocks, strict=True)
        ]


def caches(config: VllmConfig, cache_config: KVCacheConfig, tensors: Mapping[str, torch.Tensor]) -> Caches:
    """Describe a worker's KV caches. Raises `InputError` that names the layer and what cannot be served."""
    parallel = config.parallel_config
    layers = own_layers(config, cache_config, tensors)
    if not layers:
        raise InputError("the model has no KV cache that can be transferred")
    tp, rank = parallel.tensor_parallel_size, get_tensor_model_parallel_rank()
    total = config.model_config.get_total_num_kv_heads()
    spec = KVSpec(tuple(layer_spec(layer, layer.spec.num_kv_heads * tp if total >= tp else total) for layer in layers))
    memory: dict[int, LayerMemory] = {}
    ratios: dict[int, int] = {}
    for index, layer in enumerate(layers):
        try:
            memory[index] = layer_memory(layer, tensors[layer.name])
        except InputError as error:
            raise InputError(f"layer {layer.name}: {error}") from None
        ratios[layer.group] = layer.spec.block_size // memory[index].layout.block_size
    shards = tuple(Shard.of(spec, tp=tp, tp_rank=r) for r in range(tp))
    pool = KVPool(spec, shards[rank], memory)
    index_of = {layer.name: index for index, layer in enumerate(layers)}
    return Caches(pool, shards, rank, index_of, tuple(ratios[group] for group in range(spec.num_groups)))


def own_layers(config: VllmConfig, cache_config: KVCacheConfig, tensors: Mapping[str, torch.Tensor]) -> list[Layer]:
    """Layers with a cache of their own, in model order. A layer that reads another's cache has none."""
    modules = config.compilation_config.static_forward_context
    found = []
    for group, members in enumerate(cache_config.transfer_groups):
        for name in members.layer_names:
            module = modules[name]
            if name not in tensors or getattr(module, "kv_sharing_target_layer_name", None) is not None:
                continue
            spec: KVCacheSpec = members.kv_cache_spec
            if isinstance(spec, UniformTypeKVCacheSpecs):
                spec = spec.kv_cache_specs[name]
            if not isinstance(spec, AttentionSpec) or spec.tokens_per_state != 1:
                raise InputError(f"layer {name}: caches of {type(spec).__name__} cannot be transferred")
            found.append(Layer(name, group, spec, module))
    return sorted(found, key=lambda layer: (extract_layer_index(layer.name), layer.name))


def layer_spec(layer: Layer, heads: int) -> LayerSpec:
    """Geometry of a layer with `heads` KV heads over all ranks."""
    spec = layer.spec
    if isinstance(spec, MLAAttentionSpec):
        latent, rope = mla_dims(layer)
        return LayerSpec.latent(latent, rope, group=layer.group)
    if type(spec) is SlidingWindowSpec:
        window = spec.sliding_window + spec.extra_retained_tokens
        return LayerSpec.kv(heads, spec.head_size, spec.head_size_v, group=layer.group, sliding_window=window)
    if isinstance(spec, FullAttentionSpec) and not isinstance(spec, RSWASpec):
        return LayerSpec.kv(heads, spec.head_size, spec.head_size_v, group=layer.group)
    raise InputError(f"layer {layer.name}: caches of {type(spec).__name__} cannot be transferred")


def mla_dims(layer: Layer) -> tuple[int, int]:
    """Latent and rotary channels of an MLA layer."""
    owner = getattr(layer.module, "impl", layer.module)
    latent, rope = int(owner.kv_lora_rank), int(owner.qk_rope_head_dim)
    if layer.spec.state_content_bytes is None and latent + rope != layer.spec.head_size:
        raise InputError(f"layer {layer.name}: {latent} latent and {rope} rotary channels, the cache has "
                         f"{layer.spec.head_size}")  # fmt: skip
    return latent, rope


def layer_memory(layer: Layer, tensor: torch.Tensor) -> LayerMemory:
    """Layout and memory of one layer's tensor `[block, head, token, content]`."""
    spec, backend = layer.spec, layer.module.get_attn_backend().get_name()
    if isinstance(spec, MLAAttentionSpec) and spec.cache_dtype_str == "fp8_ds_mla":
        return _whole(_ds_mla(layer, tensor), tensor)
    if spec.kv_quant_mode not in (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR):
        raise InputError(f"KV cache quantisation {spec.kv_quant_mode.name.lower()} is not known to this connector")
    tensor = typed(tensor, spec, layer.module)
    if isinstance(spec, MLAAttentionSpec):
        if backend not in LATENT:
            raise InputError(f"the cache of attention backend {backend} is not known to this connector")
        latent, rope = mla_dims(layer)
        segments = [Segment("latent", 1, latent), Segment("rope", 1, rope)]
        layout = KVLayout.from_tensor(tensor, "block head token channels", segments, f"vllm_{backend.lower()}",
                                      scales(layer)["k"])  # fmt: skip
        return _whole(layout, tensor)
    if backend == "CPU_ATTN":
        from hetkv.integrations.vllm.cpulayout import Kernel, cpu_layout

        impl = layer.module.impl
        kernel = Kernel(cpu_isa(layer), impl.kv_cache_dtype, layer.module.dtype)
        return _whole(cpu_layout(tensor, kernel, scales(layer)), tensor)
    return _gpu_memory(layer, tensor, backend)


def _gpu_memory(layer: Layer, tensor: torch.Tensor, backend: str) -> LayerMemory:
    """Rows of K followed by V, K heads before V heads, or ROCm's packed halves."""
    spec, name = layer.spec, f"vllm_{backend.lower()}"
    heads, width = spec.num_kv_heads, spec.head_size + spec.head_size_v
    slots, content = tensor.shape[1], tensor.shape[3]
    if backend in ROWS and (slots, content) == (heads, width):
        parts = [Segment("k", heads, spec.head_size), Segment("v", heads, spec.head_size_v)]
        rows = KVLayout.from_tensor(tensor, "block head token channels", parts, name)
        return _whole(_scaled(rows, scales(layer)), tensor)
    if backend == "FLASHINFER" and (slots, content) == (2 * heads, spec.head_size):
        return _halves(tensor[:, :heads], tensor[:, heads:], "block head token channel", name, scales(layer))
    if backend == "ROCM_ATTN" and (slots, content) == (2, heads * spec.head_size):
        pack = ROCM_UNIT_BYTES // tensor.element_size()
        blocks, _, tokens, _ = tensor.shape
        channels = spec.head_size
        # Each half of a block is one contiguous region, [head, channel / x, token, x] and [head, channel, token].
        k = tensor[:, 0].as_strided(
            (blocks, heads, channels // pack, tokens, pack),
            (tensor.stride(0), channels * tokens, tokens * pack, pack, 1),
        )
        v = tensor[:, 1].as_strided((blocks, heads, channels, tokens), (tensor.stride(0), channels * tokens, tokens, 1))
        axes = {"k": "block head outer token inner", "v": "block head channel token"}
        return _halves(k, v, axes, name, scales(layer))
    raise InputError(f"the cache of attention backend {backend}, {list(tensor.shape)}, is not known to this connector")


def _halves(
    k: torch.Tensor, v: torch.Tensor, axes: str | dict[str, str], name: str, scale: dict[str, ScaleLayout | None]
) -> LayerMemory:
    """K and V in tensors of their own."""
    tensors = {"k": k, "v": v}
    return LayerMemory(_scaled(KVLayout.from_tensor(tensors, axes, name=name), scale), k.shape[0], tensors)


def _whole(layout: KVLayout, tensor: torch.Tensor) -> LayerMemory:
    """All segments in one tensor."""
    return LayerMemory(layout, tensor.shape[0], dict.fromkeys(layout.segments, tensor))


def _scaled(layout: KVLayout, scale: dict[str, ScaleLayout | None]) -> KVLayout:
    """The layout with each segment's own static scale."""
    import msgspec

    segments = {name: msgspec.structs.replace(part, scale=scale[name]) for name, part in layout.segments.items()}
    return msgspec.structs.replace(layout, segments=segments)


def _ds_mla(layer: Layer, tensor: torch.Tensor) -> KVLayout:
    """The mixed record of `fp8_ds_mla` in a byte tensor `[block, 1, token, 656]`."""
    latent, rope = mla_dims(layer)
    if (latent, rope, tensor.shape[3] * tensor.element_size()) != (512, 64, DS_MLA_BYTES):
        raise InputError(f"fp8_ds_mla with {latent} latent and {rope} rotary channels in {tensor.shape[3]} bytes")
    block, _, token, _ = (step * tensor.element_size() for step in tensor.stride())
    scale = ScaleLayout(offset=512, block_stride=block, token_stride=token, group_stride=4, channels_per_scale=128)
    fp8, wide = DType.FLOAT8_E4M3FN, DType.BFLOAT16
    parts = {
        "latent": SegmentLayout(fp8, 1, latent, 0, block, token, 0, 1, latent, scale=scale),
        "rope": SegmentLayout(wide, 1, rope, 528, block, token, 0, 2, rope),
    }
    return KVLayout("vllm_fp8_ds_mla", tensor.shape[2], parts, shared=True)


def typed(tensor: torch.Tensor, spec: AttentionSpec, module: Any) -> torch.Tensor:
    """The tensor with its real element type: vLLM keeps fp8 as bytes."""
    import torch

    if spec.kv_quant_mode is KVQuantMode.NONE:
        return tensor
    name = str(module.kv_cache_dtype)
    if name in ("fp8", "fp8_e4m3"):
        return tensor.view(current_platform.fp8_dtype())
    if name == "fp8_e5m2":
        return tensor.view(torch.float8_e5m2)
    raise InputError(f"KV cache dtype {name!r} is not known to this connector")


def scales(layer: Layer) -> dict[str, ScaleLayout | None]:
    """Static scales of K and V: an element is code x scale. None where the cache is not quantised."""
    if layer.spec.kv_quant_mode is KVQuantMode.NONE:
        return {"k": None, "v": None}
    return {part: ScaleLayout((float(getattr(layer.module, f"_{part}_scale_float")),)) for part in ("k", "v")}


def cpu_isa(layer: Layer) -> str:
    """Instruction set whose kernels the CPU backend runs for this layer."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    spec = layer.spec
    isa: str = getattr(layer.module, "isa", None) or _get_attn_isa(
        layer.module.dtype, spec.block_size, spec.head_size, layer.module.impl.kv_cache_dtype
    )
    return isa
