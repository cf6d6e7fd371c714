"""Memory of an instance: weights, activations, and the KV cache tokens that fit in the rest."""

from __future__ import annotations

from hetkv.costmodel.catalogue import DTYPE_BYTES, Gpu
from hetkv.costmodel.models import ModelShape
from hetkv.costmodel.request_bytes import RequestBytes
from hetkv.errors import InputError

RUNTIME_BYTES = 1.4 * 2**30
"""Context, libraries, sampler and captured graphs of one rank: with an 8B model on an RTX 4090, vLLM (2,048 tokens a
step) has room for 41,408 tokens."""

GROUP_BYTES = 0.5 * 2**30
"""Communication buffers in addition, of a rank that shares a model with others."""


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


def request_bytes(model: ModelShape, tp: int, kv_dtype: str) -> RequestBytes:
    """What a request keeps over all layers and ranks of one replica. `InputError` where no layer has a KV cache."""
    if not model.attention_layers:
        raise InputError(f"{model.name} has no layer with a KV cache")
    layer = kv_bytes_per_token(model, tp, kv_dtype) / model.attention_layers
    state = model.state_bytes(DTYPE_BYTES[kv_dtype])
    return RequestBytes(layer, model.full_layers, model.sliding_layers, max(model.sliding_window - 1, 0), state)


def activation_bytes(model: ModelShape, tp: int, max_batched_tokens: int) -> float:
    """Bytes of activations of one rank at most: two hidden states, and gate, up and product of the widest MLP."""
    dense = model.dense_mlp_params / (3 * model.hidden) if model.dense_mlp_layers else 0.0
    shared = model.shared_params / (3 * model.hidden)
    routed = model.experts_per_token * (model.expert_params / (3 * model.hidden) * 3 / tp + model.hidden)
    width = max(3 * dense / tp, 3 * shared / tp + (routed if model.experts else 0.0))
    return max_batched_tokens * (2 * model.hidden + width) * 2


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
    """Tokens of KV cache, in all layers, that fit in `memory_share` of the memory, over the `dp` replicas together.

    Raises `InputError` with the sizes when the weights alone do not fit.
    """
    if not 0 < memory_share <= 1:
        raise InputError(f"memory share must be in (0, 1], got {memory_share}")
    budget = gpu.memory_bytes * memory_share
    weights = weight_bytes(model, tp, pp, dp, weight_dtype)
    activations = activation_bytes(model, tp, max_batched_tokens)
    runtime = RUNTIME_BYTES + (GROUP_BYTES if tp * pp * dp > 1 else 0.0)
    left = budget - weights - activations - runtime
    if left <= 0:
        raise InputError(
            f"{model.name} ({weight_dtype}) does not fit on {tp * pp * dp} x {gpu.name} (tp {tp}, pp {pp}, dp {dp}): "
            f"{weights / 2**30:.1f} GiB of weights and {(activations + runtime) / 2**30:.1f} GiB of activations "
            f"and runtime per GPU, {budget / 2**30:.1f} GiB usable"
        )
    per_token = model.kv_elements_per_token(tp) * DTYPE_BYTES[kv_dtype] * (-(-model.layers // pp) / model.layers)
    return int(left / per_token) * dp
