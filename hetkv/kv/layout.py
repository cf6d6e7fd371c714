"""Where one rank's layer keeps element (segment, token, head, channel) inside a block: `KVLayout`.

`segment.py` has the address formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from hetkv.errors import InputError
from hetkv.kv.axes import read_axes
from hetkv.kv.dtypes import DType
from hetkv.kv.memory import Memory
from hetkv.kv.presets import PRESETS
from hetkv.kv.scale import PerScale, ScaleLayout
from hetkv.kv.segment import SegmentLayout, check_scale
from hetkv.kv.spec import LayerSpec, Segment


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Placement of all segments of a layer for one rank, `block_size` tokens a block."""

    name: str
    block_size: int
    segments: dict[str, SegmentLayout]
    shared: bool = False
    """All segments are in one allocation (one base); otherwise each has its own."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise InputError(f"layout {self.name!r}: block size {self.block_size}")
        for name, segment in self.segments.items():
            size = segment.dtype.itemsize
            strides = (segment.offset, segment.block_stride, segment.token_stride, segment.head_stride)
            if any(s < 0 or s % size for s in (*strides, segment.inner_stride, segment.outer_stride)):
                raise InputError(
                    f"layout {self.name!r}, segment {name!r}: strides must be multiples of {size} bytes, not below 0"
                )
            if segment.pack < 1 or segment.channels % segment.pack:
                raise InputError(
                    f"layout {self.name!r}, segment {name!r}: {segment.channels} channels in packs of {segment.pack}"
                )
            check_scale(f"layout {self.name!r}, segment {name!r}", segment, self.block_size)

    @property
    def dtype(self) -> DType:
        """Dtype of the first segment; the segments of a mixed record have several dtypes."""
        return next(iter(self.segments.values())).dtype

    def check_fits(self, layer: LayerSpec, heads: int, where: str) -> None:
        """Raise `InputError` unless it holds exactly `heads` heads of the layer. `where` begins the text."""
        if set(self.segments) != {segment.name for segment in layer.segments}:
            names = [segment.name for segment in layer.segments]
            raise InputError(f"{where}: the layout has segments {list(self.segments)}, the spec {names}")
        for segment in layer.segments:
            part, held = self.segments[segment.name], min(heads, segment.heads)
            if (part.heads, part.channels) != (held, segment.channels):
                raise InputError(
                    f"{where}, segment {segment.name!r}: the layout has {part.heads} heads of {part.channels} "
                    f"channels, the shard {held} of {segment.channels}"
                )

    def with_scales(self, per: PerScale = "token_head", channels_per_scale: int = 0) -> KVLayout:
        """The same with dense scales for every segment, in separate memory (see `ScaleLayout.dense`)."""
        parts = {}
        for name, part in self.segments.items():
            groups = part.channels // (channels_per_scale or part.channels)
            scale = ScaleLayout.dense(part.heads, groups, self.block_size, per, channels_per_scale)
            parts[name] = msgspec.structs.replace(part, scale=scale)
        return msgspec.structs.replace(self, segments=parts)

    @classmethod
    def preset(
        cls,
        name: str,
        layer: LayerSpec,
        heads: int,
        block_size: int,
        dtype: object,
        scale: ScaleLayout | PerScale | None = None,
    ) -> KVLayout:
        """A known layout, dense, for `heads` local heads of `layer`; scales are static, or one a token and head in
        separate memory.

        | name | memory |
        |---|---|
        | `nhd` | separate K and V, each `[block, token, head, channel]` |
        | `hnd` | separate K and V, each `[block, head, token, channel]` |
        | `nhd_interleaved`, `hnd_interleaved` | one tensor, `[block, 2, ...]` as above |
        | `packed_nhd`, `packed_hnd` | one tensor, `[block, token, head, 2d]` or `[block, head, token, 2d]` |
        | `rocm` | K `[block, head, d/x, token, x]` with x = 16 bytes; V `[block, head, d, token]` |
        | `latent` | one tensor `[block, token, latent + rope]` (MLA) |
        | `fp8_ds_mla` | one tensor, a record a token: fp8 latent, float32 scale for each 128 of it, bf16 rope (vLLM) |
        | `state` | one record a block `[block, head, bytes]` |
        """
        if name not in PRESETS:
            raise InputError(f"layout {name!r} is not known; known are {', '.join(PRESETS)}")
        dtype = DType.parse(dtype)
        segments = [segment._replace(heads=min(heads, segment.heads)) for segment in layer.segments]
        per = scale if isinstance(scale, str) else None
        parts, shared = PRESETS[name](name, segments, block_size, dtype, None if isinstance(scale, str) else scale)
        made = cls(name, block_size, parts, shared)
        return made.with_scales(per) if per is not None else made

    @classmethod
    def from_tensor(
        cls,
        tensor: Any,
        axes: str | Mapping[str, str],
        segments: Sequence[Segment] | None = None,
        name: str = "from_tensor",
        scale: ScaleLayout | Literal["inline"] | None = None,
        dtype: object = None,
    ) -> KVLayout:
        """Layout of existing memory (all that `Memory.of` reads), by its own strides.

        `axes` names the tensor's axes in order, separated by spaces: `block`, `token`, `head`, `channel`; `segment` for
        an axis that selects K or V; `outer` and `inner` for a split channel axis; `channels` for an axis that holds the
        concatenated channels of all segments (packed K and V, MLA). Without `head` the memory has one head.
        K and V in tensors of their own: give mappings from segment name to tensor (and to axes where they differ).
        `segments` names the parts of a `segment` or `channels` axis; default K and V, equal halves. With
        `scale="inline"` the last four bytes of each head's channels are its scale (vLLM's `int8_per_token_head`).
        `dtype`: of the elements, where the array cannot say (bfloat16 in `uint16`).
        """
        if not isinstance(tensor, Mapping):
            if not isinstance(axes, str):
                raise InputError("one tensor has one axes string")
            return cls(name, *read_axes(Memory.of(tensor, dtype), axes.split(), segments, scale), shared=True)
        parts: dict[str, SegmentLayout] = {}
        sizes = set()
        for part, source in tensor.items():
            if not isinstance(axes, str) and part not in axes:
                raise InputError(f"axes are given for {list(axes)}, not for segment {part!r}")
            names = (axes if isinstance(axes, str) else axes[part]).split()
            if "segment" in names or "channels" in names:
                raise InputError(f"segment {part!r} has a tensor of its own, so its axes cannot name {names}")
            block_size, read = read_axes(Memory.of(source, dtype), names, [Segment(part, 0, 0)], scale)
            parts[part] = read[part]
            sizes.add(block_size)
        if len(sizes) != 1:
            raise InputError(f"tensors {list(tensor)} have block sizes {sorted(sizes)}")
        return cls(name, sizes.pop(), parts)
