"""Memory of one layer of a pool: `LayerMemory`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hetkv.kv.layout import KVLayout


class LayerMemory(NamedTuple):
    """A layout, its block count, and for each segment the array whose first byte is the base.

    Arrays are all that `Memory.of` reads. Separate scales have an array of their own, `<segment>.scale`.
    """

    layout: KVLayout
    num_blocks: int
    tensors: Mapping[str, Any]

    def reaches(self) -> Iterator[tuple[str, int]]:
        """(name of an array, bytes from its first one that a segment or its scales reach into)."""
        size = self.layout.block_size
        for name, part in self.layout.segments.items():
            yield name, part.extent(size, self.num_blocks)
            if part.scale_groups and part.scale is not None:
                yield f"{name}.scale" if part.scale.separate else name, part.scales.extent(size, self.num_blocks)
