"""The decoder: Llama-family layers in plain PyTorch, keys and values in a paged pool.

One forward pass takes any number of `Span`s (a prompt, a chunk of one, or one token to decode from) and runs the dense
products over all their tokens at once; attention is per sequence, over keys and values gathered from its pages.

A model may be split over the ranks of a `ParallelGroup`: each has its `Part`, makes the same calls with the same
arguments, and keeps its part's keys and values. Products into heads and channels are split by output; those out of
them by input, and the parts are summed (Megatron-LM, arXiv:1909.08053). Hidden states pass from pipeline stage to
pipeline stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from hetkv.errors import InputError
from hetkv.kv.spec import KVSpec, Shard
from hetkv.runtime.config import ModelConfig, read_config
from hetkv.runtime.paged import Pages
from hetkv.runtime.parallel_group import ParallelGroup
from hetkv.runtime.part import Part, even
from hetkv.runtime.rope import amplitude, inverse_frequencies, rotate, rotation
from hetkv.runtime.weights import load_weights, rank_tensors

OnLayer = Callable[[int], None]
"""Called with layer `i` once its keys and values of this pass are in the pool, before its attention is computed."""


class Span(NamedTuple):
    """Consecutive tokens of one sequence: `tokens[j]` sits at position `start + j`; all before are in `pages`."""

    pages: Pages
    start: int
    tokens: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class Linear(NamedTuple):
    """`x @ weight.T + bias`, weight `[out, in]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Layer(NamedTuple):
    """Weights of one decoder layer; q, k and v in one product, gate and up in one."""

    attention_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """A loaded model, or a rank's part of one. Stateless between calls: all sequence state is in `Pages`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        part: Part | None = None,
        team: ParallelGroup | None = None,
    ) -> None:
        self.part, self.team = part or Part.of(config), team or ParallelGroup()
        missing = [name for name in rank_tensors(config, self.part) if name not in weights]
        if missing:
            raise InputError(f"tensor {missing[0]!r} is missing from the weights")
        self.config = config
        self.embedding = weights.get("model.embed_tokens.weight")
        self.head = self.embedding if config.tied_embeddings else weights.get("lm_head.weight")
        self.norm = weights.get("model.norm.weight")
        self.layers = {index: self._layer(weights, index) for index in range(*self.part.shard.layers)}
        some = next(iter(weights.values()))
        self.dtype, self.device = some.dtype, some.device
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(self.device)
        self._amplitude = amplitude(config.rope)
        self._spec = config.kv_spec()

    @classmethod
    def load(
        cls,
        directory: Path | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        team: ParallelGroup | None = None,
        stages: Sequence[int] | None = None,
    ) -> Decoder:
        """Read a Hugging Face directory (config.json, safetensors). `InputError` names what is missing or wrong.

        In a `team`: this rank's part, of which it reads only its slices; `stages` are the layers of each pipeline
        stage (default: as even as can be).
        """
        path = Path(directory)
        if not path.is_dir():
            raise InputError(f"{path}: no such checkpoint directory")
        config, team = read_config(path), team or ParallelGroup()
        part = Part.of(config, team.tp, team.rank % team.tp, team.pp, team.rank // team.tp, stages)
        if config.latent is not None:
            from hetkv.runtime.mla import LatentDecoder as cls  # it is a Decoder, so it cannot be imported above
        return cls(config, load_weights(path, config, dtype, device, part), part, team)

    @property
    def kv_spec(self) -> KVSpec:
        """KV geometry, for `KVPool.allocate` and for the handshake."""
        return self._spec

    @property
    def shard(self) -> Shard:
        """The part of the KV that this rank computes: its pool must hold exactly that."""
        return self.part.shard

    def prefill(
        self, tokens: Sequence[int], start: int, pages: Pages, on_layer: OnLayer | None = None
    ) -> torch.Tensor | None:
        """Run `tokens` (a prompt or a chunk of one) from position `start`; logits `[vocab]` behind the last of them."""
        logits = self.forward([Span(pages, start, tokens)], on_layer)
        return None if logits is None else logits[0]

    def decode_step(
        self, token: int, position: int, pages: Pages, on_layer: OnLayer | None = None
    ) -> torch.Tensor | None:
        """Run one token at `position`; logits `[vocab]` for the token behind it."""
        logits = self.forward([Span(pages, position, (token,))], on_layer)
        return None if logits is None else logits[0]

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span], on_layer: OnLayer | None = None) -> torch.Tensor | None:
        """One pass over a ragged batch; logits `[spans, vocab]` behind the last token of each span.

        Every rank of the last stage has all logits; a rank of another stage has `None`.

        `InputError`, with nothing written: a token id outside the vocabulary, a span that is empty, starts below 0,
        ends beyond the model's context or its pages, or pages of a pool with another spec.
        """
        for span in spans:
            self._check(span)
        ids = torch.tensor([token for span in spans for token in span.tokens], device=self.device)
        positions = torch.cat([torch.arange(span.start, span.stop, device=self.device) for span in spans])
        cos, sin = rotation(positions, self._frequencies, self.dtype, self._amplitude)
        shape = (len(ids), self.config.hidden_size)
        x = self._embed(ids) if self.part.first else self.team.receive(shape, self.dtype)
        for index, layer in self.layers.items():
            q, k, v = self._project(layer, x, cos, sin)
            first = 0
            for span in spans:
                last = first + len(span.tokens)
                span.pages.write(index, span.start, k[first:last], v[first:last])
                first = last
            if on_layer is not None:
                on_layer(index)
            x = x + self.team.sum(layer.output(self._attend(index, spans, q)))
            x = x + self.team.sum(self._mlp(layer, _rms_norm(x, layer.mlp_norm, self.config.rms_norm_eps)))
        if not self.part.last:
            self.team.send(x)
            return None
        ends = torch.tensor([len(span.tokens) for span in spans], device=self.device).cumsum(0) - 1
        return self._logits(x[ends])

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states `[tokens, hidden]`: each rank looks up the ids that it has rows of."""
        assert self.embedding is not None
        start, stop = self.part.vocab
        mine = (ids >= start) & (ids < stop)
        rows = F.embedding(torch.where(mine, ids - start, 0), self.embedding)
        return self.team.sum(rows.masked_fill_(~mine[:, None], 0))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows, vocab]` of hidden states `[rows, hidden]`: each rank makes those of its part of the vocabulary."""
        assert self.norm is not None
        assert self.head is not None
        mine = F.linear(_rms_norm(x, self.norm, self.config.rms_norm_eps), self.head)
        tp = self.part.tp
        return self.team.concat(mine, [even(self.config.vocab_size, tp, rank).size for rank in range(tp)])

    def _layer(self, weights: dict[str, torch.Tensor], index: int) -> Any:
        """Weights of a layer, as `_project`, `_attend` and `_mlp` use them."""
        return _layer(weights, f"model.layers.{index}.")

    def _project(
        self, layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, each `[tokens, heads, head_dim]` with this rank's heads."""
        config, part = self.config, self.part
        heads = [part.heads.size, part.kv_heads.size, part.kv_heads.size]
        qkv = layer.qkv(_rms_norm(x, layer.attention_norm, config.rms_norm_eps))
        q, k, v = torch.split_with_sizes(qkv.view(len(x), sum(heads), config.head_dim), heads, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = _rms_norm(q, layer.q_norm, config.rms_norm_eps), _rms_norm(k, layer.k_norm, config.rms_norm_eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _attend(self, index: int, spans: Sequence[Span], q: torch.Tensor) -> torch.Tensor:
        """Attention of every span over its own pages; `[tokens, heads * head_dim]` with this rank's heads."""
        out = torch.empty_like(q)
        window = self.config.windows[index]
        first = 0
        for span in spans:
            last = first + len(span.tokens)
            begin = 0 if window is None else max(0, span.start - window + 1)
            k, v = span.pages.read(index, span.stop, self.dtype, begin)
            mask = _mask(span, begin, window, q.device)
            out[first:last] = F.scaled_dot_product_attention(
                q[None, first:last].transpose(1, 2),
                k[None].transpose(1, 2),
                v[None].transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None and len(span.tokens) > 1,
                enable_gqa=True,
            ).transpose(1, 2)[0]
            first = last
        return out.flatten(1)

    def _mlp(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """What follows attention, of normed `[tokens, hidden]`: this rank's part of the sum."""
        gate, up = layer.gate_up(x).chunk(2, dim=-1)
        return cast(torch.Tensor, layer.down(F.silu(gate) * up))

    def _check(self, span: Span) -> None:
        if not span.tokens or span.start < 0:
            raise InputError(f"a span of {len(span.tokens)} tokens from position {span.start}")
        if span.stop > self.config.max_context:
            raise InputError(
                f"position {span.stop - 1} is beyond the model's context of {self.config.max_context} tokens"
            )
        if span.stop > span.pages.capacity:
            raise InputError(
                f"position {span.stop - 1} is beyond the {span.pages.capacity} tokens that the sequence's blocks hold"
            )
        if span.pages.pool.spec != self._spec:
            raise InputError("the pool was made for another model: its KV spec differs from the checkpoint's")
        if span.pages.pool.shard != self.part.shard:
            raise InputError("the pool was made for another rank: its layers and heads are not those computed here")
        for token in span.tokens:
            if not 0 <= token < self.config.vocab_size:
                raise InputError(f"token id {token} is outside the vocabulary of {self.config.vocab_size}")


def _mask(span: Span, begin: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """`[queries, keys from begin]`, True where a query may look; None where plain causal attention says the same."""
    count = len(span.tokens)
    if count == 1 or (span.start == 0 and (window is None or span.stop <= window)):
        return None
    queries = torch.arange(span.start, span.stop, device=device)[:, None]
    keys = torch.arange(begin, span.stop, device=device)[None]
    mask = keys <= queries
    return mask if window is None else mask & (queries - keys < window)


def _rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis, computed in fp32, rounded before the gain."""
    wide = x.float()
    return gain * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _layer(weights: dict[str, torch.Tensor], prefix: str) -> Layer:
    def fused(*names: str) -> Linear:
        biases = [weights[prefix + name + ".bias"] for name in names if prefix + name + ".bias" in weights]
        return Linear(
            torch.cat([weights[prefix + name + ".weight"] for name in names]), torch.cat(biases) if biases else None
        )

    return Layer(
        attention_norm=weights[prefix + "input_layernorm.weight"],
        qkv=fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=weights.get(prefix + "self_attn.q_norm.weight"),
        k_norm=weights.get(prefix + "self_attn.k_norm.weight"),
        output=fused("self_attn.o_proj"),
        mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
        gate_up=fused("mlp.gate_proj", "mlp.up_proj"),
        down=fused("mlp.down_proj"),
    )
