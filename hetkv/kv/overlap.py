"""Do strided pieces of memory overlap? `Piece`, `overlapping`. Exact where strides nest, as those of every array do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

MOST_STEPS = 4096
"""Positions of one axis that are looked at; more, and the pieces count as overlapping."""

Axes = tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """Runs of `size` bytes along (count, stride) axes, the largest stride first."""

    name: str
    address: int
    axes: Axes
    size: int

    @classmethod
    def of(cls, name: str, address: int, axes: Iterable[tuple[int, int]], itemsize: int) -> Piece:
        """Elements of `itemsize` bytes; those that touch are one run."""
        outer = sorted(((count, stride) for count, stride in axes if count > 1), key=lambda axis: axis[1])
        size = itemsize
        while outer and outer[0][1] == size:
            size *= outer.pop(0)[0]
        return cls(name, address, tuple(reversed(outer)), size)

    @property
    def stop(self) -> int:
        """Address after the last byte."""
        return self.address + _span(self.axes, self.size)

    @property
    def overlaps_itself(self) -> bool:
        """Whether two of its elements share bytes, or strides that do not nest leave it open."""
        return any(stride < _span(self.axes[place + 1 :], self.size) for place, (_, stride) in enumerate(self.axes))


def overlapping(pieces: Iterable[Piece]) -> tuple[Piece, Piece] | None:
    """Two pieces that share bytes; one twice where it overlaps itself; `None` where all are separate."""
    active: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.address):
        if piece.overlaps_itself:
            return piece, piece
        active = [other for other in active if other.stop > piece.address]
        for other in active:
            if _collide(other.axes, other.size, piece.axes, piece.size, piece.address - other.address):
                return other, piece
        active.append(piece)
    return None


def _span(axes: Axes, size: int) -> int:
    return sum((count - 1) * stride for count, stride in axes) + size


def _collide(a: Axes, a_size: int, b: Axes, b_size: int, shift: int) -> bool:
    """Whether `a`, and `b` that begins `shift` bytes later, share bytes: the larger stride is unrolled first."""
    a_span, b_span = _span(a, a_size), _span(b, b_size)
    if shift >= a_span or shift + b_span <= 0:
        return False
    if not a and not b:
        return True
    if not a or (b and b[0][1] > a[0][1]):
        return _collide(b, b_size, a, a_size, -shift)
    (count, stride), rest = a[0], a[1:]
    first, last = 0, count - 1
    if b and b[0][1] == stride:  # only the difference of the two indices matters
        first, b, b_span = 1 - b[0][0], b[1:], _span(b[1:], b_size)
    # The part of `a` at index k begins at k * stride: those that reach into `b`.
    low = max(first, -((_span(rest, a_size) - shift - 1) // stride))
    high = min(last, (shift + b_span - 1) // stride)
    if high - low >= MOST_STEPS:
        return True
    return any(_collide(rest, a_size, b, b_size, shift - k * stride) for k in range(low, high + 1))
