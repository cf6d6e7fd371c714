"""What differs from layer to layer: sliding windows, states, experts."""

from __future__ import annotations

from hetkv.models.config import Experts, State
from hetkv.models.families import EXPERT_COUNTS, Family
from hetkv.models.fields import Fields

_OLD_KINDS = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "deepseek_sparse_attention": "indexed_attention",
}


def read_sliding_windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    """Per layer: the sliding window in tokens, or None for full attention."""
    if family.sliding_windows == "none":
        return (None,) * layers
    window = fields.whole_or_none("sliding_window", 2)
    if family.sliding_windows == "all":
        return (window,) * layers
    kinds = layer_types(fields, layers, ("full_attention", "sliding_attention"))
    if family.sliding_windows == "alternating":
        period = family.period
        if "sliding_window_pattern" in fields.defaults:
            period = fields.whole("sliding_window_pattern")
        kinds = kinds or ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    else:
        used = fields.flag("use_sliding_window") and window is not None
        if family.sliding_windows == "switched_all":
            if used:
                fields.only("max_window_layers", None)
            return (window if used else None,) * layers
        if not used:
            if kinds and "sliding_attention" in kinds:
                raise fields.error("`layer_types` names layers with a sliding window, `use_sliding_window` is not set")
            return (None,) * layers
        first = fields.whole("max_window_layers", 0)
        kinds = kinds or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if "sliding_attention" in kinds and window is None:
        raise fields.error("`layer_types` names layers with a sliding window, `sliding_window` is null")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def layer_types(fields: Fields, layers: int, known: tuple[str, ...], name: str = "layer_types") -> list[str] | None:
    """Kind of each layer, where the file says it. `InputError` for another number of them or an unknown kind."""
    given = fields.items(name) if name in fields.defaults else None
    if given is None:
        return None
    if len(given) != layers:
        raise fields.error(f"`{name}` names {len(given)} layers, `num_hidden_layers` says {layers}")
    kinds = [_OLD_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in given]
    for kind in kinds:
        if kind not in known:
            raise fields.error(f"`{name}` has {kind!r}; family {fields.get('model_type')} has {', '.join(known)}")
    return kinds


def read_state(fields: Fields, layers: int) -> tuple[State | None, tuple[bool, ...]]:
    """Layers that keep a state, and its sizes."""
    if "linear_conv_kernel_dim" not in fields.defaults:
        return None, ()
    kinds = layer_types(fields, layers, ("full_attention", "linear_attention"))
    period = fields.whole("full_attention_interval")
    kept = [kind == "linear_attention" for kind in kinds] if kinds else [(i + 1) % period != 0 for i in range(layers)]
    state = State(
        key_heads=fields.whole("linear_num_key_heads"),
        value_heads=fields.whole("linear_num_value_heads"),
        key_dim=fields.whole("linear_key_head_dim"),
        value_dim=fields.whole("linear_value_head_dim"),
        kernel=fields.whole("linear_conv_kernel_dim"),
    )
    return (state, tuple(kept)) if any(kept) else (None, ())


def read_experts(fields: Fields, family: Family, layers: int) -> Experts | None:
    """The mixture of experts, None where no layer has one."""
    if family.experts == "none":
        return None
    found = {name: fields.whole(name, 0) for name in EXPERT_COUNTS if fields.values.get(name) is not None}
    if len(set(found.values())) > 1:
        raise fields.error(f"{', '.join(f'`{name}` is {count}' for name, count in found.items())}: which is right?")
    name = next(iter(found), next(name for name in EXPERT_COUNTS if name in family.defaults))
    if fields.get(name) is None or fields.whole(name, 0) == 0:
        return None
    count, per_token = fields.whole(name), _per_token(fields)
    if per_token > count:
        raise fields.error(f"`num_experts_per_tok` {per_token} exceeds the {count} experts of `{name}`")
    if family.experts == "flat":
        packed = family.model_type == "gpt_oss"
        return Experts(
            layers=(True,) * layers,
            count=count,
            per_token=per_token,
            inner=fields.whole("intermediate_size"),
            scoring="softmax_of_chosen" if packed else "sigmoid" if family.model_type == "minimax_m2" else "softmax",
            normalised=True,
            names="packed" if packed else "mixtral",
            clamp=(fields.number("swiglu_limit"), fields.number("swiglu_alpha")) if packed else None,
        )
    inner = fields.whole("moe_intermediate_size")
    if family.experts == "sparse_step":
        dense = fields.items("mlp_only_layers") or []
        if any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
            raise fields.error(f"`mlp_only_layers` must be layer numbers, got {dense}")
        if any(not 0 <= i < layers for i in dense):
            raise fields.error(f"`mlp_only_layers` is {dense}, layers are 0 to {layers - 1}")
        step, shared = fields.whole("decoder_sparse_step"), "shared_expert_intermediate_size"
        sparse = tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))
        if not any(sparse):
            return None
        return Experts(
            layers=sparse,
            count=count,
            per_token=per_token,
            inner=inner,
            shared_inner=fields.whole(shared) if shared in fields.defaults else 0,
            shared_gate=shared in fields.defaults,
            normalised=fields.flag("norm_topk_prob"),
        )
    return _latent_experts(fields, family, layers, count, per_token, inner)


def _per_token(fields: Fields) -> int:
    """`num_experts_per_tok`, which GPT-OSS's own files also call `experts_per_token`."""
    other = fields.whole_or_none("experts_per_token")
    found = other if other and "num_experts_per_tok" not in fields.values else fields.whole("num_experts_per_tok")
    if other not in (None, found):
        raise fields.error(f"`num_experts_per_tok` is {found}, `experts_per_token` is {other}")
    return found


def _latent_experts(
    fields: Fields, family: Family, layers: int, count: int, per_token: int, inner: int
) -> Experts | None:
    """DeepSeek's: some shared, the first layers dense, chosen in groups."""
    dense = min(fields.whole_or_none("first_k_dense_replace", 0) or 0, layers)
    sparse = tuple(i >= dense for i in range(layers))
    if "mlp_layer_types" in fields.defaults:
        kinds = layer_types(fields, layers, ("dense", "sparse"), "mlp_layer_types")
        sparse = tuple(kind == "sparse" for kind in kinds) if kinds else sparse
    if not any(sparse):
        return None
    second = family.model_type == "deepseek_v2"
    grouped = not second or fields.get("topk_method") == "group_limited_greedy"
    groups = (fields.whole_or_none("n_group") or 1) if grouped else 1
    chosen = (fields.whole_or_none("topk_group") or 1) if grouped else 1
    if count % groups or not 1 <= chosen <= groups or chosen * (count // groups) < per_token:
        raise fields.error(
            f"{per_token} of {count} experts out of {chosen} of {groups} groups (`num_experts_per_tok`, "
            "`n_routed_experts`, `topk_group`, `n_group`) is not possible"
        )
    return Experts(
        layers=sparse,
        count=count,
        per_token=per_token,
        inner=inner,
        shared_inner=(fields.whole_or_none("n_shared_experts", 0) or 0) * inner,
        scoring="softmax" if second else "sigmoid",
        normalised=bool(fields.get("norm_topk_prob")),
        scale=fields.number("routed_scaling_factor"),
        groups=groups,
        groups_per_token=chosen,
    )
