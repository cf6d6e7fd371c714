"""Safetensors of a checkpoint directory: which tensors there must be, and reading a rank's slices of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from hetkv.errors import InputError
from hetkv.kv.spec import Interval
from hetkv.runtime import deepseek
from hetkv.runtime.config import ModelConfig
from hetkv.runtime.part import Part

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the decoder reads, by Hugging Face's names."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    rows = {"q_proj": config.num_heads * dim, "k_proj": config.num_kv_heads * dim, "v_proj": config.num_kv_heads * dim}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        if config.latent is not None:
            shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
            shapes |= deepseek.attention_tensors(config, layer) | deepseek.mlp_tensors(config, index, layer)
            continue
        for name, size in rows.items():
            shapes[f"{layer}self_attn.{name}.weight"] = (size, hidden)
            if config.qkv_bias:
                shapes[f"{layer}self_attn.{name}.bias"] = (size,)
        shapes[layer + "self_attn.o_proj.weight"] = (hidden, config.num_heads * dim)
        if config.output_bias:
            shapes[layer + "self_attn.o_proj.bias"] = (hidden,)
        if config.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (dim,)
            shapes[layer + "self_attn.k_norm.weight"] = (dim,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        for name, (size, width) in {
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }.items():
            shapes[f"{layer}mlp.{name}.weight"] = (size, width)
            if config.mlp_bias:
                shapes[f"{layer}mlp.{name}.bias"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def rank_tensors(config: ModelConfig, part: Part) -> list[str]:
    """Names of the tensors of which a rank needs anything.

    A bias behind a product whose parts are summed over the ranks is the first rank's alone, so that it is added once.
    """
    names = []
    for name in expected_tensors(config):
        if name.startswith("model.layers."):
            layer = int(name.split(".")[2])
            needed = part.shard.layers.start <= layer < part.shard.layers.stop
            needed &= part.tp_rank == 0 or not name.endswith(("o_proj.bias", "down_proj.bias"))
        elif name == "model.embed_tokens.weight":
            needed = part.first or (part.last and config.tied_embeddings)
        else:
            needed = part.last
        if needed:
            names.append(name)
    return names


def tensor_cut(config: ModelConfig, part: Part, name: str, shape: tuple[int, ...]) -> tuple[int, Interval]:
    """Axis and interval of a tensor that a rank computes with; the whole tensor where it is not split."""
    if config.latent is not None and name.startswith("model.layers."):
        return deepseek.tensor_cut(config, name, shape, part.tp, part.tp_rank)
    dim = config.head_dim
    kind = name.removesuffix(".weight").removesuffix(".bias").rsplit(".", 1)[-1]
    cuts = {
        "q_proj": (0, part.heads, dim),
        "k_proj": (0, part.kv_heads, dim),
        "v_proj": (0, part.kv_heads, dim),
        "o_proj": (1, part.heads, dim),
        "gate_proj": (0, part.inner, 1),
        "up_proj": (0, part.inner, 1),
        "down_proj": (1, part.inner, 1),
        "embed_tokens": (0, part.vocab, 1),
        "lm_head": (0, part.vocab, 1),
    }
    axis, (start, stop), size = cuts.get(kind, (0, Interval(0, shape[0]), 1))
    if axis == len(shape):  # the bias of a product whose input is split
        return 0, Interval(0, shape[0])
    return axis, Interval(start * size, stop * size)


def load_weights(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    part: Part | None = None,
) -> dict[str, torch.Tensor]:
    """A rank's slices of all tensors that it needs (default: everything) as `dtype` on `device`.

    Nothing else is read. Raises `InputError`, before anything is computed, that names the file or tensor: a missing
    file or tensor, a wrong shape, a dtype that is no float, a tensor that the decoder would silently ignore, a file
    that is not safetensors.
    """
    part = part or Part.of(config)
    shapes = expected_tensors(config)
    files = _files(directory)
    missing = [name for name in shapes if name not in files]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{directory}: tensor {missing[0]!r}{more} is missing from the checkpoint")
    extra = [name for name in files if name not in shapes and not _ignorable(name, config)]
    if extra:
        raise InputError(
            f"{directory}: tensor {extra[0]!r} has no place in {config.architecture} with this config.json"
        )
    by_file: dict[Path, list[str]] = {}
    for name in rank_tensors(config, part):
        by_file.setdefault(files[name], []).append(name)
    weights: dict[str, torch.Tensor] = {}
    for path, names in by_file.items():
        cuts = {name: (shapes[name], *tensor_cut(config, part, name, shapes[name])) for name in names}
        for name, tensor in _load_file(path, cuts):
            # A copy: what safetensors gives is a view of the mapped file.
            weights[name] = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return weights


def _ignorable(name: str, config: ModelConfig) -> bool:
    """A tied head saved twice, and the rotary frequencies that old exporters wrote."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")


def _files(directory: Path) -> Mapping[str, Path]:
    """Tensor name -> file that holds it. A sharded index wins over a single file, as in `transformers`."""
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except msgspec.DecodeError as error:
            raise InputError(f"{index}: {error}") from None
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise InputError(f"{index}: tensor {name!r} points outside the directory, to {file!r}")
        return {name: directory / file for name, file in weight_map.items()}
    single = directory / SINGLE
    if not single.is_file():
        raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} is there")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def _load_file(
    path: Path, cuts: Mapping[str, tuple[tuple[int, ...], int, Interval]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """By name: the shape that a tensor must have, and the axis and interval of it that is read."""
    with _open(path) as file:
        present = set(file.keys())
        for name, (wanted, axis, (start, stop)) in cuts.items():
            if name not in present:
                raise InputError(f"{path}: tensor {name!r} is missing, though the index names this file")
            stored = file.get_slice(name)
            shape = tuple(stored.get_shape())
            if shape != wanted:
                raise InputError(
                    f"{path}: tensor {name!r} has shape {list(shape)}, config.json asks for {list(wanted)}"
                )
            tensor = stored[start:stop] if axis == 0 else stored[:, start:stop]
            if not tensor.is_floating_point():
                raise InputError(f"{path}: tensor {name!r} has dtype {tensor.dtype}, weights are floating-point")
            yield name, tensor
