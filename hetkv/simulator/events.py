"""The simulator's clock: pop an event, handle it, push what follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Handler = Callable[[Any], None]


class Events:
    """Pending events in time order; events of the same time run in the order in which they were pushed.

    `now` is the simulated time in seconds. It never goes back.
    """

    __slots__ = ("_heap", "_serial", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Handler, Any]] = []
        self._serial = 0

    def at(self, time: float, handler: Handler, argument: Any = None) -> None:
        """Call `handler(argument)` at simulated `time` (s). `ValueError` for a time that is past or not a number."""
        if not time >= self.now:
            raise ValueError(f"event at {time} s, but the clock is at {self.now} s")
        self._serial += 1
        heappush(self._heap, (time, self._serial, handler, argument))

    def run(self, until: float = math.inf) -> None:
        """Handle events until none is left or the next one is later than `until` (s)."""
        heap = self._heap
        while heap:
            if heap[0][0] > until:
                self.now = until
                return
            time, _, handler, argument = heappop(heap)
            self.now = time
            handler(argument)

    def __len__(self) -> int:
        return len(self._heap)
