"""Queues with known answers, and the simulator's own for the same ones."""

from __future__ import annotations

from collections.abc import Callable
from math import factorial, inf

import numpy as np

from hetkv.simulator.affine import AffineStepModel
from hetkv.simulator.cluster import Cluster
from hetkv.simulator.events import Events
from hetkv.simulator.metrics import Columns
from hetkv.simulator.pool import AGGREGATED, Pool
from hetkv.simulator.records import Records
from hetkv.simulator.traffic.lengths import Draw, parse_lengths
from hetkv.simulator.traffic.workload import Synthetic

CAPACITY = 2**40
WARM_UP = 0.05
"""Share of the requests left out at the beginning: the formulas are for the steady state."""


def md1_wait(load: float, service: float) -> float:
    """Mean wait of M/D/1 (Pollaczek-Khinchine): `load` is arrival rate x `service` seconds."""
    return load * service / (2 * (1 - load))


def mmc_wait(load: float, service: float, servers: int) -> float:
    """Mean wait of M/M/c (Erlang C), `load` per server."""
    offered = load * servers
    last = offered**servers / factorial(servers) / (1 - load)
    waits = last / (sum(offered**k / factorial(k) for k in range(servers)) + last)
    return waits * service / (servers * (1 - load))


def batch_service(rate: float, tokens: float, step: Callable[[int], float], places: float = inf) -> tuple[float, float]:
    """Mean sequences in service and mean waiting ones of a decode batch with Poisson arrivals.

    `j` sequences advance together, one token per `step(j)` seconds, so they leave at `j / (tokens * step(j))`: a
    birth-death process (processor sharing with a rate that depends on the state; without a limit on `places` the mean
    is all that counts of the output length, with one the formula is for geometric lengths).
    """
    weights, level, j = [1.0], 1.0, 0
    while j < 100_000 and (level > 1e-14 * max(weights) or j < 10):
        j += 1
        busy = int(min(j, places))
        level *= rate * tokens * step(busy) / busy
        weights.append(level)
    share = np.array(weights) / sum(weights)
    present = np.arange(len(weights))
    running = np.minimum(present, places)
    return float(share @ running), float(share @ (present - running))


def simulate_single(
    rate: float,
    prompts: Draw,
    outputs: Draw,
    constants: tuple[float, ...],
    count: int,
    seed: int,
    **settings: float | str,
) -> Columns:
    """Poisson arrivals on equal aggregated instances with affine step times; the columns without the warm-up.

    `settings` are fields of `Pool`, or `instances`, `routing` and `warm_up` (share of the requests left out).
    """
    skipped = int(float(settings.pop("warm_up", WARM_UP)) * count)
    routing = str(settings.pop("routing", "central_queue"))
    model = AffineStepModel(constants, CAPACITY, 0.0)
    pool = Pool("a", AGGREGATED, "", 1, int(settings.pop("instances", 1)), model, 1, CAPACITY // 16, **settings)  # type: ignore[arg-type]
    events, records = Events(), Records()
    cluster = Cluster([pool], events, records, prefill_routing=routing)
    cluster.start(Synthetic(rate, prompts, outputs, count).requests(seed))
    events.run()
    return {name: column[skipped:] for name, column in records.columns().items()}


def md1(load: float = 0.7, count: int = 200_000, seed: int = 1) -> tuple[float, float]:
    """(formula, simulation) of the mean wait of a prefill queue: one prompt of fixed length at a time."""
    service = 0.05
    one = parse_lengths("1", "")
    columns = simulate_single(load / service, one, one, (0, 0, 0, service, 0), count, seed, max_num_seqs=1)
    return md1_wait(load, service), float(np.mean(columns["scheduled"] - columns["arrival"]))


def mmc(load: float = 0.5, servers: int = 4, count: int = 400_000, seed: int = 1) -> tuple[float, float]:
    """The same for a central queue before several instances, with exponential prompt lengths."""
    service, mean = 0.05, 5000
    columns = simulate_single(
        load * servers / service,
        parse_lengths(f"exponential:{mean}", ""),
        parse_lengths("1", ""),
        (0, 0, 0, service / mean, 0),
        count,
        seed,
        max_num_seqs=1,
        max_num_batched_tokens=2**40,
        instances=servers,
    )
    return mmc_wait(load, service, servers), float(np.mean(columns["scheduled"] - columns["arrival"]))


STEP, SEQUENCE, TOKENS = 0.005, 0.0005, 2000
"""Long outputs: the formula lets a request join at once, an engine at its next step."""


def decode_sharing(
    outputs: str = f"{TOKENS}", rate: float = 0.6, count: int = 60_000, seed: int = 1
) -> tuple[float, float]:
    """(formula, simulation) of the mean end to end time of a decode batch without a limit.

    A prompt is one token that costs as much as a decoding sequence, so a request takes as many steps as it has output
    tokens.
    """
    running, _ = batch_service(rate, TOKENS, lambda j: STEP + SEQUENCE * j)
    columns = simulate_single(
        rate,
        parse_lengths("1", ""),
        parse_lengths(outputs, ""),
        (STEP, SEQUENCE, 0, SEQUENCE, 0),
        count,
        seed,
        max_num_seqs=4096,
    )
    return running / rate, float(np.mean(columns["last_token"] - columns["scheduled"]))


def decode_limited(rate: float = 0.4, places: int = 16, count: int = 60_000, seed: int = 1) -> tuple[float, float]:
    """The same with `max_num_seqs` places and geometric lengths, waiting included."""
    running, waiting = batch_service(rate, TOKENS, lambda j: STEP + SEQUENCE * j, places)
    columns = simulate_single(
        rate,
        parse_lengths("1", ""),
        parse_lengths(f"geometric:{TOKENS}", ""),
        (STEP, SEQUENCE, 0, SEQUENCE, 0),
        count,
        seed,
        max_num_seqs=places,
    )
    return (running + waiting) / rate, float(np.mean(columns["last_token"] - columns["arrival"]))
