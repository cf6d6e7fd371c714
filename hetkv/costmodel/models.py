"""Models as the cost model sees them: parameter and KV element counts from the fields of a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from hetkv.costmodel.names import resolve
from hetkv.errors import InputError
from hetkv.models import ModelConfig, State, parse_config
from hetkv.models.fields import load_object


@dataclass(frozen=True)
class ModelShape:
    """Counts that set a model's operations and bytes. Parameters are numbers of weights, not bytes.

    `full_layers` attend to every token, `sliding_layers` to the last `sliding_window` ones, `state_layers` keep a state
    of fixed size. `latent` is MLA: one KV head of `kv_elements` shared by all query heads, held whole by every TP rank.
    """

    name: str
    hidden: int
    vocab: int
    full_layers: int
    sliding_layers: int
    state_layers: int
    sliding_window: int
    latent: bool
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    kv_elements: int
    attention_params: int
    state_params: int
    state_elements: int
    """Of a state layer, in fp32."""
    state_inputs: int
    """Of a state layer's convolution, in the model's dtype."""
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
        return self.full_layers + self.sliding_layers + self.state_layers

    @property
    def attention_layers(self) -> int:
        """Layers with a KV cache."""
        return self.full_layers + self.sliding_layers

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
        """KV cache elements per token on one of `tp` ranks, of all full and sliding layers."""
        if self.latent:
            return self.attention_layers * self.kv_elements
        return self.attention_layers * -(-self.kv_heads // tp) * (self.qk_dim + self.v_dim)

    def kv_bytes_of_request(self, tokens: int, element_bytes: float) -> float:
        """Bytes that a request of `tokens` tokens must keep to go on, held once: KV, in sliding layers for
        the tokens that the next one can see, and states."""
        seen = min(tokens, self.sliding_window - 1) if self.sliding_layers else 0
        kv = (self.full_layers * tokens + self.sliding_layers * seen) * self.kv_elements * element_bytes
        return kv + self.state_bytes(element_bytes)

    def state_bytes(self, element_bytes: float) -> float:
        """Bytes of a request's states: recurrent ones in fp32, inputs of convolutions in 16 bits or the KV's dtype
        where that has more."""
        inputs = self.state_inputs * max(2.0, element_bytes)
        return self.state_layers * (self.state_elements * 4 + inputs)


def shape_from_config(config: Mapping[str, Any], name: str, origin: str) -> ModelShape:
    """The shape of a `config.json` that is loaded already. `origin` names the file in errors."""
    return shape_of(parse_config(config, origin), name)


def shape_of(model: ModelConfig, name: str) -> ModelShape:
    """A model's counts. Norms and biases are left out: they are less than a thousandth of the weights."""
    given = enumerate(model.sliding_windows)
    windows = [window for i, window in given if window is not None and not model.keeps_state(i)]
    states = sum(model.state_layers)
    experts, gated = model.experts, 3 * model.hidden_size
    sparse = 0 if experts is None else sum(experts.layers)
    return ModelShape(
        name=name,
        hidden=model.hidden_size,
        vocab=model.vocab_size,
        full_layers=model.num_layers - len(windows) - states,
        sliding_layers=len(windows),
        state_layers=states,
        sliding_window=windows[0] if windows else 0,
        heads=model.num_heads,
        **_attention(model),
        **_state(model.state, model.hidden_size),
        dense_mlp_layers=model.num_layers - sparse,
        dense_mlp_params=gated * model.intermediate_size,
        moe_layers=sparse,
        experts=0 if experts is None else experts.count,
        experts_per_token=0 if experts is None else experts.per_token,
        expert_params=0 if experts is None else gated * experts.inner,
        shared_params=0 if experts is None else gated * experts.shared_inner,
        tied=model.tied_embeddings,
        experts_only_quantised=any("self_attn" in pattern for pattern in model.kept_modules),
        index_topk=0 if model.indexed is None else model.indexed.topk,
        max_positions=model.max_context,
    )


def _attention(model: ModelConfig) -> dict[str, Any]:
    """Heads, and the weights and cached elements of one layer with attention."""
    hidden, heads, mla = model.hidden_size, model.num_heads, model.latent
    if mla is None:
        gate = 2 if model.output_gate else 1
        return {
            "latent": False,
            "kv_heads": model.num_kv_heads,
            "qk_dim": model.head_dim,
            "v_dim": model.head_dim,
            "kv_elements": 2 * model.num_kv_heads * model.head_dim,
            "attention_params": hidden * model.head_dim * ((1 + gate) * heads + 2 * model.num_kv_heads),
        }
    width = heads * (mla.nope_dim + mla.rope_dim)
    query = hidden * width if mla.query_rank is None else (hidden + width) * mla.query_rank
    params = query + hidden * (mla.rank + mla.rope_dim) + mla.rank * heads * (mla.nope_dim + mla.value_dim)
    params += heads * mla.value_dim * hidden
    cached = mla.rank + mla.rope_dim
    if model.indexed is not None:
        index = model.indexed
        params += (mla.query_rank or hidden) * index.heads * index.dim + hidden * (index.dim + index.heads)
        cached += index.dim
    return {
        "latent": True,
        "kv_heads": 1,
        "qk_dim": mla.nope_dim + mla.rope_dim,
        "v_dim": mla.value_dim,
        "kv_elements": cached,
        "attention_params": params,
    }


def _state(state: State | None, hidden: int) -> dict[str, Any]:
    """Gated delta-net layers: q, k, v, gate and output projections, and what a request keeps."""
    if state is None:
        return {"state_params": 0, "state_elements": 0, "state_inputs": 0}
    key, value = state.key_heads * state.key_dim, state.value_heads * state.value_dim
    return {
        "state_params": hidden * (2 * key + 3 * value + 2 * state.value_heads),
        "state_elements": state.recurrent_elements,
        "state_inputs": state.convolution_elements,
    }


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
        return load_object(path), name, str(path)
    if path.suffix == ".json":
        raise InputError(f"model file {name}: no such file")
    found = resolve(name, known_models())
    entry = resources.files("hetkv.costmodel") / "data" / "models" / f"{found}.json"
    with resources.as_file(entry) as shipped:
        return load_object(shipped), found, f"model {found}"
