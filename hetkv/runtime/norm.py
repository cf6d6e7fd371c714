"""Root-mean-square norms."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hetkv.runtime.parallel_group import ParallelGroup


class Norm(NamedTuple):
    """RMS norm over the last axis, computed in fp32."""

    gain: torch.Tensor
    eps: float
    unit_offset: bool = False
    """Multiply by one plus the gain, before rounding; otherwise by the gain, after."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self._scaled(wide, wide.square().mean(-1, keepdim=True), x.dtype)

    def split(self, x: torch.Tensor, total: int, replicas: int, group: ParallelGroup) -> torch.Tensor:
        """The norm over `total` channels: each rank of the group has some, and `replicas` ranks have the same ones."""
        if group.tp == 1:
            return self(x)
        wide = x.float()
        squares = group.sum(wide.square().sum(-1, keepdim=True) / replicas)
        return self._scaled(wide, squares / total, x.dtype)

    def _scaled(self, wide: torch.Tensor, mean: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        normed = wide * torch.rsqrt(mean + self.eps)
        return (normed * (1.0 + self.gain.float())).to(dtype) if self.unit_offset else self.gain * normed.to(dtype)
