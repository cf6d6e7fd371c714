"""Memory with guards around it, and the two ways to run one move: the kernel and the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from hetkv.core import core as _core
from hetkv.kv.dtypes import DType
from hetkv.kv.segment import SegmentLayout
from hetkv.reference import remap as reference
from hetkv.reference.checksum import payload_checksum

GUARD = 96
WIRE_OFFSET = 16  # of the payload in its frame, which the checksum counts


@dataclass(frozen=True)
class Side:
    """A pool (with a layout) or a wire payload (without), in memory of random bytes that is longer than it needs."""

    memory: torch.Tensor
    dtype: DType
    layout: SegmentLayout | None = None
    block_size: int = 0
    num_blocks: int = 0
    block_ids: Sequence[int] = ()
    first_token: int = 0
    first_head: int = 0

    @property
    def body(self) -> torch.Tensor:
        return self.memory[GUARD:]

    def copy(self) -> Side:
        return replace(self, memory=self.memory.clone())

    def oracle(self) -> reference.Paged | reference.Canonical:
        if self.layout is None:
            return reference.Canonical(self.body, self.dtype)
        return reference.Paged(
            self.body, self.layout, self.block_size, self.num_blocks, self.block_ids, self.first_token, self.first_head
        )

    def kernel(self, tokens: int, channels: int, per_scale: int = 0) -> _core.RemapSide:
        """The same for the kernels; `per_scale` says nothing, as the side has no scales."""
        if self.layout is None:
            place = _core.SegmentMap.canonical(self.body.data_ptr(), tokens, channels, self.dtype.code)
            return _core.RemapSide(place, channels_per_scale=per_scale)
        table = torch.tensor(list(self.block_ids), dtype=torch.int32)
        segment = _core.SegmentMap.of(self.layout, self.block_size, self.body.data_ptr())
        return _core.RemapSide(segment, table, self.first_token, self.first_head, channels_per_scale=per_scale)


def random_bytes(count: int, seed: int) -> torch.Tensor:
    """`count` bytes between two guards, all random: every code of every format, NaN and infinity too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count + 2 * GUARD,), dtype=torch.uint8, generator=generator)


def pool(
    layout: SegmentLayout,
    block_size: int,
    num_blocks: int,
    block_ids: Sequence[int],
    seed: int,
    first_token: int = 0,
    first_head: int = 0,
) -> Side:
    memory = random_bytes(layout.extent(block_size, num_blocks), seed)
    return Side(memory, layout.dtype, layout, block_size, num_blocks, block_ids, first_token, first_head)


def wire(dtype: DType, tokens: int, heads: int, channels: int, seed: int) -> Side:
    return Side(random_bytes(tokens * heads * channels * dtype.itemsize, seed), dtype)


def wire_side(source: Side, destination: Side) -> Literal["", "source", "destination"]:
    """Which side is a wire payload, whose bytes are summed."""
    return "source" if source.layout is None else "destination" if destination.layout is None else ""


def expected(
    source: Side,
    destination: Side,
    tokens: int,
    heads: int,
    channels: int,
    multipliers: Sequence[float] | None,
    seed: int,
) -> tuple[Side, int, int]:
    """The oracle's destination, checksum and count of saturations of one move."""
    want = destination.copy()
    saturated = reference.remap(source.oracle(), want.oracle(), tokens, heads, channels, multipliers)
    side = wire_side(source, destination)
    if not side:
        return want, 0, saturated
    payload = source if side == "source" else want
    count = tokens * heads * channels * payload.dtype.itemsize
    return want, payload_checksum(payload.body[:count].numpy().tobytes(), seed, WIRE_OFFSET), saturated


def move(
    source: Side, destination: Side, tokens: int, heads: int, channels: int, multipliers: Sequence[float] | None
) -> _core.RemapJob:
    """The same move as a kernel's job."""
    side = wire_side(source, destination)
    return _core.RemapJob(
        source.kernel(tokens, channels),
        destination.kernel(tokens, channels),
        tokens=tokens,
        heads=heads,
        channels=channels,
        multipliers=list(multipliers or ()),
        wire=side,
        wire_offset=WIRE_OFFSET if side else 0,
    )


def check(
    source: Side,
    destination: Side,
    tokens: int,
    heads: int,
    channels: int,
    *,
    multipliers: Sequence[float] | None = None,
    threads: int = 1,
    seed: int = 0,
    isas: Sequence[str] | None = None,
) -> int:
    """Runs the move with every instruction set and compares all memory, sums and counts with the oracle's."""
    want, checksum, saturated = expected(source, destination, tokens, heads, channels, multipliers, seed)
    untouched = source.memory.clone()
    for isa in isas or _core.available_isas():
        got = destination.copy()
        job = move(source, got, tokens, heads, channels, multipliers)
        _core.select_isa(isa)
        assert _core.remap([job], seed, threads) == (checksum, saturated), isa
        assert torch.equal(got.memory, want.memory), isa
        assert torch.equal(source.memory, untouched), isa
    return saturated
