"""Traffic: who arrives when, with how many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Protocol

import numpy as np

from hetkv.errors import InputError
from hetkv.simulator.request import Request
from hetkv.simulator.traffic.lengths import Draw

CHUNK = 4096


class Workload(Protocol):
    """A source of requests. `hash_tokens` is the length of the blocks that `Request.hashes` name; 0 without hashes."""

    hash_tokens: int

    @property
    def about(self) -> str:
        """One line for people."""
        ...

    def requests(self, seed: int) -> Iterator[Request]:
        """The requests in order of arrival, made one by one. The same seed gives the same traffic."""
        ...


@dataclass
class Synthetic:
    """Arrivals with independent gaps of mean `1 / rate` seconds, until `count` requests or `duration` seconds.

    `arrivals`: `poisson` (exponential gaps), `gamma` (gaps of coefficient of variation `cv`; above 1 is bursty) or
    `constant` (equal gaps).
    """

    rate: float
    prompts: Draw
    outputs: Draw
    count: int | None = None
    duration: float | None = None
    arrivals: str = "poisson"
    cv: float = 1.0
    hash_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.rate < inf:
            raise InputError(f"rate must be greater than 0 requests/s, got {self.rate}")
        if self.arrivals not in ("poisson", "gamma", "constant"):
            raise InputError(f"unknown arrivals {self.arrivals!r}; known are poisson, gamma, constant")
        if not 0 < self.cv < inf:
            raise InputError(f"cv must be greater than 0, got {self.cv}")
        if self.count is None and self.duration is None:
            raise InputError("synthetic traffic needs a number of requests or a duration")
        if self.count is not None and self.count < 1:
            raise InputError(f"requests must be at least 1, got {self.count}")
        if self.duration is not None and not 0 < self.duration < inf:
            raise InputError(f"duration must be greater than 0 s, got {self.duration}")

    @property
    def about(self) -> str:
        burst = f", cv {self.cv:g}" if self.arrivals == "gamma" else ""
        return f"{self.arrivals} arrivals at {self.rate:g} requests/s{burst}"

    def requests(self, seed: int) -> Iterator[Request]:
        gaps, prompts, outputs = (np.random.default_rng([seed, stream]) for stream in range(3))
        now, number = 0.0, 0
        end = inf if self.duration is None else self.duration
        left = self.count if self.count is not None else 2**62
        while left > 0:
            n = CHUNK
            times = now + np.cumsum(self._gaps(gaps, n))
            now = float(times[-1])
            columns = (times.tolist(), self.prompts(prompts, n).tolist(), self.outputs(outputs, n).tolist())
            for arrival, prompt, output in zip(*columns, strict=True):
                if arrival > end or left == 0:
                    return
                yield Request(number, arrival, prompt, output)
                number += 1
                left -= 1

    def _gaps(self, random: np.random.Generator, n: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        if self.arrivals == "constant":
            return np.full(n, 1 / self.rate)
        if self.arrivals == "poisson":
            return random.exponential(1 / self.rate, n)
        shape = 1 / self.cv**2
        return random.gamma(shape, 1 / (self.rate * shape), n)


@dataclass
class ClosedLoop:
    """`clients` that each send a request, wait for its end, whatever it is, think and send the next: `count` in all.

    They think for exponential times of mean `think_s` seconds (0: not at all), before their first request too. A
    request's `arrival` is that time until it is sent.
    """

    clients: int
    think_s: float
    prompts: Draw
    outputs: Draw
    count: int
    hash_tokens: int = 0

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise InputError(f"clients must be at least 1, got {self.clients}")
        if not 0 <= self.think_s < inf:
            raise InputError(f"think time must be 0 s or more, got {self.think_s}")
        if self.count < 1:
            raise InputError(f"requests must be at least 1, got {self.count}")

    @property
    def about(self) -> str:
        return f"{self.clients:,} clients that think {self.think_s:g} s"

    def requests(self, seed: int) -> Iterator[Request]:
        thinks, prompts, outputs = (np.random.default_rng([seed, stream]) for stream in range(3))
        for first in range(0, self.count, CHUNK):
            n = min(CHUNK, self.count - first)
            columns = (thinks.exponential(self.think_s, n), self.prompts(prompts, n), self.outputs(outputs, n))
            rows = zip(*(column.tolist() for column in columns), strict=True)
            for number, (think, prompt, output) in enumerate(rows, first):
                yield Request(number, think, prompt, output)
