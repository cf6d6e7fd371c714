"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): a `Decoder` whose cache is one latent for all heads.

A token leaves `rank + rope_dim` channels in the pool: the normed latent, and one rotated key that all heads share. Keys
and values are never expanded. The key of head h is `K_h @ latent`, so `query . key = (query @ K_h) . latent`, and the
output `V_h @ (weights @ latents)`: queries go into the latent's space, attention there has one key and value head, and
its result comes back out. This is the paper's "absorbed" form, for prefill and decoding alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hetkv.runtime.config import ModelConfig
from hetkv.runtime.deepseek import Experts, Latent
from hetkv.runtime.model import Decoder, Linear, Span, _mask, _rms_norm
from hetkv.runtime.parallel_group import ParallelGroup
from hetkv.runtime.part import Part
from hetkv.runtime.rope import rotate_pairs, yarn_scale

LATENT_NORM_EPS = 1e-6
"""Of the norms inside attention: the architecture fixes it, whatever `rms_norm_eps` says."""


class Mlp(NamedTuple):
    """SwiGLU; gate and up in one product."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Mixture(NamedTuple):
    """The experts of one layer: each token takes the `per_token` that the gate finds likeliest, and the shared ones."""

    gate: torch.Tensor
    """`[experts, hidden]`."""
    routed: list[Mlp]
    shared: Mlp
    config: Experts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        out = self.shared(x)
        for number in sorted(set(chosen.flatten().tolist())):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, self.routed[number](x[token]) * weights[token, place, None].to(x.dtype))
        return out

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (fp32) and experts `[tokens, per_token]`; the softmax is over all experts, and not normed again."""
        scores = F.linear(x.float(), self.gate.float()).softmax(dim=-1)
        if self.config.groups > 1:
            best = scores.view(len(x), self.config.groups, -1)
            kept = best.amax(dim=-1).topk(self.config.groups_per_token, dim=-1).indices
            mask = torch.zeros_like(best[..., 0], dtype=torch.bool).scatter_(1, kept, True)
            scores = (best * mask[..., None]).flatten(1)
        weights, chosen = scores.topk(self.config.per_token, dim=-1)
        return weights * self.config.scale, chosen


class LatentLayer(NamedTuple):
    """Weights of one layer for this rank's query heads."""

    attention_norm: torch.Tensor
    query_down: Linear | None
    query_norm: torch.Tensor | None
    query_up: Linear
    latent_down: Linear
    latent_norm: torch.Tensor
    key_up: torch.Tensor
    """`[heads, nope_dim, rank]`."""
    value_up: torch.Tensor
    """`[heads, value_dim, rank]`."""
    output: Linear
    mlp_norm: torch.Tensor
    mlp: Mlp | Mixture


class LatentDecoder(Decoder):
    """A DeepSeek-V2 model, or a rank's part of one: its heads are read off the weights, the latent is whole."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        part: Part | None = None,
        team: ParallelGroup | None = None,
    ) -> None:
        assert config.latent is not None
        self._mla: Latent = config.latent
        self._scale = float((self._mla.nope_dim + self._mla.rope_dim) ** -0.5)
        if config.rope.kind == "yarn" and config.rope.mscale_all_dim:
            # Once for the query and once for the key.
            self._scale *= yarn_scale(config.rope.factor, config.rope.mscale_all_dim) ** 2
        super().__init__(config, weights, part, team)

    def _layer(self, weights: dict[str, torch.Tensor], index: int) -> LatentLayer:
        prefix = f"model.layers.{index}."
        attention, mla = prefix + "self_attn.", self._mla

        def linear(name: str) -> Linear:
            return Linear(weights[f"{attention}{name}.weight"], weights.get(f"{attention}{name}.bias"))

        def mlp(at: str) -> Mlp:
            gate, up, down = (weights[f"{prefix}mlp.{at}{name}_proj.weight"] for name in ("gate", "up", "down"))
            return Mlp(Linear(torch.cat([gate, up])), Linear(down))

        direct = mla.query_rank is None
        key_value = weights[attention + "kv_b_proj.weight"].view(-1, mla.nope_dim + mla.value_dim, mla.rank)
        experts = self.config.experts
        dense = experts is None or index < experts.first_layer
        return LatentLayer(
            attention_norm=weights[prefix + "input_layernorm.weight"],
            query_down=None if direct else linear("q_a_proj"),
            query_norm=weights.get(attention + "q_a_layernorm.weight"),
            query_up=linear("q_proj" if direct else "q_b_proj"),
            latent_down=linear("kv_a_proj_with_mqa"),
            latent_norm=weights[attention + "kv_a_layernorm.weight"],
            key_up=key_value[:, : mla.nope_dim],
            value_up=key_value[:, mla.nope_dim :],
            output=linear("o_proj"),
            mlp_norm=weights[prefix + "post_attention_layernorm.weight"],
            mlp=mlp("")
            if dense or experts is None
            else Mixture(
                weights[prefix + "mlp.gate.weight"],
                [mlp(f"experts.{number}.") for number in range(experts.count)],
                mlp("shared_experts."),
                experts,
            ),
        )

    def _project(
        self, layer: LatentLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries in the latent's space `[tokens, heads, rank + rope_dim]`, latents and rotated keys of one head."""
        mla = self._mla
        x = _rms_norm(x, layer.attention_norm, self.config.rms_norm_eps)
        low = x
        if layer.query_down is not None and layer.query_norm is not None:
            low = _rms_norm(layer.query_down(x), layer.query_norm, LATENT_NORM_EPS)
        query = layer.query_up(low).view(len(x), -1, mla.nope_dim + mla.rope_dim)
        nope, turned = torch.split_with_sizes(query, [mla.nope_dim, mla.rope_dim], dim=-1)
        absorbed = torch.einsum("thn,hnr->thr", nope, layer.key_up)
        latent, key = torch.split_with_sizes(layer.latent_down(x)[:, None], [mla.rank, mla.rope_dim], dim=-1)
        latent = _rms_norm(latent, layer.latent_norm, LATENT_NORM_EPS)
        return torch.cat((absorbed, rotate_pairs(turned, cos, sin)), dim=-1), latent, rotate_pairs(key, cos, sin)

    def _attend(self, index: int, spans: Sequence[Span], q: torch.Tensor) -> torch.Tensor:
        """Attention of every span over its own latents; `[tokens, heads * value_dim]`."""
        out = []
        first = 0
        for span in spans:
            last = first + len(span.tokens)
            latent, key = span.pages.read(index, span.stop, self.dtype)
            mask = _mask(span, 0, None, q.device)
            out.append(
                F.scaled_dot_product_attention(
                    q[None, first:last].transpose(1, 2),
                    torch.cat((latent, key), dim=-1)[None].transpose(1, 2),
                    latent[None].transpose(1, 2),
                    attn_mask=mask,
                    is_causal=mask is None and len(span.tokens) > 1,
                    scale=self._scale,
                    enable_gqa=True,
                )[0]
            )
            first = last
        return torch.einsum("htr,hvr->thv", torch.cat(out, dim=1), self.layers[index].value_up).flatten(1)

    def _mlp(self, layer: LatentLayer, x: torch.Tensor) -> torch.Tensor:
        return layer.mlp(x)
