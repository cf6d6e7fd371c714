"""Memory of an instance: weights, activations, and the KV cache tokens that fit beside them."""

from __future__ import annotations

from hetkv.costmodel.catalogue import DTYPE_BYTES, Gpu
from hetkv.costmodel.models import ModelShape
from hetkv.errors import InputError

RUNTIME_BYTES = 2.0 * 2**30
"""Context, libraries, communication buffers and captured graphs of one rank (AIConfigurator assumes 0.5 to 3.5 GiB)."""


def weight_bytes(model: ModelShape, tp: int, pp: int, dp: int, weight_dtype: str) -> float:
    """Bytes of weights on the fullest rank. Embedding and head stay in bf16; `tp * dp` ranks share the experts."""
    dense_dtype = "bf16" if model.experts_only_quantised else weight_dtype
    dense = model.dense_params * DTYPE_BYTES[dense_dtype] / tp
    routed = model.routed_params * DTYPE_BYTES[weight_dtype] / (tp * dp)
    share = -(-model.layers // pp) / model.layers
    tables = model.head_params * (1 if model.tied or pp > 1 else 2) * 2 / tp
    return (dense + routed) * share + tables


def kv_bytes_per_token(model: ModelShape, tp: int, kv_dtype: str) -> float:
    """Bytes of KV cache per token over all layers and all `tp` ranks of one replica, with replicated heads."""
    return model.kv_elements_per_token(tp) * DTYPE_BYTES[kv_dtype] * tp


def kv_capacity_tokens(
    gpu: Gpu,
    model: ModelShape,
    tp: int,
    pp: int,
    dp: int,
    weight_dtype: str,
    kv_dtype: str,
    max_batched_tokens: int,
    memory_share: float,
) -> int:
    """Tokens of KV cache that fit in `memory_share` of the memory, over the `dp` replicas together.

    Raises `InputError` with the sizes when the weights alone do not fit. Layers with a window are counted as full ones:
    engines without a hybrid allocator hold them so.
    """
    if not 0 < memory_share <= 1:
        raise InputError(f"memory share must lie in (0, 1], got {memory_share}")
    budget = gpu.memory_bytes * memory_share
    weights = weight_bytes(model, tp, pp, dp, weight_dtype)
    width = max(model.hidden, 3 * model.dense_mlp_params // (3 * model.hidden * tp) if model.dense_mlp_layers else 0)
    activations = max_batched_tokens * (4 * model.hidden + 2 * width) * 2
    left = budget - weights - activations - RUNTIME_BYTES
    if left <= 0:
        raise InputError(
            f"{model.name} ({weight_dtype}) does not fit on {tp * pp * dp} x {gpu.name} (tp {tp}, pp {pp}, dp {dp}): "
            f"{weights / 2**30:.1f} GiB of weights and {(activations + RUNTIME_BYTES) / 2**30:.1f} GiB of activations "
            f"and runtime per GPU, {budget / 2**30:.1f} GiB usable"
        )
    per_token = model.kv_elements_per_token(tp) * DTYPE_BYTES[kv_dtype] * (-(-model.layers // pp) / model.layers)
    return int(left / per_token) * dp if per_token else 2**62
