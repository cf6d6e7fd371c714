"""Attention over paged keys and values: a layer's projections, and the product of queries with what is cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from hetkv.models import ModelConfig
from hetkv.runtime.linear import Linear
from hetkv.runtime.norm import Norm
from hetkv.runtime.paged import Pages
from hetkv.runtime.parallel_group import ParallelGroup
from hetkv.runtime.part import Part
from hetkv.runtime.rope import Rotation


class Span(NamedTuple):
    """Consecutive tokens of one sequence: `tokens[j]` is at position `start + j`; all before are in `pages`."""

    pages: Pages
    start: int
    tokens: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class AttentionLayer(Protocol):
    """One rank's part of one layer's attention."""

    output: Linear
    """The rank's part of a sum."""

    def project(self, x: torch.Tensor, turn: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, and the two segments to cache, `[tokens, heads, channels]` each, of `[tokens, hidden]`."""

    def attend(self, spans: Sequence[Span], query: torch.Tensor) -> torch.Tensor:
        """Attention of every span over its own pages: what `output` takes, `[tokens, channels]`."""


class Attention:
    """MHA, GQA or MQA: full or with a sliding window, soft cap, sinks, norms of queries and keys."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, torch.Tensor], index: int, part: Part, group: ParallelGroup
    ) -> None:
        self.config, self.index, self.part, self.group = config, index, part, group
        at = f"model.layers.{index}.self_attn."
        names = ("qkv_proj",) if config.fused_qkv else ("q_proj", "k_proj", "v_proj")
        self.qkv, self.output = Linear.of(weights, *(at + name for name in names)), Linear.of(weights, at + "o_proj")
        self.norms = [
            Norm(weights[f"{at}{name}.weight"], config.norm_eps, config.unit_offset)
            for name in (("q_norm", "k_norm") if config.qk_norm != "none" else ())
        ]
        self.sinks = weights.get(at + "sinks")
        self.window = config.windows[index]
        self.scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale

    def project(self, x: torch.Tensor, turn: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part, dim = self.part, self.config.head_dim
        heads = [part.heads.size, part.kv_heads.size, part.kv_heads.size]
        q, k, v = torch.split_with_sizes(self.qkv(x).view(len(x), sum(heads), dim), heads, dim=1)
        if self.config.qk_norm == "head":
            q, k = self.norms[0](q), self.norms[1](k)
        elif self.config.qk_norm == "all":
            q = self._norm_all(self.norms[0], q, self.config.num_heads, 1)
            k = self._norm_all(self.norms[1], k, self.config.num_kv_heads, part.replicas)
        return turn(q), turn(k), v

    def _norm_all(self, norm: Norm, x: torch.Tensor, heads: int, replicas: int) -> torch.Tensor:
        flat = norm.split(x.flatten(1), heads * self.config.head_dim, replicas, self.group)
        return flat.view(x.shape)

    def attend(self, spans: Sequence[Span], query: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        first = 0
        for span in spans:
            last = first + len(span.tokens)
            begin = 0 if self.window is None else max(0, span.start - self.window + 1)
            k, v = span.pages.read(self.index, span.stop, query.dtype, begin)
            mask = causal_mask(span, begin, self.window, query.device)
            out[first:last] = self._product(query[first:last], k, v, mask)
            first = last
        return out.flatten(1)

    def _product(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.config.attention_softcap is not None or self.sinks is not None:
            return capped(q, k, v, mask, self.scale, self.config.attention_softcap, self.sinks)
        return F.scaled_dot_product_attention(
            q[None].transpose(1, 2),
            k[None].transpose(1, 2),
            v[None].transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and len(q) > 1,
            scale=self.scale,
            enable_gqa=True,
        ).transpose(1, 2)[0]


def capped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with logits bounded by `cap * tanh(logit / cap)`, and with sinks: a logit per head that has no value.

    `q` `[queries, heads, channels]`, `k` and `v` `[keys, KV heads, channels]`; no mask: causal from the first key on.
    """
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("qhc,khc->hqk", q, k.repeat_interleave(group, 1)) * scale
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if mask is None:
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    logits = logits.float().masked_fill(~mask, float("-inf"))
    if sinks is not None:
        logits = torch.cat((logits, sinks.float()[:, None, None].expand(-1, len(q), 1)), dim=-1)
    weights = logits.softmax(dim=-1)[..., : len(k)].to(q.dtype)
    return torch.einsum("hqk,khc->qhc", weights, v.repeat_interleave(group, 1))


def causal_mask(span: Span, begin: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """`[queries, keys from begin]`, True where a query may look; None where plain causal attention says the same."""
    count = len(span.tokens)
    if count == 1 or (span.start == 0 and (window is None or span.stop <= window)):
        return None
    queries = torch.arange(span.start, span.stop, device=device)[:, None]
    keys = torch.arange(begin, span.stop, device=device)[None]
    mask = keys <= queries
    return mask if window is None else mask & (queries - keys < window)
