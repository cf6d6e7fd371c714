"""The simulator's clock: pop an event, handle it, push what follows."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any

Handler = Callable[[Any], None]
Event = tuple[float, int, Handler, Any]

FEW, MANY = 4, 64
"""Events in an interval: below the first on average intervals become longer, above the second shorter."""

FACTOR = 4
"""By which they do. A power of two, as `_per_second` is: then multiplication with it is exact."""


class Events:
    """Handle events in time order; events of the same time run in the order in which they were pushed.

    `now` is the simulated time in seconds. It never goes back.

    A heap of all events would be large where there are many instances. So only those of the interval in progress are
    sorted; later ones wait, unsorted, in a list for each interval: there are `_per_second` of them.
    """

    __slots__ = (
        "_aside", "_due", "_ends", "_handled", "_later", "_numbers", "_opened", "_per_second", "_serial", "_stopped",
        "now",
    )  # fmt: skip

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[Event] = []  # of the interval in progress, sorted; some are handled
        self._ends = 0.0  # the interval in progress, exclusive
        self._per_second = 64.0
        self._later: dict[float, list[Event]] = {}  # by the interval's number
        self._numbers: list[float] = []  # of these, a heap
        self._opened: list[int] = []  # events in each interval opened since the width was looked at
        self._handled = 0
        self._serial = 0
        self._aside = 0
        self._stopped = False

    def at(self, time: float, handler: Handler, argument: Any = None) -> None:
        """Call `handler(argument)` at simulated `time` (s). `ValueError` for a time that is past or not a number."""
        if not time >= self.now:
            raise ValueError(f"event at {time} s, but the clock is at {self.now} s")
        self._serial += 1
        event = (time, self._serial, handler, argument)
        if time < self._ends:
            insort(self._due, event)
            return
        try:
            number: float = int(time * self._per_second)
        except OverflowError:
            number = math.inf
        waiting = self._later.get(number)
        if waiting is None:
            self._later[number] = [event]
            heappush(self._numbers, number)
        else:
            waiting.append(event)

    def _open(self) -> bool:
        """Begin the next interval with events; False where there are none."""
        if not self._numbers:
            return False
        if len(self._opened) == 64:
            mean = sum(self._opened) / 64
            self._opened.clear()
            if mean > MANY or mean < FEW < len(self):
                self._resize(FACTOR if mean > MANY else 1 / FACTOR)
        number = heappop(self._numbers)
        self._due = self._later.pop(number)
        self._due.sort()
        self._ends = (number + 1) / self._per_second
        self._opened.append(len(self._due))
        return True

    def _resize(self, factor: float) -> None:
        """From the next interval on there are `factor` times as many in a second."""
        waiting = [event for events in self._later.values() for event in events]
        self._per_second *= factor
        self._later.clear()
        for event in waiting:
            number = event[0] * self._per_second
            self._later.setdefault(int(number) if number < math.inf else math.inf, []).append(event)
        self._numbers = list(self._later)
        heapify(self._numbers)

    def aside(self, time: float, handler: Handler, argument: Any = None) -> None:
        """As `at`, but `run` does not continue for such events alone."""
        self.at(time, self._handle_aside, (handler, argument))
        self._aside += 1

    def _handle_aside(self, event: tuple[Handler, Any]) -> None:
        self._aside -= 1
        handler, argument = event
        handler(argument)

    def stop(self) -> None:
        """`run` returns after the event in progress, whatever else is pending; the clock stays."""
        self._stopped = True

    def run(self, until: float = math.inf) -> None:
        """Handle events until only those put `aside` are left, the next one is later than `until` (s), or `stop`."""
        while not self._stopped:
            first = self._handled
            for time, _, handler, argument in self._due:  # grows meanwhile, after the event in progress
                if time > until or self._stopped or (self._aside and len(self) <= self._aside):
                    del self._due[: self._handled - first]
                    if time > until and not self._stopped and len(self) > self._aside:
                        self.now = until
                    return
                self.now = time
                self._handled += 1
                handler(argument)
            self._due.clear()
            if not self._open():
                return

    @property
    def count(self) -> int:
        """Events so far, pending ones too: a measure of the work that does not depend on the machine."""
        return self._serial

    def __len__(self) -> int:
        return self._serial - self._handled
