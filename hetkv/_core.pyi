"""hetkv's data plane: remap, wire format, transport. Its Python face is the hetkv package."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from hetkv.layout import SegmentLayout

_Buffer: TypeAlias = object  # bytes, numpy arrays: what has the buffer protocol, which Python 3.11 has no type for

class SegmentMap:
    """Where one segment's elements live: csrc/map.h. Strides are bytes."""

    def __init__(
        self,
        *,
        base: int,
        block_stride: int,
        token_stride: int,
        head_stride: int,
        outer_stride: int,
        inner_stride: int,
        block_size: int,
        pack: int,
        dtype: int,
    ) -> None: ...
    @staticmethod
    def of(layout: SegmentLayout, block_size: int, base: int) -> SegmentMap: ...
    @staticmethod
    def canonical(base: int, tokens: int, channels: int, dtype: int) -> SegmentMap: ...

class RemapSide:
    """One side of a job: a map, the block ids where it is paged (copied), where it starts."""

    def __init__(
        self, map: SegmentMap, blocks: Sequence[int] | _Buffer | None = None, first_token: int = 0, first_head: int = 0
    ) -> None: ...

class RemapJob:
    """tokens x heads x channels elements from one side to the other: csrc/remap/remap.h."""

    def __init__(
        self,
        src: RemapSide,
        dst: RemapSide,
        *,
        tokens: int,
        heads: int,
        channels: int,
        multipliers: Sequence[float] = ...,
        wire: Literal["", "source", "destination"] = "",
        wire_offset: int = 0,
    ) -> None: ...

def remap(jobs: Sequence[RemapJob], seed: int = 0, threads: int = 1) -> tuple[int, int]:
    """Runs the jobs; returns (checksum of the wire sides, elements saturated). Releases the interpreter lock."""

def checksum(data: _Buffer, offset: int = 0, seed: int = 0) -> int:
    """Payload checksum of a contiguous buffer whose first byte is byte `offset` of the payload."""

def copy(dst: _Buffer, src: _Buffer, threads: int = 1) -> None:
    """memcpy on the threads that remap uses: the yardstick of `hetkv bench remap`."""

def available_isas() -> list[str]:
    """Instruction sets that remap can use here, narrowest first."""

def select_isa(name: str) -> None:
    """Makes remap use the named instruction set from now on."""

def isa() -> str:
    """The instruction set that remap uses."""
