"""`ModelConfig`: the typed description of a decoder. Options are orthogonal; a family is a choice of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from hetkv.kv.spec import KVSpec, LayerSpec


class Rope(msgspec.Struct, frozen=True):
    """Rotary embedding. `llama3` and `yarn` stretch low frequencies by `factor`, `linear` all of them."""

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """YaRN: turns over the original context above which a frequency is kept, and below which it is stretched."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    """YaRN: its temperature on rotated and on all channels; 0: not given."""
    attention_factor: float | None = None
    truncate: bool = True
    fraction: float = 1.0
    """Share of a head's channels that are rotated: the first ones."""
    interleaved: bool = False
    """Channel `2i` pairs with `2i + 1`, instead of `i` with `i + dim / 2`."""


class Norms(NamedTuple):
    """Names of a layer's norms where they stand; None: there is no norm."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    """Of attention's output, before it is added to the residual stream."""
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


class Latent(msgspec.Struct, frozen=True):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): channels of its parts."""

    rank: int
    """Compressed keys and values of a token (`kv_lora_rank`): what the cache keeps, for all heads at once."""
    query_rank: int | None
    """Compressed queries (`q_lora_rank`); None: queries are projected directly (V2-Lite)."""
    nope_dim: int
    """Channels of a query or key head without position."""
    rope_dim: int
    """Rotary channels of a query head, and of the one key that all heads share: cached with the latent."""
    value_dim: int
    """Channels of a value head."""


class IndexedAttention(msgspec.Struct, frozen=True):
    """Sparse attention (DeepSeek-V3.2): an indexer of its own chooses the `topk` tokens that a query attends to."""

    topk: int
    heads: int
    dim: int
    """Also the channels that it caches of each token."""


class State(msgspec.Struct, frozen=True):
    """Gated delta-net layers, which keep a state of fixed size in place of keys and values."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    """Tokens that the convolution in front of the layer looks at."""

    @property
    def recurrent_elements(self) -> int:
        """One matrix per value head, in fp32."""
        return self.value_heads * self.key_dim * self.value_dim

    @property
    def convolution_elements(self) -> int:
        """Inputs that the convolution keeps, in the model's dtype."""
        return (2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim) * self.kernel


class Experts(msgspec.Struct, frozen=True):
    """Mixture of experts in place of the MLP."""

    layers: tuple[bool, ...]
    """Which layers have experts; the others have a dense MLP."""
    count: int
    per_token: int
    inner: int
    """Inner channels of one expert."""
    shared_inner: int = 0
    """Inner channels of the MLP that every token takes; 0: there is none."""
    shared_gate: bool = False
    """The shared MLP's output is weighted by a gate of its own."""
    scoring: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax"
    normalised: bool = False
    """The weights of the chosen experts are made to add up to one."""
    scale: float = 1.0
    """Factor on the routed experts' weights."""
    groups: int = 1
    groups_per_token: int = 1
    """Groups that the experts fall into; a token takes experts of at most `groups_per_token` of them."""
    names: Literal["gate", "mixtral", "packed"] = "gate"
    """How a checkpoint names and stores them: see `hetkv.runtime.tensors`."""
    clamp: tuple[float, float] | None = None
    """GPT-OSS: limit of gate and up, and the factor inside the gate's sigmoid."""


class ModelConfig(msgspec.Struct, frozen=True):
    """A decoder, as its `config.json` describes it."""

    family: str
    """Its `model_type`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Inner channels of the dense MLP; 0: no layer has one."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    """Tokens that positions are defined for (`max_position_embeddings`)."""
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    """The checkpoint stores those projections as one tensor."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Norm of queries and keys: of each head, or of all heads' channels together."""
    norms: Norms = Norms()
    unit_offset: bool = False
    """Norms multiply by one plus their weight, before rounding."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor on what a layer adds to the residual stream."""
    logits_divisor: float = 1.0
    attention_scale: float | None = None
    """Factor on query times key; None: `head_dim ** -0.5`."""
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    sinks: bool = False
    """A learned logit per head takes part in the softmax, with no value."""
    output_gate: bool = False
    """The query projection also makes a gate on attention's output."""
    rope: Rope = Rope()
    sliding_rope: Rope | None = None
    """Of layers with a sliding window, where it differs."""
    sliding_windows: tuple[int | None, ...] = ()
    """Per layer: the sliding window in tokens, or None for full attention."""
    eos_ids: tuple[int, ...] = ()
    """Token ids that end a text."""
    latent: Latent | None = None
    """Multi-head latent attention; `num_kv_heads` then counts the heads that a latent becomes."""
    indexed: IndexedAttention | None = None
    experts: Experts | None = None
    state: State | None = None
    state_layers: tuple[bool, ...] = ()
    """Per layer: it keeps a `state`, not KV. Empty: no layer does."""
    multimodal: bool = False
    """The text part of a model that reads more than text."""
    quantisation: str | None = None
    """`quant_method` of the stored weights."""
    kept_modules: tuple[str, ...] = ()
    """Patterns of modules that are left out of the quantisation."""

    def keeps_state(self, layer: int) -> bool:
        """Whether a layer keeps a state of fixed size in place of KV."""
        return bool(self.state_layers) and self.state_layers[layer]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of a dense MLP."""
        return self.experts is not None and self.experts.layers[layer]

    def kv_spec(self) -> KVSpec:
        """KV geometry of a model without state layers. Full and sliding layers are two cache groups, full first."""
        if self.latent is not None:
            return KVSpec((LayerSpec.latent(self.latent.rank, self.latent.rope_dim),) * self.num_layers)
        mixed = len(set(self.sliding_windows)) > 1
        return KVSpec(
            tuple(
                LayerSpec.kv(
                    self.num_kv_heads, self.head_dim, sliding_window=window, group=int(mixed and window is not None)
                )
                for window in self.sliding_windows
            )
        )
