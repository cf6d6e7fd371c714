"""Many decode steps in closed form.

Between two changes of its batch, a decode instance runs the same `batch` sequences step after step while the context
grows by `batch` tokens a step. Where step time is affine in context, `k` steps take the mean of the first and the last
times `k`. Step models are pieces of such lines (a maximum of compute and memory time has a kink), so each batch size
gets its pieces once, found by bisection, and a run of steps is a few sums.
"""

from __future__ import annotations

from bisect import bisect_right
from math import ceil, sqrt

from hetkv.costmodel.interface import StepModel

TOLERANCE = 1e-10
MAX_PIECES = 256


class StepLine:
    """Decode step time of one batch size as a piecewise line in the batch's total context.

    Exact to rounding where the model is piecewise affine; a curved model is followed within a relative `tolerance`
    that is widened tenfold until `MAX_PIECES` pieces suffice.
    """

    __slots__ = ("batch", "slopes", "starts", "tolerance", "values")

    def __init__(self, model: StepModel, batch: int, max_context: float) -> None:
        self.batch = batch
        self.tolerance = TOLERANCE
        while not self._build(model, max(float(max_context), float(batch))):
            self.tolerance *= 10

    def _build(self, model: StepModel, end: float) -> bool:
        def seconds(context: float) -> float:
            return model.step_seconds(self.batch, context)

        self.starts: list[float] = []  # context where each piece begins
        self.values: list[float] = []  # seconds there
        self.slopes: list[float] = []
        todo = [(0.0, end, seconds(0.0), seconds(end))]
        while todo:
            left, right, low, high = todo.pop()
            slope = (high - low) / (right - left)
            middle = (left + right) / 2
            split = False
            if right - left > self.batch / 4:  # a kink within one step of context touches at most one step
                for x in (middle, left + 0.2137 * (right - left), left + 0.8219 * (right - left)):
                    y = seconds(x)
                    if abs(low + slope * (x - left) - y) > self.tolerance * y:
                        split = True
                        break
            if split:
                value = seconds(middle)
                todo.append((middle, right, value, high))
                todo.append((left, middle, low, value))
                if len(self.starts) + len(todo) > MAX_PIECES:
                    return False
            else:
                self._append(left, low, slope)
        return True

    def _append(self, start: float, value: float, slope: float) -> None:
        if self.slopes:
            reach = self.values[-1] + self.slopes[-1] * (start - self.starts[-1])
            if abs(slope - self.slopes[-1]) <= 1e-9 * abs(slope) and abs(reach - value) <= self.tolerance * value:
                return
        self.starts.append(start)
        self.values.append(value)
        self.slopes.append(slope)

    def seconds(self, context: float, steps: int) -> float:
        """Seconds of `steps` decode steps, the first at a total context of `context` tokens."""
        batch = self.batch
        if len(self.starts) == 1:
            return steps * (self.values[0] + self.slopes[0] * (context + batch * (steps - 1) / 2))
        total = 0.0
        for first, count, slope in self._runs(context, steps):
            total += count * (first + slope * batch * (count - 1) / 2)
        return total

    def _runs(self, context: float, steps: int) -> list[tuple[float, int, float]]:
        """(seconds of the first step, number of steps, seconds per token of context) for each piece touched."""
        starts, batch = self.starts, self.batch
        piece = max(bisect_right(starts, context) - 1, 0)
        runs = []
        while steps > 0:
            count = steps
            if piece + 1 < len(starts):
                count = min(steps, max(ceil((starts[piece + 1] - context) / batch), 1))
            runs.append(
                (self.values[piece] + self.slopes[piece] * (context - starts[piece]), count, self.slopes[piece])
            )
            steps -= count
            context += count * batch
            while piece + 1 < len(starts) and starts[piece + 1] <= context:
                piece += 1
        return runs

    def steps_until(self, context: float, elapsed: float, limit: int) -> int:
        """The fewest steps, 1 to `limit`, that together last `elapsed` seconds or more (`limit` where none do)."""
        done = 0
        for first, count, slope in self._runs(context, limit):
            growth = slope * self.batch
            span = count * (first + growth * (count - 1) / 2)
            if span < elapsed:
                elapsed -= span
                done += count
                continue
            return max(done + _fewest(first, growth, elapsed, count), 1)
        return limit


def _fewest(first: float, growth: float, elapsed: float, count: int) -> int:
    """The least k, 0 to `count`, with `k*first + growth*k*(k-1)/2 >= elapsed`."""
    half = growth / 2
    linear = first - half
    if abs(half) * count < 1e-12 * first:
        guess = elapsed / first
    else:
        guess = 2 * elapsed / (linear + sqrt(max(linear * linear + 4 * half * elapsed, 0.0)))
    k = min(max(ceil(guess), 0), count)
    while k > 0 and (k - 1) * (first + half * (k - 2)) >= elapsed:
        k -= 1
    while k < count and k * (first + half * (k - 1)) < elapsed:
        k += 1
    return k
