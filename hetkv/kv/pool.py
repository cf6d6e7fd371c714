"""One rank's paged KV memory: `KVPool`. It owns nothing that it did not allocate, and keeps alive what it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.layout import KVLayout
from hetkv.kv.scale import PerScale, ScaleLayout
from hetkv.kv.spec import KVSpec, Shard

if TYPE_CHECKING:
    import torch


class LayerMemory(NamedTuple):
    """Memory of one layer: a layout, its block count, and for each segment the tensor whose first byte is the base.

    Scales that lie apart have a tensor `<segment>.scale` beside it.
    """

    layout: KVLayout
    num_blocks: int
    tensors: Mapping[str, torch.Tensor]


class KVPool:
    """Paged KV memory of one rank: for every global layer of its shard a layout, a block count and base addresses.

    Layers may differ in layout, block size and block count. Tensors must stay allocated while a `Sender` or `Receiver`
    uses the pool; the pool holds references to them. All lie on one device.
    """

    def __init__(self, spec: KVSpec, shard: Shard, layers: Mapping[int, LayerMemory]) -> None:
        self.spec = spec
        self.shard = shard
        self.layers = dict(layers)
        owned = [layer for layer in range(*shard.layers) if spec.layers[layer].shares is None]
        if sorted(self.layers) != owned:
            raise InputError(f"the pool has layers {sorted(self.layers)}, its shard layers {owned}")
        devices = {tensor.device for memory in self.layers.values() for tensor in memory.tensors.values()}
        if len(devices) > 1:
            raise InputError(f"a pool lies on one device, not on {', '.join(sorted(map(str, devices)))}")
        self.device = devices.pop() if devices else None
        self._memory = [(at, at.data_ptr(), at.untyped_storage().nbytes()) for at in self._tensors()]
        self.groups: dict[int, tuple[int, int]] = {}
        """Block size and block count of each cache group that has layers here."""
        for layer, memory in self.layers.items():
            self._check(layer, memory)
            group, paging = spec.group_of(layer), (memory.layout.block_size, memory.num_blocks)
            if self.groups.setdefault(group, paging) != paging:
                raise InputError(
                    f"layer {layer} has {paging[1]} blocks of {paging[0]} tokens, its cache group {group} has "
                    f"{self.groups[group][1]} of {self.groups[group][0]}"
                )

    @classmethod
    def allocate(
        cls,
        spec: KVSpec,
        num_blocks: int | Sequence[int],
        *,
        layout: str = "nhd",
        block_size: int | Sequence[int] = 16,
        dtype: DType | str = DType.BFLOAT16,
        shard: Shard | None = None,
        scale: ScaleLayout | PerScale | None = None,
        latent_layout: str = "latent",
        device: torch.device | str = "cpu",
    ) -> KVPool:
        """A zeroed pool of a preset layout. `num_blocks` and `block_size` may be given per cache group.

        `scale`: static scales, or `"token_head"` or `"token"` for scales in memory of their own.
        """
        shard = shard or Shard.whole(spec)
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            values = [value] * spec.num_groups if isinstance(value, int) else list(value)
            if len(values) != spec.num_groups or min(values, default=0) < 1:
                raise InputError(f"{name} {value}: from 1, and one or as many as cache groups ({spec.num_groups})")
        layers = {}
        for index in range(*shard.layers):
            layer = spec.layers[index]
            if layer.shares is not None:
                continue
            blocks = num_blocks if isinstance(num_blocks, int) else num_blocks[layer.group]
            size = block_size if isinstance(block_size, int) else block_size[layer.group]
            heads = shard.heads[index].size
            if layer.kind == "state":
                made = KVLayout.preset("state", layer, heads, 1, DType.UINT8)
            else:
                name = layout if layer.kind == "kv" else latent_layout
                made = KVLayout.preset(name, layer, heads, size, dtype, None if name == "fp8_ds_mla" else scale)
            layers[index] = LayerMemory(made, blocks, allocate(made, blocks, device))
        return cls(spec, shard, layers)

    @classmethod
    def from_tensors(
        cls,
        spec: KVSpec,
        tensors: Mapping[int, torch.Tensor | Mapping[str, torch.Tensor]],
        axes: str | Mapping[str, str],
        *,
        shard: Shard | None = None,
        scale: ScaleLayout | Literal["inline"] | None = None,
        scales: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
        scale_axes: str = "block token head",
    ) -> KVPool:
        """A pool over an engine's own tensors, one entry per global layer, described by `KVLayout.from_tensor`.

        `scales`: per layer and segment a float32 tensor with the axes `scale_axes` (see `ScaleLayout.from_tensor`).
        """
        layers = {}
        if not isinstance(tensors, Mapping):
            raise InputError("tensors is a mapping from global layer index to that layer's tensor or tensors")
        for index, memory in tensors.items():
            if not 0 <= index < len(spec.layers):
                raise InputError(f"layer {index}: the model has {len(spec.layers)} layers")
            parts = [segment._replace(heads=0) for segment in spec.layers[index].segments]
            layout = KVLayout.from_tensor(memory, axes, parts, scale=scale)
            if isinstance(memory, Mapping):
                named, order = dict(memory), axes if isinstance(axes, str) else next(iter(axes.values()))
            else:
                named, order = {part.name: memory for part in parts}, str(axes)
            blocks = next(iter(named.values())).shape[order.split().index("block")]
            for name, tensor in (scales or {}).get(index, {}).items():
                if name not in layout.segments:
                    raise InputError(f"layer {index}: scales of {name!r}, which is no segment")
                part = layout.segments[name]
                shape = dict(zip(scale_axes.split(), tensor.shape, strict=False))
                groups = shape.get("group", 1)
                if groups < 1 or part.channels % groups:
                    raise InputError(f"layer {index}: {groups} scales for {part.channels} channels of {name!r}")
                placed = ScaleLayout.from_tensor(tensor, scale_axes, part.channels // groups if groups > 1 else 0)
                scaled = {**layout.segments, name: msgspec.structs.replace(part, scale=placed)}
                layout = msgspec.structs.replace(layout, segments=scaled)
                named = {**named, f"{name}.scale": tensor}
            layers[index] = LayerMemory(layout, blocks, named)
        return cls(spec, shard or Shard.whole(spec), layers)

    def view(self, layer: int, segment: str) -> torch.Tensor:
        """Strided view `[num_blocks, block_size, heads, channels]` of one segment (see `SegmentLayout.view`)."""
        memory = self.layers[layer]
        return memory.layout.segments[segment].view(
            memory.tensors[segment], memory.layout.block_size, memory.num_blocks
        )

    def scale_view(self, layer: int, segment: str) -> torch.Tensor:
        """Strided float32 view `[num_blocks, block_size, heads, groups]` of a segment's scales in memory."""
        memory, base = self.layers[layer], self._scale_memory(layer, segment)
        return memory.layout.segments[segment].scales.view(base, memory.layout.block_size, memory.num_blocks)

    def scale_base(self, layer: int, segment: str) -> int:
        """Address that the offsets of the segment's scales in memory count from."""
        return self._scale_memory(layer, segment).data_ptr()

    def _scale_memory(self, layer: int, segment: str) -> torch.Tensor:
        memory = self.layers[layer]
        scale = memory.layout.segments[segment].scale
        if scale is None or not scale.in_memory:
            raise InputError(f"layer {layer}, segment {segment!r} has no scales in memory")
        return memory.tensors[f"{segment}.scale" if scale.apart else segment]

    def base(self, layer: int, segment: str) -> int:
        """Address that the segment's offsets count from."""
        return self.layers[layer].tensors[segment].data_ptr()

    def check_alive(self) -> None:
        """Raise `InputError` where a tensor's memory was freed, resized or replaced since the pool was made."""
        for tensor, address, size in self._memory:
            if tensor.data_ptr() != address or tensor.untyped_storage().nbytes() != size:
                raise InputError("the pool's memory was freed or replaced while it was in use")

    def _tensors(self) -> list[torch.Tensor]:
        """Every tensor once."""
        every = [tensor for memory in self.layers.values() for tensor in memory.tensors.values()]
        return list({id(tensor): tensor for tensor in every}.values())

    def check_blocks(self, group: int, block_ids: Sequence[int], start: int, stop: int) -> None:
        """Raise `InputError` unless `block_ids` hold tokens `[start, stop)` of a cache group in distinct blocks.

        Ids of blocks before `start` are not looked at: an engine may have freed them.
        """
        if group not in self.groups or start >= stop:
            return
        block_size, num_blocks = self.groups[group]
        first, need = start // block_size, -(-stop // block_size)
        if len(block_ids) < need:
            raise InputError(
                f"cache group {group}: tokens up to {stop} need {need} blocks of {block_size}, not {len(block_ids)}"
            )
        used = list(block_ids[first:need])
        if min(used) < 0 or max(used) >= num_blocks:
            wrong = next(b for b in used if not 0 <= b < num_blocks)
            raise InputError(f"cache group {group}: block id {wrong} is out of range, the pool has {num_blocks} blocks")
        if len(set(used)) != len(used):
            seen: set[int] = set()
            wrong = next(b for b in used if b in seen or seen.add(b))  # type: ignore[func-returns-value]
            raise InputError(f"cache group {group}: block id {wrong} is given twice")

    def _check(self, layer: int, memory: LayerMemory) -> None:
        """The layout must hold the shard's heads and lie inside the tensors."""
        wanted = self.spec.layers[layer].segments
        heads = self.shard.heads[layer].size
        for segment in wanted:
            part = memory.layout.segments.get(segment.name)
            if part is None:
                raise InputError(f"layer {layer}: the layout has no segment {segment.name!r}")
            if (part.heads, part.channels) != (min(heads, segment.heads), segment.channels):
                raise InputError(
                    f"layer {layer}, segment {segment.name!r}: the layout has {part.heads} heads of {part.channels} "
                    f"channels, the shard {min(heads, segment.heads)} of {segment.channels}"
                )
            where = f"layer {layer}, segment {segment.name!r}"
            reaches = {segment.name: part.extent(memory.layout.block_size, memory.num_blocks)}
            if part.groups and part.scale is not None:
                name = f"{segment.name}.scale" if part.scale.apart else segment.name
                reach = part.scales.extent(memory.layout.block_size, memory.num_blocks)
                reaches[name] = max(reach, reaches.get(name, 0))
            for name, reach in reaches.items():
                if name not in memory.tensors:
                    raise InputError(f"{where}: there is no tensor {name!r}")
                tensor = memory.tensors[name]
                room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
                if reach > room:
                    raise InputError(f"{where}: the layout reaches {reach} bytes, the tensor has {room}")


def allocate(layout: KVLayout, num_blocks: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Zeroed memory for a dense layout whose outermost axis is the block: one byte tensor per base."""
    import torch

    sizes = {name: part.block_stride * num_blocks for name, part in layout.segments.items()}
    if layout.shared:
        one = torch.zeros(max(sizes.values()), dtype=torch.uint8, device=device)
        tensors = dict.fromkeys(layout.segments, one)
    else:
        tensors = {name: torch.zeros(size, dtype=torch.uint8, device=device) for name, size in sizes.items()}
    for name, part in layout.segments.items():
        if part.scale is not None and part.scale.apart:
            size = part.scales.extent(layout.block_size, num_blocks)
            tensors[f"{name}.scale"] = torch.zeros(size, dtype=torch.uint8, device=device)
    return tensors
