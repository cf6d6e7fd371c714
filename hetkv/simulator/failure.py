"""Instances that fail and come back."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from hetkv.errors import InputError
from hetkv.simulator.cluster import Cluster
from hetkv.simulator.events import Events


@dataclass(frozen=True)
class Outage:
    """Instance `instance` (such as `decode/3`) is down from `at` for `seconds`; permanently where that is infinite."""

    instance: str
    at: float
    seconds: float = inf


@dataclass(frozen=True)
class Hazard:
    """Each instance of `pool` fails after exponential times of mean `mtbf` and is down for ones of mean `mttr` (s)."""

    pool: str
    mtbf: float
    mttr: float


class Failures:
    """Schedules outages. They happen while requests are there or to come, and do not keep a simulation going."""

    def __init__(
        self, cluster: Cluster, events: Events, outages: list[Outage], hazards: list[Hazard], seed: int
    ) -> None:
        self.cluster = cluster
        self.events = events
        self.count = 0
        for outage in outages:
            if outage.instance not in cluster.instances:
                raise InputError(f"outage of unknown instance {outage.instance!r}; there are {_names(cluster)}")
            events.aside(outage.at, self._fail, (outage.instance, outage.seconds, None))
        for hazard in hazards:
            if hazard.pool not in {p.name for p in cluster.pools}:
                raise InputError(f"failures of unknown pool {hazard.pool!r}")
            for name, instance in cluster.instances.items():
                if instance.pool.name == hazard.pool:
                    draw = _Draw(name, hazard, np.random.default_rng([seed, *name.encode()]))
                    self._next(draw)

    def _next(self, draw: _Draw) -> None:
        at = self.events.now + float(draw.random.exponential(draw.hazard.mtbf))
        self.events.aside(at, self._fail, (draw.name, float(draw.random.exponential(draw.hazard.mttr)), draw))

    def _fail(self, event: tuple[str, float, _Draw | None]) -> None:
        name, seconds, draw = event
        if self.cluster.fail(name):
            self.count += 1
            if seconds < inf:
                self.events.at(self.events.now + seconds, self._recover, (name, draw))
        elif draw is not None:
            self._next(draw)

    def _recover(self, event: tuple[str, _Draw | None]) -> None:
        name, draw = event
        self.cluster.recover(name)
        if draw is not None:
            self._next(draw)


@dataclass(frozen=True)
class _Draw:
    name: str
    hazard: Hazard
    random: np.random.Generator


def _names(cluster: Cluster) -> str:
    names = list(cluster.instances)
    return ", ".join(names if len(names) <= 8 else [*names[:4], "...", names[-1]])
