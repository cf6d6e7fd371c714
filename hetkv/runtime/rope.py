"""Rotary position embedding: cosines and sines of positions, and their application to queries and keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from hetkv.models import Rope


def inverse_frequencies(rope: Rope, dim: int) -> torch.Tensor:
    """`[dim / 2]` fp32, of `dim` rotated channels: `theta ** (-2i / dim)`, scaled as `rope.kind` says.

    `llama3` (Llama 3.1 model card): wavelengths above `context / low` are stretched by `factor`, those below
    `context / high` are kept, and between them the two are mixed linearly in `context / wavelength`.
    `yarn` (arXiv:2309.00071, section 3.2) mixes linearly in the channel's index, between the channels that turn
    `beta_fast` and `beta_slow` times over the original context.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_context * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - keep) * frequencies / rope.factor + keep * frequencies
    if rope.kind == "yarn":

        def channel(turns: float) -> float:
            return dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

        first, last = channel(rope.beta_fast), channel(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last = last if last != first else last + 0.001
        stretch = ((torch.arange(dim // 2).float() - first) / (last - first)).clamp(0.0, 1.0)
        return stretch * frequencies / rope.factor + (1 - stretch) * frequencies
    return frequencies


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature: `0.1 * mscale * ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def amplitude(rope: Rope) -> float:
    """Factor on cosines and sines: 1 except for YaRN, which scales queries and keys by it."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return yarn_scale(rope.factor)


class Rotation(NamedTuple):
    """Cosines and sines of some positions, `[tokens, 1, rotated channels]`; called with `[tokens, heads, channels]`."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the first channels, and leave the others as they are."""
        count = self.cos.shape[-1]
        rotated = (rotate_pairs if self.interleaved else rotate)(x[..., :count], self.cos, self.sin)
        return rotated if count == x.shape[-1] else torch.cat((rotated, x[..., count:]), dim=-1)


class Rotary:
    """One rotary embedding of a model."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self.frequencies = inverse_frequencies(rope, int(head_dim * rope.fraction)).to(device)
        self._amplitude, self._interleaved = amplitude(rope), rope.interleaved

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of int64 positions `[tokens]`; computed in fp32."""
        angles = positions.float()[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        scale = self._amplitude
        return Rotation((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype), self._interleaved)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[tokens, heads, dim]`: channel `i` pairs with channel `i + dim / 2` (Hugging Face's order)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[tokens, heads, dim]`: channel `2i` pairs with channel `2i + 1` (DeepSeek's order)."""
    half = x.shape[-1] // 2
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
