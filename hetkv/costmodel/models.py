"""Models as the cost model sees them: parameter and KV element counts from the fields of a `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from hetkv.errors import InputError

ALIASES = {
    "llama2-70b": "Llama-2-70B",
    "meta-llama-3-8b": "Llama-3-8B",
    "llama-3.1-8b-instruct": "Llama-3.1-8B",
    "llama-3.1-8b-instruct-fp8": "Llama-3.1-8B",
    "meta-llama-3.1-8b": "Llama-3.1-8B",
    "meta-llama-3.1-70b": "Llama-3.1-70B",
    "qwen3-235b-a22b-fp8": "Qwen3-235B-A22B",
    "mistral-7b-v0.3": "Mistral-7B",
}


@dataclass(frozen=True)
class ModelShape:
    """Counts that set a model's operations and bytes. Parameters are numbers of weights, not bytes.

    `full_layers` attend to every token, `window_layers` to the last `window` ones, `state_layers` keep a state of fixed
    size. `latent` is MLA: one KV head of `kv_elements` shared by all query heads, held whole by every TP rank.
    """

    name: str
    hidden: int
    vocab: int
    full_layers: int
    window_layers: int
    state_layers: int
    window: int
    latent: bool
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    kv_elements: int
    attention_params: int
    state_params: int
    state_elements: int
    dense_mlp_layers: int
    dense_mlp_params: int
    moe_layers: int
    experts: int
    experts_per_token: int
    expert_params: int
    shared_params: int
    tied: bool
    experts_only_quantised: bool
    index_topk: int
    max_positions: int

    @property
    def layers(self) -> int:
        return self.full_layers + self.window_layers + self.state_layers

    @property
    def attention_layers(self) -> int:
        """Layers with a KV cache."""
        return self.full_layers + self.window_layers

    @property
    def dense_params(self) -> int:
        """Weights of every layer that each token uses: attention, dense MLP, shared experts, router."""
        router = self.hidden * self.experts
        return (
            self.attention_layers * self.attention_params
            + self.state_layers * self.state_params
            + self.dense_mlp_layers * self.dense_mlp_params
            + self.moe_layers * (self.shared_params + router)
        )

    @property
    def routed_params(self) -> int:
        """Weights of all routed experts of all layers."""
        return self.moe_layers * self.experts * self.expert_params

    @property
    def head_params(self) -> int:
        """Weights of the output projection."""
        return self.hidden * self.vocab

    @property
    def total_params(self) -> int:
        embeddings = self.head_params * (1 if self.tied else 2)
        return self.dense_params + self.routed_params + embeddings

    @property
    def active_params(self) -> int:
        """Weights one token multiplies, embeddings left out."""
        return self.dense_params + self.head_params + self.moe_layers * self.experts_per_token * self.expert_params

    def kv_elements_per_token(self, tp: int = 1) -> int:
        """KV cache elements per token on one of `tp` ranks, all full and window layers (a window bounds the tokens)."""
        if self.latent:
            return self.attention_layers * self.kv_elements
        return self.attention_layers * -(-self.kv_heads // tp) * (self.qk_dim + self.v_dim)


class _Fields:
    """A `config.json` that answers with an `InputError` naming the field when it is missing or not a number."""

    def __init__(self, fields: Mapping[str, Any], origin: str) -> None:
        self.fields, self.origin = fields, origin

    def number(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value != int(value):
                raise InputError(f"{self.origin}: `{name}` must be a whole number of zero or more, got {value!r}")
            return int(value)
        if default is None:
            raise InputError(f"{self.origin}: missing field `{names[0]}`")
        return default

    def positive(self, *names: str) -> int:
        value = self.number(*names)
        if value == 0:
            raise InputError(f"{self.origin}: `{names[0]}` must not be zero")
        return value


def shape_from_config(config: Mapping[str, Any], name: str, origin: str) -> ModelShape:
    """Read a `config.json` dictionary. `origin` names the file in errors. A `text_config` inside is used."""
    nested = config.get("text_config")
    if isinstance(nested, Mapping):
        config = {**nested, "quantization_config": config.get("quantization_config", nested.get("quantization_config"))}
    get = _Fields(config, origin)
    hidden, layers, heads = (
        get.positive("hidden_size"),
        get.positive("num_hidden_layers"),
        get.positive("num_attention_heads"),
    )
    experts = get.number("n_routed_experts", "num_local_experts", "num_experts", default=0)
    top_k = get.positive("num_experts_per_tok", "experts_per_token") if experts else 0
    if top_k > experts:
        raise InputError(f"{origin}: `num_experts_per_tok` {top_k} exceeds the {experts} experts")
    attention = _attention(get, hidden, heads)
    full, window_layers, state = _layer_kinds(config, layers, origin)
    dense_layers = _dense_layers(config, get, layers, experts)
    expert_width = get.number("moe_intermediate_size", "intermediate_size") if experts else 0
    shared_width = get.number("n_shared_experts", default=0) * expert_width
    shared_width += get.number("shared_expert_intermediate_size", default=0) if experts else 0
    return ModelShape(
        name=name,
        hidden=hidden,
        vocab=get.positive("vocab_size"),
        full_layers=full,
        window_layers=window_layers,
        state_layers=state,
        window=get.positive("sliding_window") if window_layers else 0,
        heads=heads,
        **attention,
        **_state(get, hidden, state),
        dense_mlp_layers=dense_layers,
        dense_mlp_params=3 * hidden * get.positive("intermediate_size") if dense_layers else 0,
        moe_layers=layers - dense_layers,
        experts=experts,
        experts_per_token=top_k,
        expert_params=3 * hidden * expert_width,
        shared_params=3 * hidden * shared_width,
        tied=bool(config.get("tie_word_embeddings", False)),
        experts_only_quantised=_experts_only(config),
        index_topk=get.number("index_topk", default=0),
        max_positions=get.number("max_position_embeddings", default=0),
    )


def _attention(get: _Fields, hidden: int, heads: int) -> dict[str, Any]:
    rank = get.number("kv_lora_rank", default=0)
    if rank:
        nope, rope, v_dim = (
            get.positive("qk_nope_head_dim"),
            get.positive("qk_rope_head_dim"),
            get.positive("v_head_dim"),
        )
        q_rank = get.number("q_lora_rank", default=0)
        query = hidden * q_rank + q_rank * heads * (nope + rope) if q_rank else hidden * heads * (nope + rope)
        params = query + hidden * (rank + rope) + rank * heads * (nope + v_dim) + heads * v_dim * hidden
        index_heads = get.number("index_n_heads", default=0)
        if index_heads:
            index_dim = get.positive("index_head_dim")
            params += q_rank * index_heads * index_dim + hidden * (index_dim + index_heads)
        return {
            "latent": True,
            "kv_heads": 1,
            "qk_dim": nope + rope,
            "v_dim": v_dim,
            "kv_elements": rank + rope,
            "attention_params": params,
        }
    kv_heads = get.number("num_key_value_heads", default=heads)
    head_dim = get.number("head_dim", default=0)
    if not head_dim:
        if hidden % heads:
            raise InputError(f"{get.origin}: `hidden_size` {hidden} is no multiple of {heads} heads; give `head_dim`")
        head_dim = hidden // heads
    gate = 2 if get.fields.get("attn_output_gate") else 1
    return {
        "latent": False,
        "kv_heads": kv_heads,
        "qk_dim": head_dim,
        "v_dim": head_dim,
        "kv_elements": 2 * kv_heads * head_dim,
        "attention_params": hidden * head_dim * ((1 + gate) * heads + 2 * kv_heads),
    }


def _state(get: _Fields, hidden: int, layers: int) -> dict[str, Any]:
    """Gated delta-net layers: q, k, v, gate and output projections, and a state of one matrix per value head."""
    if not layers:
        return {"state_params": 0, "state_elements": 0}
    k_heads, v_heads = get.positive("linear_num_key_heads"), get.positive("linear_num_value_heads")
    k_dim, v_dim = get.positive("linear_key_head_dim"), get.positive("linear_value_head_dim")
    params = hidden * (2 * k_heads * k_dim + 3 * v_heads * v_dim + 2 * v_heads)
    return {"state_params": params, "state_elements": v_heads * k_dim * v_dim}


def _layer_kinds(config: Mapping[str, Any], layers: int, origin: str) -> tuple[int, int, int]:
    kinds = config.get("layer_types")
    if kinds is None:
        windowed = config.get("sliding_window") and config.get(
            "use_sliding_window", config.get("model_type") == "mistral"
        )
        return (0, layers, 0) if windowed else (layers, 0, 0)
    if len(kinds) != layers:
        raise InputError(f"{origin}: `layer_types` names {len(kinds)} layers, `num_hidden_layers` says {layers}")
    known = {"full_attention", "sliding_attention", "linear_attention"}
    for kind in kinds:
        if kind not in known:
            raise InputError(f"{origin}: `layer_types` holds {kind!r}; known are {', '.join(sorted(known))}")
    return (
        kinds.count("full_attention"),
        kinds.count("sliding_attention"),
        kinds.count("linear_attention"),
    )


def _dense_layers(config: Mapping[str, Any], get: _Fields, layers: int, experts: int) -> int:
    if not experts:
        return layers
    if config.get("mlp_only_layers"):
        return len(config["mlp_only_layers"])
    step = get.number("decoder_sparse_step", default=1)
    if step > 1:
        return layers - layers // step
    return min(layers, get.number("first_k_dense_replace", default=0))


def _experts_only(config: Mapping[str, Any]) -> bool:
    quantisation = config.get("quantization_config") or {}
    kept = [*quantisation.get("modules_to_not_convert", []), *quantisation.get("ignore", [])]
    return any("self_attn" in pattern for pattern in kept)


def known_models() -> list[str]:
    """Names of the models that ship with hetkv."""
    folder = resources.files("hetkv.costmodel") / "data" / "models"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".json"))


@lru_cache(maxsize=256)
def model_shape(name: str) -> ModelShape:
    """A model by shipped name, Hugging Face id (`org/name`), or path of a `config.json` or of its directory."""
    config, found, origin = model_config(name)
    return shape_from_config(config, found, origin)


def model_config(name: str) -> tuple[dict[str, Any], str, str]:
    """The `config.json` of a model as `model_shape` finds it, the model's name, and where it is from, for errors."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _load(path.read_text(encoding="utf-8"), str(path)), name, str(path)
    if path.suffix == ".json":
        raise InputError(f"model file {name}: no such file")
    last = name.rsplit("/", 1)[-1].lower()
    last = ALIASES.get(last, last).lower()
    by_lower = {known.lower(): known for known in known_models()}
    found = by_lower.get(last) or by_lower.get(last.removesuffix("-hf").removesuffix("-instruct"))
    if found is None:
        raise InputError(f"unknown model {name!r}: give a config.json or one of {', '.join(known_models())}")
    entry = resources.files("hetkv.costmodel") / "data" / "models" / f"{found}.json"
    return _load(entry.read_text(encoding="utf-8"), found), found, f"model {found}"


def _load(text: str, origin: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{origin}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{origin}: expected a JSON object, got {type(config).__name__}")
    return config
