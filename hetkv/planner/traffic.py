"""The traffic of one model: its classes as one stream for the simulator, and as samples for the queueing formulas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hetkv.planner.problem import WorkloadClass
from hetkv.simulator.request import Request
from hetkv.simulator.traffic.lengths import parse_lengths

Array = NDArray[np.float64]
DRAWS, POINTS = 20_000, 200


@dataclass(frozen=True)
class Sample:
    """`POINTS` equally likely requests of one class: lengths in tokens. `share` is the class's share of the rate.

    `prompts` and `outputs` are ascending and independent of each other; `others` is `outputs` in another, fixed order,
    so that (`prompts`, `others`) are pairs.
    """

    spec: WorkloadClass
    share: float
    prompts: Array
    outputs: Array
    others: Array


@dataclass(frozen=True)
class Mix:
    """Classes that share one deployment. Poisson streams together are one; each request is of a class by chance. Where
    a class comes in bursts, each class is a stream of its own.

    A `Workload` of the simulator: `count` requests at `scale` times the classes' rates. Gaps, classes and lengths have
    streams of their own, so that runs at other rates see the same requests.
    """

    classes: Sequence[WorkloadClass]
    scale: float = 1.0
    count: int = 4000
    single_token: bool = False  # only the prompts: every output is one token
    hash_tokens: int = field(default=0, init=False)

    @property
    def bursty(self) -> bool:
        """Whether a class has other than Poisson arrivals."""
        return any(c.arrival_cv != 1 for c in self.classes)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.scale * sum(c.rate for c in self.classes)

    @property
    def about(self) -> str:
        """One line for people."""
        arrivals = "gamma" if self.bursty else "poisson"
        return f"{arrivals} arrivals of {', '.join(c.name for c in self.classes)} at {self.rate:g} requests/s"

    def kinds(self, seed: int) -> NDArray[np.intp]:
        """The class of each request, as an index of `classes`."""
        if self.bursty:
            return self._streams(seed)[1]
        rates = np.array([c.rate for c in self.classes])
        return np.random.default_rng([seed, 3]).choice(len(rates), self.count, p=rates / rates.sum())

    def requests(self, seed: int) -> Iterator[Request]:
        """The requests in order of arrival; the same seed gives the same traffic."""
        if self.bursty:
            arrivals, kinds = self._streams(seed)
        else:
            kinds = self.kinds(seed)
            arrivals = np.cumsum(np.random.default_rng([seed, 0]).exponential(1 / self.rate, self.count))
        prompts = np.empty(self.count, dtype=np.int64)
        outputs = np.ones(self.count, dtype=np.int64)
        for i, spec in enumerate(self.classes):
            draws = np.random.default_rng([seed, 1, i]), np.random.default_rng([seed, 2, i])
            here = kinds == i
            prompts[here] = parse_lengths(spec.prompt_tokens, spec.name)(draws[0], self.count)[here]
            if not self.single_token:
                outputs[here] = parse_lengths(spec.output_tokens, spec.name)(draws[1], self.count)[here]
        rows = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
        for number, (arrival, prompt, output) in enumerate(rows):
            yield Request(number, arrival, prompt, output)

    def _streams(self, seed: int) -> tuple[Array, NDArray[np.intp]]:
        """Arrivals and classes of the first `count` requests of one renewal stream for each class."""
        times = []
        for i, spec in enumerate(self.classes):
            shape = spec.arrival_cv**-2
            gaps = np.random.default_rng([seed, 0, i]).gamma(shape, 1 / shape, self.count)
            times.append(np.cumsum(gaps) / (self.scale * spec.rate))
        together = np.concatenate(times)
        first = np.argsort(together, kind="stable")[: self.count]
        return together[first], first // self.count


def samples(classes: Sequence[WorkloadClass]) -> list[Sample]:
    """One `Sample` per class: the middle of each of `POINTS` quantiles of `DRAWS` draws."""
    total = sum(c.rate for c in classes)
    shuffle = np.random.default_rng(7).permutation(POINTS)
    found = []
    for spec in classes:
        lengths = []
        for stream, text in enumerate((spec.prompt_tokens, spec.output_tokens)):
            drawn = np.sort(parse_lengths(text, spec.name)(np.random.default_rng([11, stream]), DRAWS))
            lengths.append(drawn[DRAWS // POINTS // 2 :: DRAWS // POINTS].astype(np.float64))
        found.append(Sample(spec, spec.rate / total, lengths[0], lengths[1], lengths[1][shuffle]))
    return found
