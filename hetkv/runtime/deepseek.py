"""What DeepSeek-V2's `config.json` adds to `ModelConfig`, its tensors, and how tensor parallelism cuts them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from hetkv.errors import InputError
from hetkv.kv.spec import Interval

if TYPE_CHECKING:
    from hetkv.runtime.config import ModelConfig


class Latent(msgspec.Struct, frozen=True):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): channels of its parts."""

    rank: int
    """Compressed keys and values of a token (`kv_lora_rank`): what the cache keeps, for all heads at once."""
    query_rank: int | None
    """Compressed queries (`q_lora_rank`); None: queries are projected directly (V2-Lite)."""
    nope_dim: int
    """Channels of a query or key head without position."""
    rope_dim: int
    """Rotary channels of a query head, and of the one key that all heads share: cached beside the latent."""
    value_dim: int
    """Channels of a value head."""


class Experts(msgspec.Struct, frozen=True):
    """Mixture of experts in place of the MLP."""

    first_layer: int
    """Layers before it have a dense MLP."""
    count: int
    per_token: int
    shared: int
    """Experts that every token takes: one MLP of `shared * inner`."""
    inner: int
    scale: float
    """Factor on the routed experts' weights."""
    groups: int
    """Groups that the experts fall into; a token takes experts of at most `groups_per_token` of them."""
    groups_per_token: int


class _Raw(msgspec.Struct):
    """Fields of `config.json` beside those that all architectures have."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    first_k_dense_replace: int = 0
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    moe_layer_freq: int = 1
    routed_scaling_factor: float = 1.0
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    scoring_func: Literal["softmax"] = "softmax"
    norm_topk_prob: bool | None = False
    n_group: int | None = None
    topk_group: int | None = None


def read(path: Path) -> tuple[Latent, Experts | None]:
    """Geometry of the attention and of the experts in a `config.json`. `InputError` names the file and the field."""
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=_Raw)
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: {error}") from None
    for field in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        value = getattr(raw, field)
        if value is not None and value < 1:
            raise InputError(f"{path}: {field} is {value}, it must be at least 1")
    if raw.qk_rope_head_dim % 2:
        raise InputError(f"{path}: qk_rope_head_dim {raw.qk_rope_head_dim} is odd, rotary embedding needs pairs")
    latent = Latent(raw.kv_lora_rank, raw.q_lora_rank, raw.qk_nope_head_dim, raw.qk_rope_head_dim, raw.v_head_dim)
    return latent, None if raw.n_routed_experts is None else _experts(path, raw)


def _experts(path: Path, raw: _Raw) -> Experts:
    grouped = raw.topk_method == "group_limited_greedy"
    numbers = {
        "n_routed_experts": raw.n_routed_experts,
        "num_experts_per_tok": raw.num_experts_per_tok,
        "n_shared_experts": raw.n_shared_experts,
        "moe_intermediate_size": raw.moe_intermediate_size,
        **({"n_group": raw.n_group, "topk_group": raw.topk_group} if grouped else {}),
    }
    given: dict[str, int] = {}
    for field, value in numbers.items():
        if value is None or value < 1:
            raise InputError(f"{path}: {field} is {value}, a model with experts needs at least 1")
        given[field] = value
    count, groups = given["n_routed_experts"], given.get("n_group", 1)
    if given["num_experts_per_tok"] > count or count % groups or given.get("topk_group", 1) > groups:
        raise InputError(f"{path}: {given} do not fit each other")
    if raw.norm_topk_prob:
        raise InputError(f"{path}: norm_topk_prob true is not supported; supported is false")
    if raw.moe_layer_freq != 1:
        raise InputError(f"{path}: moe_layer_freq {raw.moe_layer_freq} is not supported; supported is 1")
    return Experts(
        first_layer=raw.first_k_dense_replace,
        count=count,
        per_token=given["num_experts_per_tok"],
        shared=given["n_shared_experts"],
        inner=given["moe_intermediate_size"],
        scale=raw.routed_scaling_factor,
        groups=groups,
        groups_per_token=given.get("topk_group", 1),
    )


def attention_tensors(config: ModelConfig, layer: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of one layer's attention."""
    mla, hidden, heads = _latent(config), config.hidden_size, config.num_heads
    query = heads * (mla.nope_dim + mla.rope_dim)
    at = layer + "self_attn."
    shapes: dict[str, tuple[int, ...]] = {
        at + "kv_a_proj_with_mqa.weight": (mla.rank + mla.rope_dim, hidden),
        at + "kv_a_layernorm.weight": (mla.rank,),
        at + "kv_b_proj.weight": (heads * (mla.nope_dim + mla.value_dim), mla.rank),
        at + "o_proj.weight": (hidden, heads * mla.value_dim),
    }
    if mla.query_rank is None:
        shapes[at + "q_proj.weight"] = (query, hidden)
    else:
        shapes[at + "q_a_proj.weight"] = (mla.query_rank, hidden)
        shapes[at + "q_a_layernorm.weight"] = (mla.query_rank,)
        shapes[at + "q_b_proj.weight"] = (query, mla.query_rank)
    if config.qkv_bias:
        for name in ("kv_a_proj_with_mqa", "o_proj", "q_a_proj"):
            if f"{at}{name}.weight" in shapes:
                shapes[f"{at}{name}.bias"] = shapes[f"{at}{name}.weight"][:1]
    return shapes


def mlp_tensors(config: ModelConfig, index: int, layer: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of one layer's MLP or experts."""
    experts, hidden = config.experts, config.hidden_size
    if experts is None or index < experts.first_layer:
        return _mlp(layer + "mlp.", hidden, config.intermediate_size)
    shapes: dict[str, tuple[int, ...]] = {layer + "mlp.gate.weight": (experts.count, hidden)}
    shapes.update(_mlp(layer + "mlp.shared_experts.", hidden, experts.shared * experts.inner))
    for number in range(experts.count):
        shapes.update(_mlp(f"{layer}mlp.experts.{number}.", hidden, experts.inner))
    return shapes


def _mlp(at: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        at + "gate_proj.weight": (inner, hidden),
        at + "up_proj.weight": (inner, hidden),
        at + "down_proj.weight": (hidden, inner),
    }


def tensor_cut(config: ModelConfig, name: str, shape: tuple[int, ...], tp: int, rank: int) -> tuple[int, Interval]:
    """Axis and interval of a layer's tensor that tensor-parallel rank `rank` of `tp` computes with.

    Query heads are split, and with them the rows that make keys and values of the latent; the latent itself, the norms
    and the gate are whole on every rank. MLPs are split by inner channel, each expert too. The outputs of `o_proj` and
    of the MLP are then partial sums; a bias of `o_proj` belongs to rank 0 alone, which is the caller's to see to.
    """
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    units = {"q_proj": config.num_heads, "q_b_proj": config.num_heads, "kv_b_proj": config.num_heads}
    if name.endswith("o_proj.weight") or kind == "down_proj":
        axis, count = 1, config.num_heads if kind == "o_proj" else shape[1]
    elif kind in units or kind in ("gate_proj", "up_proj"):
        axis, count = 0, units.get(kind, shape[0])
    else:
        return 0, Interval(0, shape[0])
    unit = shape[axis] // count
    return axis, Interval(rank * count // tp * unit, (rank + 1) * count // tp * unit)


def _latent(config: ModelConfig) -> Latent:
    assert config.latent is not None
    return config.latent
