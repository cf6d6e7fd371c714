"""Distributions of prompt and output lengths, in tokens."""

from __future__ import annotations

from collections.abc import Callable
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from hetkv.errors import InputError

Draw = Callable[[np.random.Generator, int], NDArray[np.int64]]
"""(random, n) -> n lengths of at least 1."""

GRAMMAR = "N, uniform:LOW:HIGH, exponential:MEAN, geometric:MEAN or lognormal:MEAN:CV"


def parse_lengths(text: str, option: str) -> Draw:
    """A distribution from its name and numbers, such as `512` or `lognormal:1024:0.8`; see `GRAMMAR`.

    `CV` is the standard deviation over the mean. Draws are rounded to whole tokens, at least 1.
    """
    name, *rest = text.split(":")
    try:
        if not rest:
            name, numbers = "fixed", [float(name)]
        else:
            numbers = [float(x) for x in rest]
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a length distribution: {GRAMMAR}") from None
    wanted = {"fixed": 1, "uniform": 2, "exponential": 1, "geometric": 1, "lognormal": 2}.get(name)
    if wanted is None or len(numbers) != wanted:
        raise InputError(f"{option}: {text!r} is not a length distribution: {GRAMMAR}")
    if not all(0 < x < 1e9 for x in numbers) or numbers[0] < 1 or (name == "uniform" and numbers[1] < numbers[0]):
        raise InputError(f"{option}: {text!r} has a number out of range (lengths are 1 token or more)")
    return _DRAWS[name](*numbers)


def _whole(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.maximum(np.rint(values), 1).astype(np.int64)


def _fixed(length: float) -> Draw:
    return lambda random, n: np.full(n, round(length), dtype=np.int64)


def _uniform(low: float, high: float) -> Draw:
    return lambda random, n: random.integers(round(low), round(high) + 1, n)


def _exponential(mean: float) -> Draw:
    return lambda random, n: _whole(random.exponential(mean, n))


def _geometric(mean: float) -> Draw:
    return lambda random, n: random.geometric(1 / mean, n)


def _lognormal(mean: float, cv: float) -> Draw:
    variance = log(1 + cv * cv)
    return lambda random, n: _whole(random.lognormal(log(mean) - variance / 2, sqrt(variance), n))


_DRAWS: dict[str, Callable[..., Draw]] = {
    "fixed": _fixed,
    "uniform": _uniform,
    "exponential": _exponential,
    "geometric": _geometric,
    "lognormal": _lognormal,
}
