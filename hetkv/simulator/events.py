"""The simulator's clock: pop an event, handle it, push what follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Handler = Callable[[Any], None]


class Events:
    """Handle events in time order; events of the same time run in the order in which they were pushed.

    `now` is the simulated time in seconds. It never goes back.
    """

    __slots__ = ("_aside", "_heap", "_serial", "_stopped", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Handler, Any]] = []
        self._serial = 0
        self._aside = 0
        self._stopped = False

    def at(self, time: float, handler: Handler, argument: Any = None) -> None:
        """Call `handler(argument)` at simulated `time` (s). `ValueError` for a time that is past or not a number."""
        if not time >= self.now:
            raise ValueError(f"event at {time} s, but the clock is at {self.now} s")
        self._serial += 1
        heappush(self._heap, (time, self._serial, handler, argument))

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
        heap = self._heap
        while len(heap) > self._aside and not self._stopped:
            if heap[0][0] > until:
                self.now = until
                return
            self.now, _, handler, argument = heappop(heap)
            handler(argument)

    @property
    def count(self) -> int:
        """Events so far, pending ones too: a measure of the work that does not depend on the machine."""
        return self._serial

    def __len__(self) -> int:
        return len(self._heap)
