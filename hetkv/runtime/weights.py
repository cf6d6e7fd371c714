"""Safetensors of a checkpoint directory: which tensors there must be, and loading them with every shape checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from hetkv.errors import InputError
from hetkv.runtime import deepseek
from hetkv.runtime.config import ModelConfig

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


def load_weights(
    directory: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """All expected tensors as `dtype` on `device`.

    Raises `InputError`, before anything is computed, that names the file or tensor: a missing file or tensor, a wrong
    shape, a dtype that is no float, a tensor that the decoder would silently ignore, a file that is not safetensors.
    """
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
    for name in shapes:
        by_file.setdefault(files[name], []).append(name)
    weights: dict[str, torch.Tensor] = {}
    for path, names in by_file.items():
        weights.update(_load_file(path, names, shapes, dtype, device))
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
    path: Path,
    names: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    loaded = {}
    with _open(path) as file:
        present = set(file.keys())
        for name in names:
            if name not in present:
                raise InputError(f"{path}: tensor {name!r} is missing, though the index names this file")
            shape = tuple(file.get_slice(name).get_shape())
            if shape != shapes[name]:
                raise InputError(
                    f"{path}: tensor {name!r} has shape {list(shape)}, config.json asks for {list(shapes[name])}"
                )
            tensor = file.get_tensor(name)
            if not tensor.is_floating_point():
                raise InputError(f"{path}: tensor {name!r} has dtype {tensor.dtype}, weights are floating-point")
            loaded[name] = tensor.to(device=device, dtype=dtype)
    return loaded
