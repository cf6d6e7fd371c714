"""Time series of bounded memory: the resolution halves whenever the simulated time outgrows the bins."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Series:
    """Time averages of a piecewise constant signal in at most `bins` (even) equal bins of `width` seconds."""

    __slots__ = ("_bins", "_cursor", "_end", "_sum", "_sums", "_time", "peak", "value", "width")

    def __init__(self, bins: int = 512, width: float = 0.0625) -> None:
        self._bins = bins
        self._sums = [0.0] * bins  # value x seconds; of the bin in progress they are in `_sum`
        self._sum = 0.0
        self._cursor = 0
        self._end = width
        self._time = 0.0
        self.width = width
        self.value = 0.0
        self.peak = 0.0

    def add(self, now: float, delta: float) -> None:
        """The signal changes by `delta` at `now` (s)."""
        if now < self._end:
            self._sum += self.value * (now - self._time)
            self._time = now
        else:
            self._advance(now)
        value = self.value = self.value + delta
        if value > self.peak:
            self.peak = value

    def set(self, now: float, value: float) -> None:
        """The signal becomes `value` at `now` (s)."""
        self.add(now, value - self.value)

    def _advance(self, now: float) -> None:
        self._sums[self._cursor] = self._sum
        while now >= self._bins * self.width:
            self._double()
        while now >= self._end:
            self._sums[self._cursor] += self.value * (self._end - self._time)
            self._time = self._end
            self._cursor += 1
            self._end = (self._cursor + 1) * self.width
        self._sum = self._sums[self._cursor] + self.value * (now - self._time)
        self._time = now

    def _double(self) -> None:
        half = self._bins // 2
        self._sums = [self._sums[2 * i] + self._sums[2 * i + 1] for i in range(half)] + [0.0] * (self._bins - half)
        self.width *= 2
        self._cursor //= 2
        self._end = (self._cursor + 1) * self.width

    def integral(self, now: float) -> float:
        """Value x seconds from time 0 to `now`, which must not be before the last change."""
        self._sums[self._cursor] = self._sum
        return float(sum(self._sums)) + self.value * (now - self._time)

    def averages(self, now: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bin centres (s) and the signal's mean in each bin, up to `now`."""
        self.add(now, 0.0)
        self._sums[self._cursor] = self._sum
        used = self._cursor + 1
        left = np.arange(used) * self.width
        spans = np.minimum(left + self.width, now) - left
        keep = spans > 0
        sums = np.asarray(self._sums[:used])
        return (left + spans / 2)[keep], sums[keep] / spans[keep]

    def as_json(self, now: float) -> dict[str, Any]:
        """Seconds and values as lists, rounded to what a picture needs."""
        seconds, values = self.averages(now)
        return {"seconds": [round(float(x), 4) for x in seconds], "values": [round(float(x), 4) for x in values]}
