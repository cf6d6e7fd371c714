"""An instance of one rank, in this process: `Alone`."""

from __future__ import annotations

from collections.abc import Callable

from hetkv.runtime.rank import Event, Facts, Moved, Order, Rank, RankConfig
from hetkv.runtime.sampling import Token
from hetkv.transport.instance import Instance


class Alone:
    """Implements `Ranks` of the engine."""

    count = 1

    def __init__(self, config: RankConfig) -> None:
        self._on_event: Callable[[int, Event], None] = lambda rank, event: None
        self.rank = Rank(config, lambda event: self._on_event(0, event))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End tokens of the checkpoint."""
        return self.rank.eos_ids

    @property
    def facts(self) -> list[Facts]:
        """Of each rank."""
        return [self.rank.facts()]

    def start(self, on_event: Callable[[int, Event], None]) -> None:
        self._on_event = on_event

    def work(self, order: Order) -> list[Token]:
        return self.rank.work(order)

    def link(self, source: Instance) -> None:
        self.rank.link(source)

    def trace(self) -> list[Moved]:
        """See `Rank.trace`."""
        return self.rank.trace()

    def close(self) -> None:
        self.rank.close()
