"""The decoder: Llama-family layers in plain PyTorch, keys and values in a paged pool.

One forward pass takes any number of `Span`s (a prompt, a chunk of one, or one token to decode from) and runs the dense
products over all their tokens at once; attention is per sequence, over keys and values gathered from its pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from hetkv.errors import InputError
from hetkv.runtime.config import ModelConfig, read_config
from hetkv.runtime.paged import Pages
from hetkv.runtime.rope import amplitude, inverse_frequencies, rotate, rotation
from hetkv.runtime.weights import expected_tensors, load_weights
from hetkv.spec import KVSpec

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
    """A loaded model. Stateless between calls: all sequence state is in `Pages`."""

    def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
        missing = [name for name in expected_tensors(config) if name not in weights]
        if missing:
            raise InputError(f"tensor {missing[0]!r} is missing from the weights")
        self.config = config
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = self.embedding if config.tied_embeddings else weights["lm_head.weight"]
        self.norm = weights["model.norm.weight"]
        self.layers = [self._layer(weights, index) for index in range(config.num_layers)]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self._frequencies = inverse_frequencies(config.rope, config.head_dim).to(self.device)
        self._amplitude = amplitude(config.rope)
        self._spec = config.kv_spec()

    @classmethod
    def load(
        cls, directory: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Decoder:
        """Read a Hugging Face directory (config.json, safetensors). `InputError` names what is missing or wrong."""
        path = Path(directory)
        if not path.is_dir():
            raise InputError(f"{path}: no such checkpoint directory")
        config = read_config(path)
        if config.latent is not None:
            from hetkv.runtime.mla import LatentDecoder as cls  # it is a Decoder, so it cannot be imported above
        return cls(config, load_weights(path, config, dtype, device))

    @property
    def kv_spec(self) -> KVSpec:
        """KV geometry, for `KVPool.allocate` and for the handshake."""
        return self._spec

    def prefill(self, tokens: Sequence[int], start: int, pages: Pages, on_layer: OnLayer | None = None) -> torch.Tensor:
        """Run `tokens` (a prompt or a chunk of one) from position `start`; logits `[vocab]` behind the last of them."""
        return self.forward([Span(pages, start, tokens)], on_layer)[0]

    def decode_step(self, token: int, position: int, pages: Pages, on_layer: OnLayer | None = None) -> torch.Tensor:
        """Run one token at `position`; logits `[vocab]` for the token behind it."""
        return self.forward([Span(pages, position, (token,))], on_layer)[0]

    @torch.inference_mode()
    def forward(self, spans: Sequence[Span], on_layer: OnLayer | None = None) -> torch.Tensor:
        """One pass over a ragged batch; logits `[spans, vocab]` behind the last token of each span.

        `InputError`, with nothing written: a token id outside the vocabulary, a span that is empty, starts below 0,
        ends beyond the model's context or its pages, or pages of a pool with another spec.
        """
        for span in spans:
            self._check(span)
        ids = [token for span in spans for token in span.tokens]
        positions = torch.cat([torch.arange(span.start, span.stop, device=self.device) for span in spans])
        cos, sin = rotation(positions, self._frequencies, self.dtype, self._amplitude)
        x = F.embedding(torch.tensor(ids, device=self.device), self.embedding)
        for index, layer in enumerate(self.layers):
            q, k, v = self._project(layer, x, cos, sin)
            first = 0
            for span in spans:
                last = first + len(span.tokens)
                span.pages.write(index, span.start, k[first:last], v[first:last])
                first = last
            if on_layer is not None:
                on_layer(index)
            x = x + layer.output(self._attend(index, spans, q))
            x = x + self._mlp(layer, _rms_norm(x, layer.mlp_norm, self.config.rms_norm_eps))
        ends = torch.tensor([len(span.tokens) for span in spans], device=self.device).cumsum(0) - 1
        return F.linear(_rms_norm(x[ends], self.norm, self.config.rms_norm_eps), self.head)

    def _layer(self, weights: dict[str, torch.Tensor], index: int) -> Any:
        """Weights of a layer, as `_project`, `_attend` and `_mlp` use them."""
        return _layer(weights, f"model.layers.{index}.")

    def _project(
        self, layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, each `[tokens, heads, head_dim]`."""
        config = self.config
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = layer.qkv(_rms_norm(x, layer.attention_norm, config.rms_norm_eps))
        q, k, v = torch.split_with_sizes(qkv.view(len(x), sum(heads), config.head_dim), heads, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = _rms_norm(q, layer.q_norm, config.rms_norm_eps), _rms_norm(k, layer.k_norm, config.rms_norm_eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _attend(self, index: int, spans: Sequence[Span], q: torch.Tensor) -> torch.Tensor:
        """Attention of every span over its own pages; `[tokens, heads * head_dim]`."""
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
        """What follows attention, of normed `[tokens, hidden]`."""
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
