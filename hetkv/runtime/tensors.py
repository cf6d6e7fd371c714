"""Which tensors a checkpoint has, by Hugging Face's names, and how tensor parallelism cuts each.

Query, key and value heads, MLPs and experts are split by output where they come in and by input where they go out
(Megatron-LM, arXiv:1909.08053); the latter are partial sums, whose bias belongs to rank 0 alone. Norms, gates and a
latent's compression are whole on every rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from hetkv.kv.spec import Interval
from hetkv.models import Experts, Latent, ModelConfig
from hetkv.runtime.part import Part, even


class Run(NamedTuple):
    """`number` things of `unit` rows each, one after another along an axis."""

    what: Literal["heads", "kv_heads", "inner", "vocab"]
    number: int
    unit: int = 1

    def mine(self, part: Part) -> Interval:
        """Those of one rank."""
        if self.what == "heads":
            return part.heads
        return part.kv_heads if self.what == "kv_heads" else even(self.number, part.tp, part.tp_rank)


class TensorSpec(NamedTuple):
    """Shape of a tensor, and what the axis that is split is made of. No runs: every rank has all of it."""

    shape: tuple[int, ...]
    axis: int = 0
    runs: tuple[Run, ...] = ()
    once: bool = False
    """The bias of a product that is summed over the ranks: rank 0 adds it, so that it is added once."""

    def cut(self, part: Part) -> tuple[Interval, ...]:
        """What a rank has along `axis`, one interval per run."""
        if not self.runs:
            return (Interval(0, self.shape[0]),)
        found, first = [], 0
        for run in self.runs:
            start, stop = run.mine(part)
            found.append(Interval(first + start * run.unit, first + stop * run.unit))
            first += run.number * run.unit
        return tuple(found)


Tensors = dict[str, TensorSpec]


def expected_tensors(config: ModelConfig) -> Tensors:
    """Every tensor that the decoder reads."""
    vocab, norm = Run("vocab", config.vocab_size), TensorSpec((config.hidden_size,))
    found: Tensors = {"model.embed_tokens.weight": TensorSpec((config.vocab_size, config.hidden_size), 0, (vocab,))}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        found |= {f"{layer}{name}.weight": norm for name in config.norms if name is not None}
        found |= _latent(config, config.latent, layer) if config.latent else _attention(config, layer)
        found |= (
            _experts(config, config.experts, layer)
            if config.has_experts(index) and config.experts
            else _mlp(config, f"{layer}mlp.", config.intermediate_size, config.mlp_bias)
        )
    found["model.norm.weight"] = norm
    if not config.tied_embeddings:
        found["lm_head.weight"] = TensorSpec((config.vocab_size, config.hidden_size), 0, (vocab,))
    return found


def rank_tensors(config: ModelConfig, part: Part) -> Tensors:
    """The tensors of which a rank needs anything."""
    found = {}
    for name, spec in expected_tensors(config).items():
        if name.startswith("model.layers."):
            needed = int(name.split(".")[2]) in range(*part.shard.layers) and (part.tp_rank == 0 or not spec.once)
        elif name == "model.embed_tokens.weight":
            needed = part.first or (part.last and config.tied_embeddings)
        else:
            needed = part.last
        if needed:
            found[name] = spec
    return found


def _into(name: str, runs: tuple[Run, ...], width: int, bias: bool = False) -> Tensors:
    """A product that is split by output."""
    total = sum(run.number * run.unit for run in runs)
    found = {f"{name}.weight": TensorSpec((total, width), 0, runs)}
    return found | ({f"{name}.bias": TensorSpec((total,), 0, runs)} if bias else {})


def _out(name: str, run: Run, width: int, bias: bool = False) -> Tensors:
    """A product that is split by input."""
    found = {f"{name}.weight": TensorSpec((width, run.number * run.unit), 1, (run,))}
    return found | ({f"{name}.bias": TensorSpec((width,), once=True)} if bias else {})


def _whole(name: str, *shape: int, bias: bool = False) -> Tensors:
    found = {f"{name}.weight": TensorSpec(shape)}
    return found | ({f"{name}.bias": TensorSpec(shape[:1])} if bias else {})


def _attention(config: ModelConfig, layer: str) -> Tensors:
    at, hidden, dim = layer + "self_attn.", config.hidden_size, config.head_dim
    query, key = Run("heads", config.num_heads, dim), Run("kv_heads", config.num_kv_heads, dim)
    if config.fused_qkv:
        found = _into(at + "qkv_proj", (query, key, key), hidden, config.qkv_bias)
    else:
        found = {}
        for name, run in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            found |= _into(at + name, (run,), hidden, config.qkv_bias)
    found |= _out(at + "o_proj", query, hidden, config.output_bias)
    if config.qk_norm == "head":
        found |= _whole(at + "q_norm", dim) | _whole(at + "k_norm", dim)
    elif config.qk_norm == "all":
        for name, run in (("q_norm", query), ("k_norm", key)):
            found[f"{at}{name}.weight"] = TensorSpec((run.number * dim,), 0, (run,))
    if config.sinks:
        found[at + "sinks"] = TensorSpec((config.num_heads,), 0, (Run("heads", config.num_heads),))
    return found


def _latent(config: ModelConfig, mla: Latent, layer: str) -> Tensors:
    at, hidden, heads, bias = layer + "self_attn.", config.hidden_size, config.num_heads, config.qkv_bias
    query = Run("heads", heads, mla.nope_dim + mla.rope_dim)
    found = (
        _whole(at + "kv_a_proj_with_mqa", mla.rank + mla.rope_dim, hidden, bias=bias)
        | _whole(at + "kv_a_layernorm", mla.rank)
        | _into(at + "kv_b_proj", (Run("heads", heads, mla.nope_dim + mla.value_dim),), mla.rank)
        | _out(at + "o_proj", Run("heads", heads, mla.value_dim), hidden, config.output_bias)
    )
    if mla.query_rank is None:
        return found | _into(at + "q_proj", (query,), hidden)
    return (
        found
        | _whole(at + "q_a_proj", mla.query_rank, hidden, bias=bias)
        | _whole(at + "q_a_layernorm", mla.query_rank)
        | _into(at + "q_b_proj", (query,), mla.query_rank)
    )


def _mlp(
    config: ModelConfig, at: str, size: int, bias: bool = False, names: tuple[str, str, str] | None = None
) -> Tensors:
    """Gate, up and down."""
    gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
    inner, hidden = Run("inner", size), config.hidden_size
    if config.fused_gate_up:
        into = _into(at + "gate_up_proj", (inner, inner), hidden, bias)
    else:
        into = _into(at + gate, (inner,), hidden, bias) | _into(at + up, (inner,), hidden, bias)
    return into | _out(at + down, inner, hidden, bias)


def _experts(config: ModelConfig, experts: Experts, layer: str) -> Tensors:
    """`gate`: named as an MLP's parts. `mixtral`: w1, w3, w2. `packed`: one tensor of all experts, `[in, out]` each,
    with gate and up channels in turn."""
    hidden, count = config.hidden_size, experts.count
    if experts.names == "packed":
        at, inner, pairs = layer + "mlp.experts.", Run("inner", experts.inner), Run("inner", experts.inner, 2)
        return _whole(layer + "mlp.router", count, hidden, bias=True) | {
            at + "gate_up_proj": TensorSpec((count, hidden, 2 * experts.inner), 2, (pairs,)),
            at + "gate_up_proj_bias": TensorSpec((count, 2 * experts.inner), 1, (pairs,)),
            at + "down_proj": TensorSpec((count, experts.inner, hidden), 1, (inner,)),
            at + "down_proj_bias": TensorSpec((count, hidden), once=True),
        }
    at, names = layer + "mlp.", None
    if experts.names == "mixtral":
        at, names = layer + "block_sparse_moe.", ("w1", "w3", "w2")
    found = _whole(at + "gate", count, hidden)
    if experts.shared_inner:
        found |= _mlp(config, at + "shared_experts.", experts.shared_inner)
    for number in range(count):
        found |= _mlp(config, f"{at}experts.{number}.", experts.inner, names=names)
    return found
