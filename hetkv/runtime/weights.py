"""Safetensors of a checkpoint directory: a rank's slices of them, checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from hetkv.errors import InputError
from hetkv.kv.spec import Interval
from hetkv.models import ModelConfig
from hetkv.runtime.part import Part
from hetkv.runtime.tensors import TensorSpec, expected_tensors, rank_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_weights(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    part: Part | None = None,
) -> dict[str, torch.Tensor]:
    """A rank's slices of all tensors that it needs (default: everything) as `dtype` on `device`.

    Nothing else is read. Raises `InputError`, before anything is computed, that names the file or tensor: a missing
    file or tensor, a wrong shape, a dtype that is not a float, NaN or infinity, a value that `dtype` cannot hold, a
    tensor that the decoder would silently ignore, a head of its own where the config ties it, a file that is not
    safetensors.
    """
    part = part or Part.of(config)
    expected, files = expected_tensors(config), _files(directory)
    missing = [name for name in expected if name not in files]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{directory}: tensor {missing[0]!r}{more} is missing from the checkpoint")
    extra = [name for name in files if name not in expected and not _ignorable(name, config)]
    if extra:
        raise InputError(f"{directory}: tensor {extra[0]!r} has no place in {config.family} with this config.json")
    _check_named(files)
    by_file: dict[Path, dict[str, TensorSpec]] = {}
    for name, spec in rank_tensors(config, part).items():
        by_file.setdefault(files[name], {})[name] = spec
    weights: dict[str, torch.Tensor] = {}
    for path, specs in by_file.items():
        for name, tensor in _load_file(path, specs, part):
            # A copy: what safetensors gives is a view of the mapped file.
            weights[name] = tensor.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
            if not bool(weights[name].isfinite().all()):
                what = (
                    "a value beyond the range of " + str(dtype) if bool(tensor.isfinite().all()) else "NaN or infinity"
                )
                raise InputError(f"{path}: tensor {name!r} holds {what}")
    if config.tied_embeddings and HEAD in files and part.last:
        _check_tied(files[HEAD], expected[EMBEDDING], part, weights[EMBEDDING])
    return weights


def _check_tied(path: Path, spec: TensorSpec, part: Part, embedding: torch.Tensor) -> None:
    """A tied head may be stored again, but not as another one: it would be dropped."""
    for _, head in _load_file(path, {HEAD: spec}, part):
        if not torch.equal(head.to(embedding.device, embedding.dtype), embedding):
            raise InputError(
                f"{path}: tensor {HEAD!r} differs from {EMBEDDING!r}, though config.json says `tie_word_embeddings`"
            )


def _ignorable(name: str, config: ModelConfig) -> bool:
    """A tied head saved twice, and the rotary frequencies that old exporters wrote."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == HEAD)


def _files(directory: Path) -> Mapping[str, Path]:
    """Tensor name -> file that holds it. A single file wins over an index, as in `transformers`."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} is there")
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.DecodeError as error:
        raise InputError(f"{index}: {error}") from None
    for name, shard in weight_map.items():
        if Path(shard).name != shard:
            raise InputError(f"{index}: tensor {name!r} points outside the directory, to {shard!r}")
    return {name: directory / shard for name, shard in weight_map.items()}


def _check_named(files: Mapping[str, Path]) -> None:
    """Every tensor in a shard is one that the index names there."""
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118  (it is not a mapping)
                if files.get(name) != path:
                    raise InputError(f"{path}: tensor {name!r} is not in the index as one of this file's")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def _load_file(path: Path, specs: Mapping[str, TensorSpec], part: Part) -> Iterator[tuple[str, torch.Tensor]]:
    """By name: what the rank has of each tensor."""
    with _open(path) as file:
        present = set(file.keys())
        for name, spec in specs.items():
            if name not in present:
                raise InputError(f"{path}: tensor {name!r} is missing, though the index names this file")
            stored = file.get_slice(name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
            if shape != spec.shape:
                raise InputError(
                    f"{path}: tensor {name!r} has shape {list(shape)}, config.json asks for {list(spec.shape)}"
                )
            if dtype not in DTYPES:
                raise InputError(f"{path}: tensor {name!r} has dtype {dtype}; read are {', '.join(DTYPES)}")
            pieces = [_slice(stored, spec.axis, interval) for interval in spec.cut(part)]
            yield name, torch.cat(pieces, dim=spec.axis) if len(pieces) > 1 else pieces[0]


def _slice(stored: Any, axis: int, interval: Interval) -> torch.Tensor:
    found: torch.Tensor = stored[(slice(None),) * axis + (slice(*interval),)]
    return found
