"""What follows attention in a layer: a gated MLP, or a mixture of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hetkv.models import Experts, ModelConfig
from hetkv.runtime.linear import Linear

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Mlp(NamedTuple):
    """`down(act(gate) * up)`; gate and up in one product."""

    gate_up: Linear
    down: Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    clamp: tuple[float, float] | None = None
    """GPT-OSS: gate and up are clamped to the first, the gate is a sigmoid with the second as its factor."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.clamp is None:
            return self.down(self.activation(gate) * up)
        limit, slope = self.clamp
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return self.down((up + 1) * gate * torch.sigmoid(gate * slope))


class Mixture(NamedTuple):
    """One layer's experts: each token takes the `per_token` that the router scores highest, and the shared ones."""

    router: Linear
    """`[experts, hidden]`, whole on every rank."""
    routed: list[Mlp]
    shared: Mlp | None
    config: Experts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.route(x)
        out = torch.zeros_like(x) if self.shared is None else self.shared(x)
        for number in sorted(set(chosen.flatten().tolist())):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, self.routed[number](x[token]) * weights[token, place, None].to(x.dtype))
        return out

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (fp32) and experts `[tokens, per_token]`."""
        config, bias = self.config, self.router.bias
        scores = F.linear(x.float(), self.router.weight.float(), None if bias is None else bias.float())
        if config.scoring == "softmax":
            scores = scores.softmax(dim=-1)
        if config.groups > 1:
            best = scores.view(len(x), config.groups, -1)
            kept = best.amax(dim=-1).topk(config.groups_per_token, dim=-1).indices
            mask = torch.zeros_like(best[..., 0], dtype=torch.bool).scatter_(1, kept, True)
            scores = (best * mask[..., None]).flatten(1)
        weights, chosen = scores.topk(config.per_token, dim=-1)
        if config.scoring == "softmax_of_chosen":
            weights = weights.softmax(dim=-1)
        elif config.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * config.scale, chosen


def mlp_of(config: ModelConfig, weights: Mapping[str, torch.Tensor], index: int) -> Mlp | Mixture:
    """A layer's MLP or experts, of the weights that `hetkv.runtime.tensors` names."""
    layer, experts = f"model.layers.{index}.", config.experts
    activation = ACTIVATIONS[config.activation]

    def mlp(at: str, *names: str) -> Mlp:
        gate_up = ("gate_up_proj",) if config.fused_gate_up else names[:2]
        return Mlp(Linear.of(weights, *(at + name for name in gate_up)), Linear.of(weights, at + names[2]), activation)

    plain = ("gate_proj", "up_proj", "down_proj")
    if experts is None or not experts.layers[index]:
        return mlp(layer + "mlp.", *plain)
    if experts.names == "packed":
        return Mixture(
            Linear.of(weights, layer + "mlp.router"), _packed(weights, layer, experts, activation), None, experts
        )
    at, names = (
        (layer + "mlp.", plain) if experts.names == "gate" else (layer + "block_sparse_moe.", ("w1", "w3", "w2"))
    )
    return Mixture(
        Linear.of(weights, at + "gate"),
        [mlp(f"{at}experts.{number}.", *names) for number in range(experts.count)],
        mlp(at + "shared_experts.", *plain) if experts.shared_inner else None,
        experts,
    )


def _packed(
    weights: Mapping[str, torch.Tensor],
    layer: str,
    experts: Experts,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> list[Mlp]:
    """Experts that are stored as one `[experts, in, out]`, with gate and up channels in turn."""
    at = layer + "mlp.experts."
    gate_up, down = weights[at + "gate_up_proj"].transpose(1, 2), weights[at + "down_proj"].transpose(1, 2)
    bias, down_bias = weights[at + "gate_up_proj_bias"], weights.get(at + "down_proj_bias")
    return [
        Mlp(
            Linear(torch.cat((gate_up[i, ::2], gate_up[i, 1::2])), torch.cat((bias[i, ::2], bias[i, 1::2]))),
            Linear(down[i].contiguous(), None if down_bias is None else down_bias[i]),
            activation,
            experts.clamp,
        )
        for i in range(experts.count)
    ]
