"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): a cache that is one latent for all heads.

A token leaves `rank + rope_dim` channels in the pool: the normed latent, and one rotated key that all heads share. Keys
and values are never expanded. The key of head h is `K_h @ latent`, so `query . key = (query @ K_h) . latent`, and the
output `V_h @ (weights @ latents)`: queries go into the latent's space, attention there has one key and value head, and
its result comes back out. This is the paper's "absorbed" form, for both prefill and decoding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from hetkv.models import Latent, ModelConfig
from hetkv.runtime.batch import Batch
from hetkv.runtime.graphs import FixedBatch
from hetkv.runtime.linear import Linear
from hetkv.runtime.norm import Norm
from hetkv.runtime.rope import Rotation, yarn_scale

LATENT_NORM_EPS = 1e-6
"""Of the norms inside attention: the architecture fixes it, whatever `rms_norm_eps` says."""


class LatentAttention:
    """One rank's query heads of one layer; the latent is whole on every rank."""

    def __init__(self, config: ModelConfig, mla: Latent, weights: Mapping[str, torch.Tensor], index: int) -> None:
        self.config, self.mla, self.index = config, mla, index
        at = f"model.layers.{index}.self_attn."
        self.scale = float((mla.nope_dim + mla.rope_dim) ** -0.5)
        if config.rope.kind == "yarn" and config.rope.mscale_all_dim:
            # Once for the query and once for the key.
            self.scale *= yarn_scale(config.rope.factor, config.rope.mscale_all_dim) ** 2
        self.query_down: Linear | None = None
        if mla.query_rank is not None:
            self.query_down = Linear.of(weights, at + "q_a_proj")
            self.query_norm = Norm(weights[at + "q_a_layernorm.weight"], LATENT_NORM_EPS)
        self.query_up = Linear.of(weights, at + ("q_proj" if self.query_down is None else "q_b_proj"))
        self.latent_down = Linear.of(weights, at + "kv_a_proj_with_mqa")
        self.latent_norm = Norm(weights[at + "kv_a_layernorm.weight"], LATENT_NORM_EPS)
        key_value = weights[at + "kv_b_proj.weight"].view(-1, mla.nope_dim + mla.value_dim, mla.rank)
        self.key_up, self.value_up = key_value[:, : mla.nope_dim], key_value[:, mla.nope_dim :]
        """`[heads, channels, rank]` each."""
        self.output = Linear.of(weights, at + "o_proj")

    def project(self, x: torch.Tensor, turn: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries in the latent's space `[tokens, heads, rank + rope_dim]`, latents and rotated keys of one head."""
        mla = self.mla
        low = x if self.query_down is None else self.query_norm(self.query_down(x))
        query = self.query_up(low).view(len(x), -1, mla.nope_dim + mla.rope_dim)
        nope, turned = torch.split_with_sizes(query, [mla.nope_dim, mla.rope_dim], dim=-1)
        absorbed = torch.einsum("thn,hnr->thr", nope, self.key_up)
        latent, key = torch.split_with_sizes(self.latent_down(x)[:, None], [mla.rank, mla.rope_dim], dim=-1)
        return torch.cat((absorbed, turn(turned)), dim=-1), self.latent_norm(latent), turn(key)

    def attend(self, batch: Batch | FixedBatch, query: torch.Tensor) -> torch.Tensor:
        """Attention of every span over its own latents; `[tokens, heads * value_dim]`."""
        out = query.new_empty(*query.shape[:-1], self.mla.rank)
        for number, part in enumerate(batch.parts):
            latent, key, mask = batch.read(number, self.index, query.dtype)
            q = query[part.rows].view(-1, part.queries, *query.shape[1:])
            out[part.rows] = (
                F.scaled_dot_product_attention(
                    q.transpose(1, 2),
                    torch.cat((latent, key), dim=-1).transpose(1, 2),
                    latent.transpose(1, 2),
                    attn_mask=mask,
                    is_causal=mask is None and part.queries > 1,
                    scale=self.scale,
                    enable_gqa=True,
                )
                .transpose(1, 2)
                .flatten(0, 1)
            )
        return torch.einsum("thr,hvr->thv", out, self.value_up).flatten(1)
