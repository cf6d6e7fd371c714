"""`config.json` to `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from hetkv.errors import InputError
from hetkv.models.config import IndexedAttention, Latent, ModelConfig
from hetkv.models.families import COMMON, EXPERT_COUNTS, FAMILIES, FIXED, HARMLESS, WRAPPERS, Family, Wrapper
from hetkv.models.fields import Fields, load_object
from hetkv.models.layers import layer_types, read_experts, read_sliding_windows, read_state
from hetkv.models.rope import read_rope

_OUTER = ("model_type", "architectures", "text_config", "quantization_config", "tie_word_embeddings", "eos_token_id")
"""Keys of a model that reads more than text, of which the last ones are said of its text part."""
_KV_DTYPES = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_dtype")


def read_config(directory: Path) -> ModelConfig:
    """`ModelConfig` of a checkpoint directory. `InputError` names the file, the field and what is supported."""
    path = directory / "config.json"
    return parse_config(load_object(path), str(path))


def parse_config(values: Mapping[str, Any], origin: str) -> ModelConfig:
    """`ModelConfig` of a `config.json` that is loaded already. `origin` names it in errors."""
    name = values.get("model_type")
    if name is None:
        raise InputError(f"{origin}: missing field `model_type`: it says which family the model is of")
    if isinstance(name, str) and name in WRAPPERS:
        return _wrapped(values, name, WRAPPERS[name], origin)
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise InputError(f"{origin}: family {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    counts = dict.fromkeys(EXPERT_COUNTS) if family.experts != "none" else {}
    fields = Fields(values, {**COMMON, **counts, **family.defaults}, origin)
    _check(fields, family)
    return _read(fields, family)


def _wrapped(values: Mapping[str, Any], name: str, wrapper: Wrapper, origin: str) -> ModelConfig:
    """The text part of a model that reads more than text. What the outer file says of it wins."""
    outer = Fields(values, {**dict.fromkeys(_OUTER), "is_encoder_decoder": False, "chunk_size_feed_forward": 0}, origin)
    outer.reject_unknown(HARMLESS | wrapper.other_parts, f"family {name} outside its `text_config`")
    _check_architecture(outer, wrapper.architecture, name)
    for key in ("is_encoder_decoder", "chunk_size_feed_forward"):
        outer.only(key, outer.defaults[key], None)
    if "text_config" not in values:
        raise outer.error(f"missing field `text_config`: family {name} has its text part in it")
    inner = {**outer.table("text_config")}
    inner.setdefault("model_type", wrapper.family)
    for key in ("quantization_config", "tie_word_embeddings", "eos_token_id"):
        if values.get(key) is not None:
            inner[key] = values[key]
    if inner["model_type"] != wrapper.family:
        raise outer.error(
            f"the `text_config` of family {name} is a {wrapper.family}, here it says {inner['model_type']!r}"
        )
    found = parse_config(inner, f"{origin}: `text_config`")
    return msgspec.structs.replace(found, multimodal=True)


def _check_architecture(fields: Fields, architecture: str, family: str) -> None:
    named = fields.items("architectures")
    if named and architecture not in named:
        raise fields.error(f"`architectures` {named} is not that of `model_type` {family!r}, {architecture}")


def _check(fields: Fields, family: Family) -> None:
    """No key is ignored unless it changes nothing, and the file does not contradict itself."""
    fields.reject_unknown(HARMLESS, f"family {family.model_type}")
    _check_architecture(fields, family.architecture, family.model_type)
    for name in FIXED:
        if fields.get(name) is not None:
            fields.only(name, COMMON[name])
    for name, allowed in family.fixed.items():
        if name in fields.values:
            fields.only(name, *allowed)


def _read(fields: Fields, family: Family) -> ModelConfig:
    sizes = {name: fields.whole(name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    layers, heads = sizes["num_hidden_layers"], fields.whole("num_attention_heads")
    latent = _latent(fields, family)
    head_dim = latent.rope_dim if latent is not None else _head_dim(fields, sizes["hidden_size"], heads)
    kv_heads = fields.whole_or_none("num_key_value_heads") or heads
    if latent is not None and kv_heads != heads:
        raise fields.error(
            f"`num_key_value_heads` {kv_heads} is not `num_attention_heads` {heads}, as in latent attention"
        )
    if heads % kv_heads:
        raise fields.error(f"`num_attention_heads` {heads} is no multiple of `num_key_value_heads` {kv_heads}")
    rope, sliding_rope = read_rope(fields, family)
    rotated = int(head_dim * rope.fraction)
    if rotated % 2 or rotated == 0:
        raise fields.error(f"{rotated} of {head_dim} channels of a head are rotated (`head_dim`): pairs are needed")
    experts = read_experts(fields, family, layers)
    state, state_layers = read_state(fields, layers)
    method, kept = _quantisation(fields)
    dense = experts is None or not all(experts.layers)
    return ModelConfig(
        family=family.model_type,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=fields.whole("intermediate_size") if dense else 0,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=fields.whole("max_position_embeddings"),
        norm_eps=_eps(fields),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        rope=rope,
        sliding_rope=sliding_rope,
        sliding_windows=read_sliding_windows(fields, family, layers),
        eos_ids=token_ids(fields, "eos_token_id"),
        latent=latent,
        indexed=_indexed(fields, layers),
        experts=experts,
        state=state,
        state_layers=state_layers,
        output_gate=fields.flag("attn_output_gate"),
        quantisation=method,
        kept_modules=kept,
        **{**_options(fields, family), **family.options},
    )


def _options(fields: Fields, family: Family) -> dict[str, Any]:
    """What a family says by fields of its own."""
    defaults = fields.defaults
    act = fields.text("hidden_activation" if fields.get("hidden_activation") is not None else "hidden_act")
    found: dict[str, Any] = {"activation": act}
    if "attention_bias" in defaults:
        bias = fields.flag("attention_bias")
        found |= {"qkv_bias": bias, "output_bias": bias and family.model_type not in ("glm", "glm4")}
    if "mlp_bias" in defaults:
        found["mlp_bias"] = fields.flag("mlp_bias")
    if "query_pre_attn_scalar" in defaults:
        found["attention_scale"] = fields.whole("query_pre_attn_scalar") ** -0.5
    if family.options.get("unit_offset") and family.model_type.startswith("gemma"):
        found["embedding_scale"] = fields.whole("hidden_size") ** 0.5
        # An old name of the tanh approximation, and the only one that the first Gemma has.
        found["activation"] = "gelu_pytorch_tanh" if act == "gelu" and family.model_type == "gemma" else act
    if "attn_logit_softcapping" in defaults:
        found["attention_softcap"] = _positive_or_none(fields, "attn_logit_softcapping")
    if "final_logit_softcapping" in defaults:
        found["logits_softcap"] = _positive_or_none(fields, "final_logit_softcapping")
    if "attention_multiplier" in defaults:
        found |= {
            "attention_scale": fields.number("attention_multiplier"),
            "embedding_scale": fields.number("embedding_multiplier"),
            "residual_scale": fields.number("residual_multiplier"),
            "logits_divisor": fields.number("logits_scaling"),
        }
        if found["logits_divisor"] == 0:
            raise fields.error("`logits_scaling` is 0")
    return found


def _eps(fields: Fields) -> float:
    value = fields.number("rms_norm_eps")
    if value < 0:
        raise fields.error(f"`rms_norm_eps` is {value}, it must be at least 0")
    return value


def _positive_or_none(fields: Fields, name: str) -> float | None:
    value = fields.number_or_none(name)
    if value is not None and value <= 0:
        raise fields.error(f"`{name}` is {value}, it must be above 0")
    return value


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is not None or fields.defaults["head_dim"] is not None:
        return fields.whole("head_dim")
    if hidden % heads:
        raise fields.error(f"`hidden_size` {hidden} is no multiple of `num_attention_heads` {heads}; give `head_dim`")
    return hidden // heads


def _latent(fields: Fields, family: Family) -> Latent | None:
    if "kv_lora_rank" not in family.defaults:
        return None
    latent = Latent(
        rank=fields.whole("kv_lora_rank"),
        query_rank=fields.whole_or_none("q_lora_rank"),
        nope_dim=fields.whole("qk_nope_head_dim"),
        rope_dim=fields.whole("qk_rope_head_dim"),
        value_dim=fields.whole("v_head_dim"),
    )
    if fields.whole_or_none("qk_head_dim") not in (None, latent.nope_dim + latent.rope_dim):
        raise fields.error(f"`qk_head_dim` {fields.get('qk_head_dim')} is not `qk_nope_head_dim` + `qk_rope_head_dim`")
    dims = (latent.rope_dim, latent.nope_dim, latent.nope_dim + latent.rope_dim, latent.value_dim)
    if fields.get("head_dim") is not None and fields.whole("head_dim") not in dims:
        raise fields.error(f"`head_dim` {fields.get('head_dim')} is none of the dims of its latent attention's heads")
    return latent


def _indexed(fields: Fields, layers: int) -> IndexedAttention | None:
    if "index_topk" not in fields.defaults:
        return None
    layer_types(fields, layers, ("indexed_attention",))
    layer_types(fields, layers, ("full",), "indexer_types")
    return IndexedAttention(fields.whole("index_topk"), fields.whole("index_n_heads"), fields.whole("index_head_dim"))


def _quantisation(fields: Fields) -> tuple[str | None, tuple[str, ...]]:
    """Method, and patterns of the modules that keep their dtype. An empty object is none."""
    values = fields.table("quantization_config")
    if not values:
        return None, ()
    for name in _KV_DTYPES:
        if values.get(name) is not None:
            raise fields.error(
                f"`quantization_config`: `{name}` sets a KV dtype of the checkpoint's own, which is not supported: "
                "leave it out, and say `kv_dtype` where a plan is made"
            )
    kept: list[str] = []
    for name in ("modules_to_not_convert", "ignore"):
        if not isinstance(values.get(name) or [], list):
            raise fields.error(f"`quantization_config`: `{name}` must be a list")
        kept += map(str, values.get(name) or [])
    return str(values.get("quant_method") or "unnamed"), tuple(kept)


def token_ids(fields: Fields, name: str) -> tuple[int, ...]:
    """One token id or several; null is none."""
    value = fields.get(name)
    values = value if isinstance(value, list) else [value]
    for one in values:
        if one is not None and (isinstance(one, bool) or not isinstance(one, int) or one < 0):
            raise fields.error(f"`{name}` must be token ids, got {value!r}")
    return tuple(one for one in values if one is not None)
