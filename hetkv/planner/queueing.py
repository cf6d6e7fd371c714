"""How much of its service rate a pool of equal instances may use while a percentile of its latency holds.

docs/planner.md derives the formulas and says what each leaves out. Rates are per second, times seconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, 128, 512)
"""Pool sizes at which a capacity is worked out. Between two of them the smaller one's utilisation holds."""

LOADS = np.concatenate([np.arange(0.02, 0.9, 0.03), 1 - np.geomspace(0.1, 0.002, 14)])
"""Utilisations that are tried."""


@lru_cache(maxsize=1)
def erlang_c() -> Array:
    """Share of arrivals that wait in M/M/n, `[COUNTS, LOADS]`.

    By the recursion of Erlang's B in the number of servers: B(n) = a B(n-1) / (n + a B(n-1)).
    """
    table = np.empty((len(COUNTS), len(LOADS)))
    for row, servers in enumerate(COUNTS):
        offered = servers * LOADS
        blocked = np.ones_like(LOADS)
        for n in range(1, servers + 1):
            blocked = offered * blocked / (n + offered * blocked)
        table[row] = blocked / (1 - LOADS * (1 - blocked))
    return table


class Late(NamedTuple):
    """One class at a queue of prompts: service times of prompts alone, the limit, and the share that may miss it."""

    service: Array
    limit: float
    allowed: float


def waiting_load(classes: list[Late], mean: float, variance: float, bursts: float = 1.0) -> Array:
    """The largest utilisation for each of `COUNTS` at which every class keeps its limit; 0 where none does.

    M/G/n, first come first served: a share C of the arrivals waits (Erlang), and their wait is exponential with the
    mean of the two-moment approximation, `mean (bursts + cv^2) / 2 / (n (1 - load))` (Allen and Cunneen's for G/G/n).
    A request is late where its wait and its own service exceed the limit. `mean` and `variance` are of the service time
    over all classes, `bursts` is the squared coefficient of variation of the gaps between arrivals.
    """
    servers = np.array(COUNTS, dtype=np.float64)
    decay = 2 * servers[:, None] * (1 - LOADS) / (mean * (bursts + variance / mean**2))
    rows, wait = np.arange(len(COUNTS)), erlang_c()
    limits = [np.asarray(one.limit - one.service) for one in classes]
    good = np.zeros(len(COUNTS), dtype=np.intp)  # lateness rises with the load: the loads below `good` hold
    step = 1 << (len(LOADS).bit_length() - 1)
    while step:
        probe = good + step
        at = np.minimum(probe, len(LOADS)) - 1
        holds = probe <= len(LOADS)
        for one, left in zip(classes, limits, strict=True):
            late = np.exp(-decay[rows, at][:, None] * np.maximum(left, 0.0)) * wait[rows, at][:, None]
            holds &= np.where(left < 0, 1.0, late).mean(axis=1) <= one.allowed
        good = np.where(holds, probe, good)
        step >>= 1
    return np.where(good > 0, LOADS[np.maximum(good, 1) - 1], 0.0)


def batched_rate(classes: list[Late], rates: Array, steps: Array, mean: float, spread: float) -> float:
    """The largest of `rates` at which an instance that takes all waiting prompts in one step keeps every limit.

    `steps` is the time of the steps it settles to at each rate. A prompt waits for the rest of the step in progress
    (uniform), then for its own step, whose length varies by `spread` (relative, per root of the prompts in it). The
    prompt's own excess over the `mean` service is added. The sum is taken as normal.
    """
    from scipy.special import ndtr

    together = np.maximum(rates * steps, 1e-9)
    deviation = np.sqrt(steps**2 / 12 + 1.25 * (steps * spread) ** 2 / together)
    good = np.ones(rates.shape, dtype=bool)
    for one in classes:
        excess = np.maximum(one.service - mean, 0.0)
        z = (one.limit - 1.5 * steps[:, None] - excess) / deviation[:, None]
        good &= ndtr(-z).mean(axis=1) <= one.allowed
    return float(rates[good].max(initial=0.0))


def busy_batch(batches: Array, elasticity: Array, z: float, bursts: float = 1.0) -> Array:
    """The batch that a request of the percentile `z` meets, `[COUNTS, batches]`, where the mean is `batches`.

    Sequences in a decode pool are a birth-death process with a mean of `n` batches. Its variance is the mean over
    `1 - elasticity` (of step time in the batch: a longer step lets more sequences gather). Routing by load shares them
    evenly, so that one instance has 1/n of the deviation. `bursts` raise the variance by `(1 + bursts) / 2`, the
    peakedness with exponential times. A request sees the mean over its life, which has about
    `AVERAGED` of it.
    """
    servers = np.array(COUNTS, dtype=np.float64)[:, None]
    variance = batches * (1 + bursts) / 2 / np.maximum(1 - elasticity, 0.05)
    whole = np.where(servers > 1, 0.5, 0.0)
    found: Array = batches + whole + z * AVERAGED * np.sqrt(variance / servers)
    return found


AVERAGED = 0.7
