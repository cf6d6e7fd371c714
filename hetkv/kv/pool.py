"""One rank's paged KV memory: `KVPool`. It owns nothing that it did not allocate, and keeps alive what it was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, Literal, NamedTuple

from hetkv.errors import InputError
from hetkv.kv.allocate import allocate
from hetkv.kv.dtypes import DType
from hetkv.kv.existing import existing_layers
from hetkv.kv.layer import LayerMemory
from hetkv.kv.layout import KVLayout
from hetkv.kv.memory import Memory, check_mapped, probe
from hetkv.kv.overlap import Piece, overlapping
from hetkv.kv.scale import PerScale, ScaleLayout
from hetkv.kv.spec import KVSpec, Shard
from hetkv.kv.view import strided_view


class Paging(NamedTuple):
    """Of one cache group: tokens of a block, and blocks."""

    block_size: int
    num_blocks: int


class KVPool:
    """Paged KV memory of one rank: for every global layer of its shard a layout, a block count and base addresses.

    Layers may differ in layout, block size and block count. Memory must stay allocated while a `Sender` or `Receiver`
    uses the pool; the pool holds references to what it was given. All memory is on one device.
    """

    def __init__(self, spec: KVSpec, shard: Shard, layers: Mapping[int, LayerMemory]) -> None:
        self.spec = spec
        self.shard = shard
        self.layers = dict(layers)
        owned = spec.owned(shard.layers)
        if sorted(self.layers) != owned:
            raise InputError(f"the pool has layers {sorted(self.layers)}, its shard layers {owned}")
        every = {id(tensor): tensor for at in self.layers.values() for tensor in at.tensors.values()}
        read = {number: Memory.bytes_of(tensor) for number, tensor in every.items()}
        self._memory = {
            (layer, name): read[id(tensor)] for layer, at in self.layers.items() for name, tensor in at.tensors.items()
        }
        self._where = probe([*every.values()])
        self._known, self._looked = self._where(), 0.0
        devices = sorted({memory.device for memory in self._memory.values()})
        if len(devices) > 1:
            raise InputError(f"a pool is on one device, not on {', '.join(devices)}")
        self.device = devices[0] if devices else "cpu"
        """`cpu`, or `cuda` or `hip` with an index where it is known, such as `cuda:0`."""
        self.cache_groups: dict[int, Paging] = {}
        """Of each cache group that has layers here."""
        for layer, at in self.layers.items():
            self._check(layer, at)
            group, paging = spec.group_of(layer), Paging(at.layout.block_size, at.num_blocks)
            if self.cache_groups.setdefault(group, paging) != paging:
                raise InputError(
                    f"layer {layer} has {paging[1]} blocks of {paging[0]} tokens, its cache group {group} has "
                    f"{self.cache_groups[group][1]} of {self.cache_groups[group][0]}"
                )

    @classmethod
    def allocate(
        cls,
        spec: KVSpec,
        num_blocks: int | Sequence[int],
        *,
        layout: str = "nhd",
        block_size: int | Sequence[int] = 16,
        dtype: object = DType.BFLOAT16,
        shard: Shard | None = None,
        scale: ScaleLayout | PerScale | None = None,
        latent_layout: str = "latent",
        device: Any = "cpu",
        framework: Literal["torch", "numpy"] | None = None,
    ) -> KVPool:
        """A zeroed pool of a preset layout. `num_blocks` and `block_size` may be given per cache group.

        `scale`: static scales, or `"token_head"` or `"token"` for scales in memory of their own. `framework` allocates;
        by default PyTorch where it is installed, otherwise NumPy, which has host memory only.
        """
        shard = shard or Shard.whole(spec)
        blocks, sizes = spec.per_group("num_blocks", num_blocks), spec.per_group("block_size", block_size)
        layers = {}
        for index in spec.owned(shard.layers):
            layer, heads = spec.layers[index], shard.heads[index].size
            if layer.kind == "state":
                made = KVLayout.preset("state", layer, heads, 1, DType.UINT8)
            else:
                name = layout if layer.kind == "kv" else latent_layout
                own = None if name == "fp8_ds_mla" else scale
                made = KVLayout.preset(name, layer, heads, sizes[layer.group], dtype, own)
            tensors = allocate(made, blocks[layer.group], device, framework)
            layers[index] = LayerMemory(made, blocks[layer.group], tensors)
        return cls(spec, shard, layers)

    @classmethod
    def from_tensors(
        cls,
        spec: KVSpec,
        tensors: Any,
        axes: Any,
        *,
        shard: Shard | None = None,
        dtype: object = None,
        scale: ScaleLayout | Literal["inline"] | None = None,
        scales: Mapping[int, Mapping[str, Any]] | None = None,
        scale_axes: str = "block token head",
    ) -> KVPool:
        """A pool over an engine's own memory: PyTorch, NumPy (also memory-mapped), DLPack, `__cuda_array_interface__`,
        or `Memory` for raw pointers.

        `tensors` is a list with one entry per layer that the shard holds, or a mapping from global layer index; an
        entry is one array, or a mapping from segment name (`k`, `v`) to its array. One array for all layers (or one
        per segment) has an axis `layer`. `axes` names the axes in order, as `KVLayout.from_tensor` says; where layers
        or segments differ, a mapping from layer index or segment name. `dtype`: what the elements are where the array
        cannot say (bfloat16 in `uint16`). Memory of `state` layers is `uint8`.

        `scales`: per layer and segment a float32 array with the axes `scale_axes` (see `ScaleLayout.from_tensor`).
        Raises `InputError`.
        """
        shard = shard or Shard.whole(spec)
        found = existing_layers(spec, shard, tensors, axes, dtype, scale, scales or {}, scale_axes)
        return cls(spec, shard, found)

    def view(self, layer: int, segment: str) -> Any:
        """Strided view `[num_blocks, block_size, heads, channels]` of one segment (see `strided_view`)."""
        at = self.layers[layer]
        return strided_view(at.layout.segments[segment], at.tensors[segment], at.layout.block_size, at.num_blocks)

    def scale_view(self, layer: int, segment: str) -> Any:
        """Strided float32 view `[num_blocks, block_size, heads, groups]` of a segment's scales in memory."""
        at, name = self.layers[layer], self._scale_memory(layer, segment)
        return strided_view(at.layout.segments[segment].scales, at.tensors[name], at.layout.block_size, at.num_blocks)

    def base(self, layer: int, segment: str) -> int:
        """Address that the segment's offsets count from."""
        return self._memory[layer, segment].address

    def scale_base(self, layer: int, segment: str) -> int:
        """Address that the offsets of the segment's scales in memory count from."""
        return self._memory[layer, self._scale_memory(layer, segment)].address

    def addresses(self) -> dict[tuple[int, str], int]:
        """(layer, segment) to the address of its array, each array once."""
        return {place: address for address, place in {at.address: place for place, at in self._memory.items()}.items()}

    def check_alive(self, within_s: float = 0.0) -> None:
        """Raise `InputError` where an array's memory was freed, resized or replaced since the pool was made.

        Nothing is looked at where that was done `within_s` seconds ago or less.
        """
        now = monotonic()
        if within_s and now - self._looked <= within_s:
            return
        self._looked = now
        if self._where() != self._known:
            raise InputError("the pool's memory was freed or replaced while it was in use")

    def check_source(self) -> None:
        """Raise `InputError` where host memory of the pool cannot be read."""
        self._check_mapped(write=False)

    def check_destination(self) -> None:
        """Raise `InputError` where the pool cannot be received into.

        It must be writable, and within a cache group each element must have bytes of its own. Groups may share memory,
        as engines that page different layers out of one buffer do; they must not use the same bytes at a time.
        """
        for (layer, name), memory in self._memory.items():
            if memory.readonly:
                raise InputError(f"layer {layer}, segment {name!r}: read-only memory cannot be received into")
        self._check_mapped(write=True)
        for group in self.cache_groups:
            both = overlapping(self._pieces(group))
            if both is not None and both[0] is both[1]:
                raise InputError(f"{both[0].name}: its elements overlap each other, or have strides that do not nest")
            if both is not None:
                raise InputError(f"{both[0].name} and {both[1].name} overlap: they would overwrite each other")

    def block_size_of(self, group: int) -> int:
        """Tokens of one block of a cache group; 0 where none of its layers is here."""
        return self.cache_groups[group].block_size if group in self.cache_groups else 0

    def check_blocks(self, group: int, block_ids: Sequence[int], start: int, stop: int) -> None:
        """Raise `InputError` unless `block_ids` hold tokens `[start, stop)` of a cache group in distinct blocks.

        Ids of blocks before `start` are not looked at: an engine may have freed them.
        """
        if group not in self.cache_groups or start >= stop:
            return
        block_size, num_blocks = self.cache_groups[group]
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

    def __repr__(self) -> str:
        start, stop = self.shard.layers
        kinds = {f"{at.layout.name} {at.layout.dtype.value}" for at in self.layers.values()}
        paging = ", ".join(f"{blocks} blocks of {size}" for size, blocks in self.cache_groups.values())
        return f"KVPool(layers [{start}, {stop}), {paging} tokens, {' and '.join(sorted(kinds))}, {self.device})"

    def _scale_memory(self, layer: int, segment: str) -> str:
        """Name of the memory that holds a segment's scales."""
        scale = self.layers[layer].layout.segments[segment].scale
        if scale is None or not scale.in_memory:
            raise InputError(f"layer {layer}, segment {segment!r} has no scales in memory")
        return f"{segment}.scale" if scale.separate else segment

    def _check_mapped(self, write: bool) -> None:
        if self.device == "cpu":
            reaches = {(layer, name): size for layer in self.layers for name, size in self.layers[layer].reaches()}
            parts = [
                (f"layer {layer}, segment {name!r}", self._memory[layer, name].address, size)
                for (layer, name), size in reaches.items()
            ]
            check_mapped(parts, write)

    def _pieces(self, group: int) -> Iterator[Piece]:
        """Every segment of a cache group, and its scales in memory, as strided memory."""
        for layer, at in self.layers.items():
            if self.spec.group_of(layer) != group:
                continue
            size, blocks = at.layout.block_size, at.num_blocks
            for name, part in at.layout.segments.items():
                where = f"layer {layer}, segment {name!r}"
                base = self.base(layer, name) + part.offset
                yield Piece.of(where, base, part.axes(size, blocks), part.dtype.itemsize)
                if part.scale_groups:
                    scales = part.scales
                    axes = [axis for axis in scales.axes(size, blocks) if axis != (part.heads, 0)]  # heads share them
                    base = self.scale_base(layer, name) + scales.offset
                    yield Piece.of(f"{where}, scales", base, axes, scales.dtype.itemsize)

    def _check(self, layer: int, at: LayerMemory) -> None:
        """The layout must hold the shard's heads and fit inside the memory."""
        at.layout.check_fits(self.spec.layers[layer], self.shard.heads[layer].size, f"layer {layer}")
        for name, reach in at.reaches():
            if (layer, name) not in self._memory:
                raise InputError(f"layer {layer}: there is no tensor {name!r}")
            room = self._memory[layer, name].room
            if reach > room:
                raise InputError(f"layer {layer}, segment {name!r}: the layout reaches {reach} bytes, there are {room}")
