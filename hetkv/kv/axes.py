"""From the names of an array's axes to the layout of the segments in it: `read_axes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hetkv.errors import InputError
from hetkv.kv.memory import Memory
from hetkv.kv.scale import FLOAT32_BYTES, ScaleLayout
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.spec import Segment

AXES = ("segment", "block", "token", "head", "channel", "outer", "inner", "channels")


def read_axes(
    memory: Memory,
    names: list[str],
    segments: Sequence[Segment] | None,
    scale: ScaleLayout | Literal["inline"] | None,
) -> tuple[int, dict[str, SegmentLayout]]:
    """Block size and segment layouts of one array whose axes have these names. Raises `InputError`."""
    unknown = [axis for axis in names if axis not in AXES]
    if unknown:
        raise InputError(f"axes {' '.join(names)!r}: {unknown[0]!r} is no axis; known are {', '.join(AXES)}")
    if len(set(names)) != len(names) or len(names) != len(memory.shape):
        raise InputError(f"axes {' '.join(names)!r} do not name the {len(memory.shape)} axes of shape {memory.shape}")
    dtype = memory.dtype
    shape = dict(zip(names, memory.shape, strict=True))
    stride = dict(zip(names, memory.strides, strict=True))
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
        raise InputError(f"axes {' '.join(names)!r}: inline scales must follow contiguous channels")

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
