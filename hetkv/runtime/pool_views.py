"""A pool's memory as the runtime reads and writes it: `PoolViews`. By block, then by token, whatever the layout."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from hetkv.errors import InputError
from hetkv.kv.pool import KVPool
from hetkv.kv.scale import ScaleLayout
from hetkv.kv.segment import SegmentLayout


class PoolViews:
    """Indexed access to one pool. Values are cast to the pool's dtype when written (saturating for FP8, divided by the
    segment's static scale) and cast up when read. `PoolViews.of` keeps one for each pool.
    """

    def __init__(self, pool: KVPool) -> None:
        self._segments = {layer: [name for name, _, _ in pool.spec.layers[layer].segments] for layer in pool.layers}
        self._layouts = {layer: memory.layout.segments for layer, memory in pool.layers.items()}
        self._views: dict[tuple[int, str], torch.Tensor] = {}
        self._blocks: dict[tuple[int, str], _Blocks] = {}
        self._scales: dict[tuple[int, str], torch.Tensor | None] = {}
        for layer, memory in pool.layers.items():
            for name, part in memory.layout.segments.items():
                if not part.dtype.torch.is_floating_point:
                    raise InputError(
                        f"layer {layer}, segment {name!r}: the runtime does not compute with {part.dtype.value} KV"
                    )
                if part.scale is not None and not part.scale.values:
                    raise InputError(
                        f"layer {layer}, segment {name!r}: the runtime does not read scales kept in the block"
                    )
                view = pool.view(layer, name)
                # FP8 has no indexed copy on every device; moves of one-byte codes need no arithmetic.
                self._views[layer, name] = view.view(torch.uint8) if part.dtype.itemsize == 1 else view
                self._blocks[layer, name] = _Blocks(self._views[layer, name])
                self._scales[layer, name] = _scale(part.scale, view)
        self.device = next(iter(self._views.values())).device

    @classmethod
    def of(cls, pool: KVPool) -> PoolViews:
        """The views of a pool. `InputError` where it has a dtype or scales that the runtime does not compute with."""
        views = _MADE.get(pool)
        if views is None:
            views = _MADE[pool] = cls(pool)
        return views

    def write(self, layer: int, blocks: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store `[tokens, heads, channels]` each, token `t` at place `offsets[t]` of block `blocks[t]`.

        Of a `latent` layer they are the latent and its rotary key: the two segments of a layer's spec, in order.
        """
        for name, values in zip(self._segments[layer], (k, v), strict=True):
            part, view = self._layouts[layer][name], self._views[layer, name]
            view[blocks, offsets] = _encode(values, part, self._scales[layer, name]).reshape(-1, *view.shape[2:])

    def gather(self, layer: int, blocks: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What `write` stored in blocks `[..., n]`, `[..., n * block size, heads, channels]` each."""
        found = []
        for name in self._segments[layer]:
            part = self._layouts[layer][name]
            rows = (
                self._blocks[layer, name]
                .take(blocks.flatten())
                .reshape(*blocks.shape[:-1], -1, part.heads, part.channels)
            )
            found.append(_decode(rows, part, self._scales[layer, name], dtype))
        return found[0], found[1]


class _Blocks:
    """Blocks of `[blocks, tokens, ...]`, copied in the order in which they are stored: whole rows of memory, where
    nothing else is between a block's elements. An index of any other kind is several times slower on GPUs."""

    def __init__(self, view: torch.Tensor) -> None:
        stored = sorted(range(1, view.dim()), key=view.stride, reverse=True)
        self._view, ordered = view, view.permute(0, *stored)
        self._rows = ordered.flatten(1) if len(view) and ordered[0].is_contiguous() else None
        self._shape = ordered.shape[1:]
        self._back = [0, *(1 + stored.index(dim) for dim in range(1, view.dim()))]

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        """A copy of the blocks `ids`, `[n, tokens, ...]`."""
        if self._rows is None:
            return self._view[ids]
        return self._rows.index_select(0, ids).view(-1, *self._shape).permute(self._back)


_MADE: WeakKeyDictionary[KVPool, PoolViews] = WeakKeyDictionary()
"""By pool, which the views do not hold."""


def _encode(values: torch.Tensor, part: SegmentLayout, scale: torch.Tensor | None) -> torch.Tensor:
    target = part.dtype.torch
    if scale is not None:
        values = values.float() / scale
    if target.itemsize == 1:
        limit = torch.finfo(target).max
        return values.float().clamp(-limit, limit).to(target).view(torch.uint8)
    return values.to(target)


def _decode(codes: torch.Tensor, part: SegmentLayout, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    values = codes.view(part.dtype.torch) if part.dtype.itemsize == 1 else codes
    if scale is not None:
        return (values.float() * scale).to(dtype)
    return values.to(dtype)


def _scale(scale: ScaleLayout | None, like: torch.Tensor) -> torch.Tensor | None:
    """Static scale as `[1 or heads, 1]`, to go with `[..., heads, channels]`."""
    if scale is None:
        return None
    return torch.tensor(scale.values, dtype=torch.float32, device=like.device)[:, None]
