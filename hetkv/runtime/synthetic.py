"""Models of named shapes with random weights: for timing alone, as their text means nothing."""

from __future__ import annotations

from math import prod

import msgspec
import torch

from hetkv.errors import InputError
from hetkv.models import ModelConfig, Rope
from hetkv.runtime.model import Decoder
from hetkv.runtime.tensors import expected_tensors


def _shape(
    family: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, theta: float
) -> ModelConfig:
    """A shape of head dimension 128, as its `config.json` gives it."""
    return ModelConfig(
        family=family, vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=128, max_context=32768,
        qk_norm="head" if family == "qwen3" else "none", rope=Rope(theta=theta), sliding_windows=(None,) * layers,
    )  # fmt: skip


SHAPES = {
    "llama-2-7b": _shape("llama", 32000, 4096, 11008, 32, 32, 32, 1e4),
    "llama-3-70b": _shape("llama", 128256, 8192, 28672, 80, 64, 8, 5e5),
    "qwen3-32b": _shape("qwen3", 151936, 5120, 25600, 64, 64, 8, 1e6),
}


def shape(name: str, layers: int | None = None) -> ModelConfig:
    """Geometry of a named shape, cut to `layers` layers. `InputError` lists the names, or says how many it has."""
    if name not in SHAPES:
        raise InputError(f"shape {name!r}: known are {', '.join(SHAPES)}")
    whole = SHAPES[name]
    if layers is None:
        return whole
    if not 1 <= layers <= whole.num_layers:
        raise InputError(f"{layers} layers of {name}: it has {whole.num_layers}")
    return msgspec.structs.replace(whole, num_layers=layers, sliding_windows=whole.sliding_windows[:layers])


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights of `random_decoder`."""
    return sum(prod(spec.shape) for spec in expected_tensors(config).values()) * dtype.itemsize


def random_decoder(
    config: ModelConfig, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", seed: int = 0
) -> Decoder:
    """A decoder of that geometry whose activations stay of ordinary size."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, spec in expected_tensors(config).items():
        size = spec.shape
        if len(size) == 1:
            weights[name] = torch.ones(size, dtype=dtype, device=device)
        else:
            weights[name] = torch.randn(size, dtype=dtype, device=device, generator=generator) * size[-1] ** -0.5
    return Decoder(config, weights)
