"""Where one rank's layer keeps element (segment, token, head, channel) inside a block: `KVLayout`.

The address of an element, in bytes from the base of its segment's memory, is

    offset + block * block_stride + (token % block_size) * token_stride + head * head_stride
           + (channel // pack) * outer_stride + (channel % pack) * inner_stride

where `block = block_table[token // block_size]`. `csrc/map.h` is the same formula in C++.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.scale import FLOAT32_BYTES, PerScale, check_scale
from hetkv.kv.scale import ScaleLayout as ScaleLayout
from hetkv.kv.spec import LayerSpec, Segment

if TYPE_CHECKING:
    import torch


class SegmentLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Placement of one segment for one rank's heads. Offsets and strides are in bytes; `pack` is in channels."""

    dtype: DType
    heads: int
    channels: int
    offset: int
    block_stride: int
    token_stride: int
    head_stride: int
    inner_stride: int
    pack: int
    """Channels of one inner run; equal to `channels` where the channel axis is not split."""
    outer_stride: int = 0
    scale: ScaleLayout | None = None

    @property
    def groups(self) -> int:
        """Scales in memory of one token and head; 0 where there are none."""
        if self.scale is None or not self.scale.in_memory:
            return 0
        return self.channels // (self.scale.channels_per_scale or self.channels)

    @property
    def scales(self) -> SegmentLayout:
        """Where the scales in memory lie, as a segment whose channels are groups. Only where there are some."""
        scale = self.scale
        assert scale is not None
        return SegmentLayout(
            DType.FLOAT32,
            self.heads,
            self.groups,
            scale.offset,
            scale.block_stride,
            scale.token_stride,
            scale.head_stride,
            inner_stride=scale.group_stride or FLOAT32_BYTES,
            pack=self.groups,
        )

    @property
    def shares_scales(self) -> bool:
        """Several heads share the scales of a token."""
        return self.groups > 0 and self.heads > 1 and self.scale is not None and self.scale.head_stride == 0

    def block_span(self, block_size: int) -> int:
        """Bytes from `offset` of a block to behind its last element."""
        return (
            (block_size - 1) * self.token_stride
            + (self.heads - 1) * self.head_stride
            + (self.channels // self.pack - 1) * self.outer_stride
            + (self.pack - 1) * self.inner_stride
            + self.dtype.itemsize
        )

    def extent(self, block_size: int, num_blocks: int) -> int:
        """Bytes of memory, from the base, that `num_blocks` blocks reach into."""
        return self.offset + (num_blocks - 1) * self.block_stride + self.block_span(block_size)

    def view(self, memory: torch.Tensor, block_size: int, num_blocks: int) -> torch.Tensor:
        """Strided view `[num_blocks, block_size, heads, channels]` of `memory`, whose first byte is the base.

        Where the channel axis is packed the view is `[num_blocks, block_size, heads, channels // pack, pack]`.
        """
        import torch

        size = self.dtype.itemsize
        shape = [num_blocks, block_size, self.heads]
        strides = [self.block_stride, self.token_stride, self.head_stride]
        if self.pack == self.channels:
            shape, strides = [*shape, self.channels], [*strides, self.inner_stride]
        else:
            shape, strides = (
                [*shape, self.channels // self.pack, self.pack],
                [*strides, self.outer_stride, self.inner_stride],
            )
        elements = torch.empty(0, dtype=self.dtype.torch, device=memory.device).set_(memory.untyped_storage())
        first = memory.storage_offset() * memory.element_size() + self.offset
        return elements.as_strided(shape, [stride // size for stride in strides], first // size)


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Placement of all segments of a layer for one rank, `block_size` tokens a block."""

    name: str
    block_size: int
    segments: dict[str, SegmentLayout]
    shared: bool = False
    """All segments lie in one allocation (one base); otherwise each has its own."""

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
        """Dtype of the first segment; layouts of mixed records have others beside it."""
        return next(iter(self.segments.values())).dtype

    def with_scales(self, per: PerScale = "token_head", channels_per_scale: int = 0) -> KVLayout:
        """The same with dense scales in memory of their own beside every segment (see `ScaleLayout.dense`)."""
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
        dtype: DType | str,
        scale: ScaleLayout | PerScale | None = None,
    ) -> KVLayout:
        """A known layout, dense, for `heads` local heads of `layer`; scales are static, or apart, one a token and head.

        | name | memory |
        |---|---|
        | `nhd` | K and V apart, each `[block, token, head, channel]` |
        | `hnd` | K and V apart, each `[block, head, token, channel]` |
        | `nhd_interleaved`, `hnd_interleaved` | one tensor, `[block, 2, ...]` as above |
        | `packed_nhd`, `packed_hnd` | one tensor, `[block, token, head, 2d]` or `[block, head, token, 2d]` |
        | `rocm` | K `[block, head, d/x, token, x]` with x = 16 bytes; V `[block, head, d, token]` |
        | `latent` | one tensor `[block, token, latent + rope]` (MLA) |
        | `fp8_ds_mla` | one tensor, a record a token: fp8 latent, float32 scale for each 128 of it, bf16 rope (vLLM) |
        | `state` | one record a block `[block, head, bytes]` |
        """
        from hetkv.kv.presets import PRESETS

        if name not in PRESETS:
            raise InputError(f"layout {name!r} is not known; known are {', '.join(PRESETS)}")
        dtype = DType.parse(dtype) if isinstance(dtype, str) else dtype
        segments = [segment._replace(heads=min(heads, segment.heads)) for segment in layer.segments]
        if isinstance(scale, str):
            return PRESETS[name](name, segments, block_size, dtype, None).with_scales(scale)
        return PRESETS[name](name, segments, block_size, dtype, scale)

    @classmethod
    def from_tensor(
        cls,
        tensor: torch.Tensor | Mapping[str, torch.Tensor],
        axes: str | Mapping[str, str],
        segments: Sequence[Segment] | None = None,
        name: str = "from_tensor",
        scale: ScaleLayout | Literal["inline"] | None = None,
    ) -> KVLayout:
        """Layout of existing memory, read from the tensor's own strides.

        `axes` names the tensor's axes in order, separated by spaces: `block`, `token`, `head`, `channel`; `segment` for
        an axis that selects K or V; `outer` and `inner` for a split channel axis; `channels` for an axis that holds the
        channels of all segments one behind the other (packed K and V, MLA). Without `head` the memory has one head.
        K and V in tensors of their own: give mappings from segment name to tensor (and to axes where they differ).
        `segments` names the parts of a `segment` or `channels` axis; default K and V, equal halves. With
        `scale="inline"` the last four bytes of each head's channels are its scale (vLLM's `int8_per_token_head`).
        """
        if not isinstance(tensor, Mapping):
            if not isinstance(axes, str):
                raise InputError("one tensor has one axes string")
            return cls(name, *_read_axes(tensor, axes.split(), segments, scale), shared=True)
        parts: dict[str, SegmentLayout] = {}
        sizes = set()
        for part, memory in tensor.items():
            names = (axes if isinstance(axes, str) else axes[part]).split()
            if "segment" in names or "channels" in names:
                raise InputError(f"segment {part!r} has a tensor of its own, so its axes cannot name {names}")
            block_size, read = _read_axes(memory, names, [Segment(part, 0, 0)], scale)
            parts[part] = read[part]
            sizes.add(block_size)
        if len(sizes) != 1:
            raise InputError(f"tensors {list(tensor)} have block sizes {sorted(sizes)}")
        return cls(name, sizes.pop(), parts)


AXES = ("segment", "block", "token", "head", "channel", "outer", "inner", "channels")


def _read_axes(
    tensor: torch.Tensor,
    names: list[str],
    segments: Sequence[Segment] | None,
    scale: ScaleLayout | Literal["inline"] | None,
) -> tuple[int, dict[str, SegmentLayout]]:
    """Block size and segment layouts of one tensor."""
    unknown = [axis for axis in names if axis not in AXES]
    if unknown or len(set(names)) != len(names) or len(names) != tensor.dim():
        raise InputError(f"axes {' '.join(names)!r} do not name the {tensor.dim()} axes of shape {tuple(tensor.shape)}")
    dtype = DType.parse(tensor.dtype)
    shape = dict(zip(names, tensor.shape, strict=True))
    stride = {axis: step * dtype.itemsize for axis, step in zip(names, tensor.stride(), strict=True)}
    if (
        "block" not in shape
        or not ({"channel", "inner", "channels"} & set(names))
        or ("outer" in shape) != ("inner" in shape)
    ):
        raise InputError(f"axes {' '.join(names)!r} need block, and channel or channels or both outer and inner")
    heads = shape.get("head", 1)
    parts = list(segments) if segments is not None else [Segment("k", heads, 0), Segment("v", heads, 0)]
    whole = shape.get("channel", shape.get("channels", shape.get("outer", 1) * shape.get("inner", 1)))
    tail = FLOAT32_BYTES // dtype.itemsize if scale == "inline" else 0
    if "channels" in shape:
        widths = [part.channels + tail if part.channels else whole // len(parts) for part in parts]
        step = stride["channels"]
        offsets = [sum(widths[:i]) * step for i in range(len(parts))]
        if sum(widths) != whole:
            raise InputError(f"the channels axis holds {whole} channels, its segments {widths}")
    else:
        widths = [whole] * len(parts)
        offsets = [i * stride.get("segment", 0) for i in range(len(parts))]
        if len(parts) != shape.get("segment", 1):
            raise InputError(
                f"the segment axis has size {shape.get('segment', 1)}, but there are {len(parts)} segments"
            )
    inner = stride.get("inner", stride.get("channel", stride.get("channels", dtype.itemsize)))
    if tail and ("inner" in shape or inner != dtype.itemsize or min(widths) <= tail):
        raise InputError(f"axes {' '.join(names)!r}: inline scales lie behind channels that lie together")

    def scale_of(offset: int, width: int) -> ScaleLayout | None:
        if not isinstance(scale, str):
            return scale
        place = offset + width * dtype.itemsize
        return ScaleLayout((), place, stride["block"], stride.get("token", 0), stride.get("head", 0))

    widths = [width - tail for width in widths]
    return shape.get("token", 1), {
        part.name: SegmentLayout(
            dtype=dtype,
            heads=heads,
            channels=width,
            offset=offset,
            block_stride=stride["block"],
            token_stride=stride.get("token", 0),
            head_stride=stride.get("head", 0),
            inner_stride=inner,
            pack=shape.get("inner", width),
            outer_stride=stride.get("outer", 0),
            scale=scale_of(offset, width),
        )
        for part, width, offset in zip(parts, widths, offsets, strict=True)
    }
