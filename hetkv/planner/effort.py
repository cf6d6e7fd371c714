"""How much a search may simulate: counted in events of the simulator, so that a machine's speed does not change a plan.

Between kinds of CPU numpy's `exp` and `log` may differ in the last bit: only figures that close decide otherwise there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from hetkv.planner.slo_checker import SloChecker

PLAN_EVENTS = 1_500_000
"""For the plan itself; an event takes 6 to 10 microseconds on a core of 2025."""

ALTERNATIVE_EVENTS = 600_000
"""For each alternative to it, and for each plan of a sweep."""

UNMET = 3
"""Times as many again for the neighbours of a plan that misses a target, where no plan meets them all."""

SAFETY_SECONDS = 3600.0
"""An outer limit by the clock. A plan that it cut short says so, and may be another one on a faster machine."""


@dataclass
class Effort:
    """What a search may still begin: until `events` of the simulator from now on are handled, or `deadline` has passed.

    A simulation that was begun is finished, so both are exceeded by one. Judges remember verdicts, and a remembered one
    costs nothing. `deadline` is of `time.perf_counter`. `short` is "events" or "clock" once that limit kept something
    from being begun.
    """

    checkers: Mapping[str, SloChecker]
    events: int
    deadline: float = inf
    short: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._end = self._simulated() + self.events

    def _simulated(self) -> int:
        return sum(checker.events for checker in self.checkers.values())

    def extend(self, events: int) -> None:
        """Allow so many more events; `short` still says that the limit before was met."""
        self._end += events

    @property
    def spent(self) -> bool:
        """Whether nothing more should be begun. Ask only where something would be: the answer is kept in `short`."""
        if time.perf_counter() > self.deadline:
            self.short = "clock"
        elif self._simulated() >= self._end:
            self.short = self.short or "events"
        else:
            return False
        return True
