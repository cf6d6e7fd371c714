"""Attention over paged keys and values: a layer's projections, and the product of queries with what is cached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F

from hetkv.models import ModelConfig
from hetkv.runtime.batch import Batch
from hetkv.runtime.graphs import FixedBatch
from hetkv.runtime.linear import Linear
from hetkv.runtime.norm import Norm
from hetkv.runtime.parallel_group import ParallelGroup
from hetkv.runtime.part import Part
from hetkv.runtime.rope import Rotation


class AttentionLayer(Protocol):
    """One rank's part of one layer's attention."""

    output: Linear
    """The rank's part of a sum."""

    def project(self, x: torch.Tensor, turn: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, and the two segments to cache, `[tokens, heads, channels]` each, of `[tokens, hidden]`."""

    def attend(self, batch: Batch | FixedBatch, query: torch.Tensor) -> torch.Tensor:
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
        self.sliding_window = config.sliding_windows[index]
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

    def attend(self, batch: Batch | FixedBatch, query: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        for number, part in enumerate(batch.parts):
            k, v, mask = batch.read(number, self.index, query.dtype, self.sliding_window)
            q = query[part.rows].view(-1, part.queries, *query.shape[1:])
            out[part.rows] = self._product(q, k, v, mask).flatten(0, 1)
        return out.flatten(1)

    def _product(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if self.config.attention_softcap is not None or self.sinks is not None:
            return capped(q, k, v, mask, self.scale, self.config.attention_softcap, self.sinks)
        return F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and q.shape[1] > 1,
            scale=self.scale,
            enable_gqa=True,
        ).transpose(1, 2)


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

    `q` `[spans, queries, heads, channels]`, `k` and `v` `[spans, keys, KV heads, channels]`; no mask: causal from the
    first key on.
    """
    group, queries, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    logits = torch.einsum("sqhc,skhc->shqk", q, k.repeat_interleave(group, 2)) * scale
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    logits = logits.float().masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.float()[None, :, None, None].expand(len(q), -1, queries, 1)
        logits = torch.cat((logits, extra), dim=-1)
    weights = logits.softmax(dim=-1)[..., :keys].to(q.dtype)
    return torch.einsum("shqk,skhc->sqhc", weights, v.repeat_interleave(group, 2))
