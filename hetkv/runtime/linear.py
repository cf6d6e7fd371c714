"""`Linear`, and weights of several products joined into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Linear(NamedTuple):
    """`x @ weight.T + bias`, weight `[out, in]`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], *names: str) -> Linear:
        """The products of those names as one, outputs in that order."""
        biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
        joined = [weights[f"{name}.weight"] for name in names]
        if len(joined) == 1:
            return cls(joined[0], biases[0] if biases else None)
        return cls(torch.cat(joined), torch.cat(biases) if biases else None)
