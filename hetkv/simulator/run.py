"""One simulation: a plan, a workload and a seed in, the result out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from hetkv.costmodel import StepModel, load_catalogue, model_shape
from hetkv.costmodel.memory import request_bytes
from hetkv.errors import InputError
from hetkv.simulator.cluster import Cluster
from hetkv.simulator.deployment import Engine, Plan, PoolPlan, StepModels, build_pools, port_bytes_per_second
from hetkv.simulator.events import Events
from hetkv.simulator.failure import Failures, Hazard, Outage
from hetkv.simulator.kv_links import Links
from hetkv.simulator.metrics import Columns, Slo, spread, summarise
from hetkv.simulator.pool import Pool
from hetkv.simulator.records import Records
from hetkv.simulator.request import FINISHED
from hetkv.simulator.scaled import HIGH, LOW, ScaledStepModel
from hetkv.simulator.series import Series
from hetkv.simulator.traffic.workload import ClosedLoop, Workload


@dataclass
class Result:
    """What a simulation leaves: a row per request, time series per pool and link, and the summary of both."""

    columns: Columns
    pools: list[Pool]
    links: Links | None
    end: float  # simulated s at which the last request ended
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def series(self) -> dict[str, dict[str, Series]]:
        """Pool or `link` to the name of a series to the series."""
        found = {
            p.name: {"waiting": p.waiting, "running": p.running, "busy": p.busy, "down": p.down} for p in self.pools
        }
        if self.links is not None:
            found["link"] = {"flows": self.links.flows, "bytes_per_second": self.links.throughput}
        return found


def assemble(
    plan: Plan,
    pools: list[Pool],
    events: Events,
    records: Records,
    hash_tokens: int = 0,
    make_links: Callable[[Events, float, float, float], Links] = Links,
) -> Cluster:
    """The pools of `plan` joined as it says. `make_links` takes the clock, a port's and the fabric's bytes per second,
    and the latency in seconds. `hash_tokens` is the workload's.
    """
    links = None
    if plan.link is not None and plan.disaggregated:
        fabric = inf if plan.link.fabric_gb_s is None else plan.link.fabric_gb_s * 1e9
        links = make_links(events, port_bytes_per_second(plan), fabric, plan.link.latency_us / 1e6)
    return Cluster(
        pools,
        events,
        records,
        links,
        plan.routing.prefill,
        plan.routing.decode,
        overlap=plan.link is not None and plan.link.overlap == "layerwise",
        restart=plan.failures.requests == "restart",
        hash_tokens=hash_tokens,
    )


def simulate(
    plan: Plan,
    workload: Workload,
    seed: int = 0,
    slo: Slo | None = None,
    origin: str = "plan",
    models: StepModels | None = None,
    skip_ahead: bool = True,
) -> Result:
    """Run `workload` through `plan` until every request has ended.

    The same arguments give the same result, bit for bit. `models` replaces the cost model's step times. `InputError`
    where the plan names something unknown, lacks a figure, or does not fit in memory.
    """
    pools = build_pools(plan, origin, models, skip_ahead)
    prices = _hourly(plan, pools, origin)
    begin = time.perf_counter()
    events, records = Events(), Records()
    cluster = assemble(plan, pools, events, records, workload.hash_tokens)
    links = cluster.links
    outages = [Outage(o.instance, o.at_s, inf if o.down_s is None else o.down_s) for o in plan.failures.outages]
    hazards = [Hazard(h.pool, h.mtbf_s, h.mttr_s) for h in plan.failures.random]
    try:
        failures = Failures(cluster, events, outages, hazards, seed)
    except InputError as error:
        raise InputError(f"{origin}: failures: {error}") from None
    cluster.start(workload.requests(seed), workload.clients if isinstance(workload, ClosedLoop) else 0)
    with without_collection():
        events.run()
    cluster.finish()
    front = plan.front_ms / 1e3
    columns = {
        name: column + np.float64(front) if name in ("first_token", "last_token") else column
        for name, column in records.columns().items()
    }
    summary = summarise(columns, slo or Slo(), events.now + front)
    summary["failures"] = failures.count
    summary["utilisation"] = _utilisation(pools, events.now)
    summary["link"] = _link(links, events.now)
    summary["kv"] = _kv(plan, pools, columns)
    _cost(summary, pools, prices, plan)
    summary["seed"] = seed
    summary["workload"] = workload.about
    notes = _notes(pools, summary)
    summary["notes"] = notes
    summary["seconds"] = time.perf_counter() - begin
    return Result(columns, pools, links, events.now, summary, notes)


@contextmanager
def without_collection() -> Iterator[None]:
    """Python's search for cyclic garbage, which walks all instances again and again, waits: requests leave none."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


INTERVAL_KEYS = ("ttft_ms", "tpot_ms", "e2e_ms", "slo_attainment", "goodput_rps", "output_tokens_per_s")


def interval(
    plan: Plan, workload: Workload, seed: int = 0, slo: Slo | None = None, origin: str = "plan"
) -> dict[str, Any]:
    """The same simulation with every step time at the low, and at the high end of its 90 % interval.

    Keys `low` and `high` (of the step times) hold the figures of `INTERVAL_KEYS`. Both ends see the same arrivals.
    """
    found: dict[str, Any] = {}
    central = {pool.name: pool.model for pool in build_pools(plan, origin)}
    for end in (LOW, HIGH):

        def scaled(pool: PoolPlan, engine: Engine, end: str = end) -> StepModel:
            return ScaledStepModel(central[pool.name], end)

        summary = simulate(plan, workload, seed, slo, origin, scaled).summary
        found[end] = {key: summary[key] for key in INTERVAL_KEYS}
    return found


def _utilisation(pools: list[Pool], end: float) -> dict[str, float | None]:
    busy: dict[str, float] = {}
    up: dict[str, float] = {}
    for pool in pools:
        busy[pool.gpu] = busy.get(pool.gpu, 0.0) + pool.busy.integral(end) * pool.gpus
        up[pool.gpu] = up.get(pool.gpu, 0.0) + (pool.count * end - pool.down.integral(end)) * pool.gpus
    return {gpu: busy[gpu] / up[gpu] if up[gpu] > 0 else None for gpu in busy}


def _link(links: Links | None, seconds: float) -> dict[str, float] | None:
    if links is None:
        return None
    return {
        "transfers": links.count,
        "gigabytes": links.sent / 1e9,
        "mean_gb_s": links.sent / 1e9 / seconds if seconds else 0.0,
        "peak_gb_s": links.throughput.peak / 1e9,
        "peak_transfers": links.flows.peak,
    }


def _kv(plan: Plan, pools: list[Pool], columns: Columns) -> dict[str, Any]:
    """KV of the model, held once in the plan's dtype, and the room of an instance of each pool. Bytes.

    `bytes_per_token` is a token in all layers; `bytes_per_request`, over finished requests, what a request keeps at its
    end: windows and states counted as they are.
    """
    dtype = plan.engine.kv_dtype
    kv = request_bytes(model_shape(plan.model), 1, dtype)
    done = columns["status"] == FINISHED
    return {
        "dtype": dtype,
        "bytes_per_token": kv.token,
        "bytes_per_request": spread(kv.bytes(columns["prompt"][done] + columns["output"][done] - 1)),
        "room_bytes": {pool.name: pool.kv_blocks * pool.block_size * pool.model.kv.token for pool in pools},
    }


def _hourly(plan: Plan, pools: list[Pool], origin: str) -> dict[str, float]:
    """USD per GPU hour by GPU name; empty without prices. One price that is given and one that is not is an error."""
    if not plan.prices:
        return {}
    catalogue = load_catalogue(plan.catalogue)
    prices = {catalogue.gpu(p.gpu).name: p.usd_per_gpu_hour for p in plan.prices}
    for pool in pools:
        if pool.gpu not in prices:
            raise InputError(f"{origin}: prices: missing `usd_per_gpu_hour` of {pool.gpu} (pool {pool.name})")
    return prices


def _cost(summary: dict[str, Any], pools: list[Pool], prices: dict[str, float], plan: Plan) -> None:
    summary["usd_per_million_output_tokens"] = summary["price_basis"] = None
    if prices and summary["output_tokens"]:
        hourly = sum(p.count * p.gpus * prices[p.gpu] for p in pools)
        usd = hourly * summary["simulated_seconds"] / 3600
        summary["usd_per_million_output_tokens"] = usd / summary["output_tokens"] * 1e6
        summary["price_basis"] = ", ".join(sorted({f"{p.basis} {p.as_of}" for p in plan.prices}))


def _notes(pools: list[Pool], summary: dict[str, Any]) -> list[str]:
    """What a reader has to know before trusting the figures."""
    notes = []
    for pool in pools:
        efficiency = getattr(pool.model, "efficiency", None)
        fallback = getattr(efficiency, "fallback", "")
        if fallback:
            note = f"pool {pool.name}: {fallback}"
            if note not in notes:
                notes.append(note)
    if summary["rejected"]:
        notes.append(f"{summary['rejected']} requests are longer than the KV cache of the smallest instance: rejected")
    if summary["failed"]:
        notes.append(f"{summary['failed']} requests failed: lost with their instance, or never served")
    return notes
