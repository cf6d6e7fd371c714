"""The definition of remap in plain PyTorch: what every kernel is compared with, byte for byte. Slow on purpose.

A side is memory in which element (token, head, channel) of one segment has a place; `remap` reads `tokens x heads x
channels` elements from one side, converts them, and writes them to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from hetkv.kv.dtypes import DType
from hetkv.kv.segment import SegmentLayout
from hetkv.kv.view import strided_view

if TYPE_CHECKING:
    import torch


class Paged(NamedTuple):
    """A sequence in paged memory. `memory` starts at the base; `block_ids` are in token order."""

    memory: torch.Tensor
    layout: SegmentLayout
    block_size: int
    num_blocks: int
    block_ids: Sequence[int]
    first_token: int = 0
    first_head: int = 0

    def read(self, tokens: int, heads: int, channels: int) -> torch.Tensor:
        """Elements `[heads, tokens, channels]`; `channels` are all that the layout has."""
        view, place = self._place(tokens, heads)
        return view[place].reshape(tokens, heads, channels).transpose(0, 1)

    def write(self, values: torch.Tensor) -> None:
        """Stores `[heads, tokens, channels]`."""
        heads, tokens, _ = values.shape
        view, place = self._place(tokens, heads)
        view[place] = values.transpose(0, 1).reshape(tokens, heads, *view.shape[3:])

    def _place(self, tokens: int, heads: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The view `[block, token, head, channel...]` as raw bits, and the index of the sequence's tokens in it."""
        import torch

        token = torch.arange(self.first_token, self.first_token + tokens)
        block = torch.tensor(list(self.block_ids), dtype=torch.int64)[token // self.block_size]
        view = bits(strided_view(self.layout, self.memory, self.block_size, self.num_blocks))
        head = torch.arange(self.first_head, self.first_head + heads)
        if self.layout.head_stride == 0:  # scales that the heads share
            view, head = view[:, :, :1], torch.zeros(heads, dtype=torch.int64)
        return view, (block[:, None], (token % self.block_size)[:, None], head[None, :])


class Canonical(NamedTuple):
    """The wire's layout `[head][token][channel]`, dense from the first byte of `memory` (uint8)."""

    memory: torch.Tensor
    dtype: DType

    def read(self, tokens: int, heads: int, channels: int) -> torch.Tensor:
        """Elements `[heads, tokens, channels]`."""
        size = tokens * heads * channels * self.dtype.itemsize
        return bits(self.memory[:size].view(self.dtype.torch)).reshape(heads, tokens, channels)

    def write(self, values: torch.Tensor) -> None:
        """Stores `[heads, tokens, channels]`."""
        import torch

        flat = values.contiguous().view(torch.uint8).flatten()
        self.memory[: flat.numel()] = flat


def remap(
    source: Paged | Canonical,
    destination: Paged | Canonical,
    tokens: int,
    heads: int,
    channels: int,
    multipliers: Sequence[float] | None = None,
) -> int:
    """Moves `tokens x heads x channels` elements; returns how many saturated.

    destination = convert(source * multiplier of the head). Equal dtypes without multipliers move bit for bit.
    """
    import torch

    from_dtype, to_dtype = dtype_of(source), dtype_of(destination)
    codes = source.read(tokens, heads, channels)
    saturated = 0
    if from_dtype != to_dtype or multipliers is not None:
        values = codes.contiguous().view(from_dtype.torch).to(torch.float32)
        if multipliers is not None:
            values = values * torch.tensor(list(multipliers), dtype=torch.float32)[:, None, None]
        codes, saturated = encode(values, to_dtype)
    destination.write(codes)
    return saturated


def encode(values: torch.Tensor, dtype: DType) -> tuple[torch.Tensor, int]:
    """Codes (as integers of the dtype's width) of float32 `values`, and how many of them saturated.

    Rounds to nearest even as if the exponent had no upper bound. A magnitude that is then above the largest finite
    value, infinity included, becomes that value and counts. NaN becomes the canonical NaN, regardless of its sign and
    payload. The fnuz formats have no negative zero: what rounds to zero is +0.
    """
    import torch

    if dtype is DType.INT8:
        return _encode_int8(values)
    largest = torch.finfo(dtype.torch).max
    nan = values.isnan()
    saturated = int((~nan & (values.abs() > _last_fitting(dtype))).sum())
    # Values between the largest value and the last one that rounds to it give the largest value by either rule.
    codes = bits(values.clamp(-largest, largest).to(dtype.torch))
    canonical = torch.tensor(CANONICAL_NAN[dtype], dtype=torch.int64).to(codes.dtype)
    return torch.where(nan, canonical, codes), saturated


def _encode_int8(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """-127 to 127. NaN becomes 0, and counts as saturated like what is beyond."""
    import torch

    beyond = values.isnan() | (values.abs() >= 127.5)
    codes = values.nan_to_num(0.0).clamp(-127, 127).round().to(torch.int8)
    return codes, int(beyond.sum())


class Rescaled(NamedTuple):
    """What `rescale` returns: codes as integers, scales `[heads, tokens, groups]` where new ones were found."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    saturated: int


def rescale(
    codes: torch.Tensor,
    src: DType,
    dst: DType,
    *,
    scales: torch.Tensor | None = None,
    multipliers: Sequence[float] | None = None,
    groups: int = 0,
    joint: bool = False,
    largest: float = 0.0,
) -> Rescaled:
    """Convert codes `[heads, tokens, channels]` that have scales, or get `groups` new ones a token and head.

    `scales` are the codes' own, `[heads, tokens, any groups]`; `multipliers` one per head. Without `groups` the result
    is the codes' values in `dst`. With `joint` all heads of a token get one scale. A new scale takes the largest
    magnitude of its group (NaN left out) to the code `largest`, by default that of `dst`, and is at least float32's
    smallest normal.
    """
    import torch

    values = codes.contiguous().view(src.torch).to(torch.float32)
    heads, tokens, channels = values.shape
    factor = torch.ones(heads, tokens, channels)
    if multipliers is not None:
        factor = factor * torch.tensor(list(multipliers), dtype=torch.float32)[:, None, None]
    if scales is not None:
        factor = scales.repeat_interleave(channels // scales.shape[2], dim=2) * factor
    found = None
    if groups:
        biggest, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
        largest = largest or (127.0 if dst is DType.INT8 else torch.finfo(dst.torch).max)
        sizes = (values.nan_to_num(0.0, posinf=float("inf"), neginf=float("-inf")).abs() * factor.abs()).nan_to_num(0.0)
        amax = sizes.reshape(heads, tokens, groups, -1).amax(dim=3)
        if joint:
            amax = amax.amax(dim=0, keepdim=True).expand(heads, tokens, groups)
        found = (amax.clamp(max=biggest) / largest).clamp(min=tiny)
        factor = factor / found.repeat_interleave(channels // groups, dim=2)
        factor = torch.where(factor > biggest, torch.tensor(biggest), factor)
    encoded, saturated = encode(values * factor, dst)
    return Rescaled(encoded, found, saturated)


CANONICAL_NAN: dict[DType, int] = {
    DType.FLOAT32: 0x7FC00000,
    DType.FLOAT16: 0x7E00,
    DType.BFLOAT16: 0x7FC0,
    DType.FLOAT8_E4M3FN: 0x7F,
    DType.FLOAT8_E4M3FNUZ: 0x80,
    DType.FLOAT8_E5M2: 0x7F,
    DType.FLOAT8_E5M2FNUZ: 0x80,
}
"""Code of the one NaN that a conversion writes. OCP's and the fnuz formats' own; elsewhere the positive quiet NaN."""


def _last_fitting(dtype: DType) -> float:
    """The largest float32 that rounds to the largest finite value of `dtype`.

    Halfway to the next value is a tie, which goes to the even code: in e4m3fn, whose largest code 0x7e is even, it
    stays below; elsewhere the largest code is odd and the tie goes beyond.
    """
    import torch

    if dtype is DType.FLOAT32:
        return torch.finfo(torch.float32).max
    mantissa_bits = {"float16": 10, "bfloat16": 7, "float8_e4m3fn": 3, "float8_e4m3fnuz": 3}.get(dtype.value, 2)
    largest = torch.finfo(dtype.torch).max
    _, exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
    halfway = torch.tensor(largest + 2.0 ** (int(exponent) - 2 - mantissa_bits), dtype=torch.float32)
    if dtype is DType.FLOAT8_E4M3FN:
        return float(halfway)
    return float(torch.nextafter(halfway, torch.zeros_like(halfway)))


def dtype_of(side: Paged | Canonical) -> DType:
    """Element type of a side."""
    return side.layout.dtype if isinstance(side, Paged) else side.dtype


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the element's width."""
    import torch

    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
