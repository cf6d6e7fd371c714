"""Which seeds choose a plan, and which judge it."""

from __future__ import annotations

CHOOSING, JUDGING = 1_000_000, 2_000_000


def choosing_seeds(seed: int, count: int) -> list[int]:
    """The problem's own seed first: pools are measured with it. A plan is chosen by all of them."""
    return [seed, *(seed + CHOOSING + i for i in range(count - 1))]


def held_out_seeds(seed: int, attempt: int, count: int) -> list[int]:
    """Seeds that chose nothing: each attempt to have a plan judged has its own."""
    first = seed + JUDGING + attempt * count
    return list(range(first, first + count))
