"""Rotary position embedding: cosines and sines of positions, and their application to queries and keys."""

from __future__ import annotations

import math

import torch

from hetkv.runtime.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """`[head_dim / 2]` fp32: `theta ** (-2i / head_dim)`, scaled as `rope.kind` says.

    `llama3` (Llama 3.1 model card): wavelengths above `context / low` are stretched by `factor`, those below
    `context / high` are kept, and between them the two are mixed linearly in `context / wavelength`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_context * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - keep) * frequencies / rope.factor + keep * frequencies
    return frequencies


def rotation(
    positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `[tokens, 1, head_dim]` for int64 positions `[tokens]`; computed in fp32, returned as `dtype`."""
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[tokens, heads, head_dim]`: channel `i` pairs with channel `i + head_dim / 2` (Hugging Face's order)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
