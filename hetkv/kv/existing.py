"""From an engine's own arrays to the layers of a pool: `existing_layers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, Literal

import msgspec

from hetkv.errors import InputError
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.memory import Memory
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.spec import KVSpec, Shard


def existing_layers(
    spec: KVSpec,
    shard: Shard,
    tensors: Any,
    axes: Any,
    dtype: object,
    scale: ScaleLayout | Literal["inline"] | None,
    scales: Mapping[int, Mapping[str, Any]],
    scale_axes: str,
) -> dict[int, LayerMemory]:
    """Layout and memory of each layer; arguments and errors are those of `KVPool.from_tensors`."""
    found = {}
    for layer, (arrays, names) in _by_layer(spec.owned(shard.layers), tensors, axes).items():
        if not 0 <= layer < len(spec.layers):
            raise InputError(f"layer {layer}: the model has {len(spec.layers)} layers")
        try:
            own = None if spec.layers[layer].kind == "state" else dtype
            memory = _layer(spec, layer, arrays, names, own, scale)
            found[layer] = _with_scales(memory, scales.get(layer, {}), scale_axes)
        except InputError as error:
            raise InputError(f"layer {layer}: {error}") from None
    return found


def _by_layer(owned: list[int], tensors: Any, axes: Any) -> dict[int, tuple[Any, Any]]:
    """The arrays of each layer and their axes, however both were given."""
    per_layer = isinstance(axes, Mapping) and any(not isinstance(key, str) for key in axes)
    if isinstance(tensors, Mapping) and tensors and all(isinstance(key, str) for key in tensors):
        parts = {
            name: _unstack(tensor, axes if isinstance(axes, str) else axes.get(name, ""), len(owned))
            for name, tensor in tensors.items()
        }
        inner = {name: names for name, (_, names) in parts.items()}
        return {
            layer: ({name: arrays[place] for name, (arrays, _) in parts.items()}, inner)
            for place, layer in enumerate(owned)
        }
    if isinstance(tensors, Mapping):
        by_layer = {_layer_index(key): value for key, value in tensors.items()}
    elif isinstance(tensors, Sequence):
        if len(tensors) != len(owned):
            raise InputError(f"{len(tensors)} tensors for the {len(owned)} layers {owned} of the shard")
        by_layer = dict(zip(owned, tensors, strict=True))
    else:
        if not isinstance(axes, str):
            raise InputError("one tensor for all layers has one axes string, with an axis `layer`")
        arrays, axes = _unstack(tensors, axes, len(owned))
        by_layer = dict(zip(owned, arrays, strict=True))
    missing = [layer for layer in by_layer if per_layer and layer not in axes]
    if missing:
        raise InputError(f"axes are not given for layers {missing}")
    return {layer: (arrays, axes[layer] if per_layer else axes) for layer, arrays in by_layer.items()}


def _layer_index(key: Any) -> int:
    try:
        return index(key)
    except TypeError:
        raise InputError(f"tensors are given by layer index or by segment name, not by {key!r}") from None


def _unstack(tensor: Any, axes: str, count: int) -> tuple[list[Any], str]:
    """The layers of an array that is stacked over them, and the axes that are left."""
    names = axes.split()
    if "layer" not in names:
        raise InputError(f"axes {axes!r} of one tensor for all layers need an axis `layer`")
    memory, at = Memory.of(tensor) if not hasattr(tensor, "shape") else tensor, names.index("layer")
    if len(memory.shape) != len(names) or memory.shape[at] != count:
        raise InputError(f"axes {axes!r} of shape {tuple(memory.shape)}: the shard holds {count} layers")
    left = " ".join(name for name in names if name != "layer")
    if isinstance(memory, Memory):
        return [memory.select(at, place) for place in range(count)], left
    before = (slice(None),) * at
    indices = ((*before, place) for place in range(count))
    return [memory[index] for index in indices], left


def _layer(
    spec: KVSpec, layer: int, arrays: Any, axes: Any, dtype: object, scale: ScaleLayout | Literal["inline"] | None
) -> LayerMemory:
    parts = [segment._replace(heads=0) for segment in spec.layers[layer].segments]
    if isinstance(arrays, (list, tuple)):
        if len(arrays) != len(parts):
            raise InputError(f"{len(arrays)} tensors for segments {[part.name for part in parts]}")
        arrays = {part.name: array for part, array in zip(parts, arrays, strict=True)}
    if not isinstance(arrays, Mapping) and len(parts) == 1 and "segment" not in str(axes).split():
        arrays = {parts[0].name: arrays}
    if not isinstance(arrays, Mapping):
        layout = KVLayout.from_tensor(arrays, axes, parts, scale=scale, dtype=dtype)
        memory = Memory.of(arrays, dtype)
        blocks = memory.shape[axes.split().index("block")]
        source = memory if dtype is not None and memory.owner is None else arrays
        return LayerMemory(layout, blocks, {part.name: source for part in parts})
    layout = KVLayout.from_tensor(arrays, axes, scale=scale, dtype=dtype)
    counts = {
        name: Memory.of(array, dtype).shape[(axes if isinstance(axes, str) else axes[name]).split().index("block")]
        for name, array in arrays.items()
    }
    if len(set(counts.values())) != 1:
        raise InputError(f"segments have different block counts: {counts}")
    return LayerMemory(layout, next(iter(counts.values())), dict(arrays))


def _with_scales(memory: LayerMemory, scales: Mapping[str, Any], axes: str) -> LayerMemory:
    """The same with a layer's scales in memory of their own."""
    layout, arrays = memory.layout, dict(memory.tensors)
    for name, array in scales.items():
        if name not in layout.segments:
            raise InputError(f"scales of {name!r}, which is not a segment")
        part = layout.segments[name]
        groups = dict(zip(axes.split(), Memory.of(array).shape, strict=False)).get("group", 1)
        if groups < 1 or part.channels % groups:
            raise InputError(f"{groups} scales for {part.channels} channels of {name!r}")
        placed = ScaleLayout.from_tensor(array, axes, part.channels // groups if groups > 1 else 0)
        scaled = {**layout.segments, name: msgspec.structs.replace(part, scale=placed)}
        layout = msgspec.structs.replace(layout, segments=scaled)
        arrays[f"{name}.scale"] = array
    return LayerMemory(layout, memory.num_blocks, arrays)
