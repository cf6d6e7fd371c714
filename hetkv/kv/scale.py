"""Scales of a quantised segment: `ScaleLayout`. An element is its code times its scale."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from hetkv.errors import InputError
from hetkv.kv.dtypes import DType
from hetkv.kv.memory import Memory

FLOAT32_BYTES = 4
SCALED = (
    DType.FLOAT8_E4M3FN,
    DType.FLOAT8_E4M3FNUZ,
    DType.FLOAT8_E5M2,
    DType.FLOAT8_E5M2FNUZ,
    DType.INT8,
)
"""Dtypes whose scales may be in memory."""
PerScale = Literal["token_head", "token"]
"""What has a scale of its own: each token and head, or each token (its heads share one)."""


class ScaleLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Scales of a segment, all above 0: static `values`, or float32 in memory, one a token, head and group of channels.

    Those in memory are at `offset + block * block_stride + (token % block_size) * token_stride + head * head_stride +
    group * group_stride` bytes from the base of the segment's memory, or of separate memory (`separate`).
    """

    values: tuple[float, ...] = ()
    """Static: one value for the segment, or one per local head. Empty: the scales are in memory."""
    offset: int = 0
    block_stride: int = 0
    token_stride: int = 0
    head_stride: int = 0
    """0 with several heads: they share the token's scale."""
    group_stride: int = 0
    channels_per_scale: int = 0
    """Channels that share a scale; 0: all channels of the head."""
    separate: bool = msgspec.field(default=False, name="apart")
    """In a separate tensor: `<segment>.scale` of the pool."""

    def __post_init__(self) -> None:
        if any(not (0.0 < value < float("inf")) for value in self.values):
            raise InputError(f"scales must be positive and finite, not {self.values}")
        strides = (self.offset, self.block_stride, self.token_stride, self.head_stride, self.group_stride)
        if any(stride < 0 or stride % FLOAT32_BYTES for stride in strides):
            raise InputError(f"strides of scales must be multiples of {FLOAT32_BYTES} bytes, not below 0: {strides}")
        if self.channels_per_scale < 0:
            raise InputError(f"{self.channels_per_scale} channels per scale")
        if self.values and (any(strides) or self.channels_per_scale or self.separate):
            raise InputError("static scales have no place in memory")

    @property
    def in_memory(self) -> bool:
        return not self.values

    @classmethod
    def dense(
        cls, heads: int, groups: int, block_size: int, per: PerScale = "token_head", channels: int = 0
    ) -> ScaleLayout:
        """`[block, token, head, group]`, or `[block, token, group]` for `per="token"`, in memory of its own.

        `channels` is that of a group, 0 where there is one.
        """
        head = groups * FLOAT32_BYTES
        token = head * (heads if per == "token_head" else 1)
        return cls(
            block_stride=block_size * token,
            token_stride=token,
            head_stride=head if per == "token_head" else 0,
            group_stride=head // groups if groups > 1 else 0,
            channels_per_scale=channels,
            separate=True,
        )

    @classmethod
    def from_tensor(cls, tensor: Any, axes: str, channels_per_scale: int = 0) -> ScaleLayout:
        """Scales in float32 memory of their own. `axes` names its axes in order: `block token`, `head`, `group`."""
        memory = Memory.of(tensor)
        names = axes.split()
        known, rank = {"block", "token", "head", "group"}, len(memory.shape)
        if len(names) != rank or len(set(names)) != rank or not {"block", "token"} <= set(names) <= known:
            raise InputError(f"axes {axes!r} do not name the {rank} axes of scales {memory.shape}")
        if memory.dtype is not DType.FLOAT32:
            raise InputError(f"scales are float32, not {memory.dtype.value}")
        step = dict(zip(names, memory.strides, strict=True))
        return cls(
            block_stride=step["block"],
            token_stride=step["token"],
            head_stride=step.get("head", 0),
            group_stride=step.get("group", 0),
            channels_per_scale=channels_per_scale,
            separate=True,
        )
