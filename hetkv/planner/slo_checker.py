"""The simulator's word on a deployment: every class at its percentiles, with fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, inf
from typing import Any

import msgspec
import numpy as np

from hetkv.costmodel import StepModel
from hetkv.planner.capacity import Demand
from hetkv.planner.handover import Handover
from hetkv.planner.problem import ModelSpec, Problem, WorkloadClass
from hetkv.planner.result import ClassLatency, Instances
from hetkv.planner.traffic import Mix, Sample, samples
from hetkv.planner.unshared_links import UnsharedLinks
from hetkv.simulator.deployment import Engine, PoolPlan, Routing, build_pools
from hetkv.simulator.deployment import Plan as Deployment
from hetkv.simulator.events import Events
from hetkv.simulator.kv_links import Links
from hetkv.simulator.metrics import Columns
from hetkv.simulator.pool import Pool
from hetkv.simulator.records import Records
from hetkv.simulator.request import FINISHED
from hetkv.simulator.run import assemble, without_collection

WARM_UP, COOL_DOWN = 0.4, 0.1
"""Shares of the requests, first and last, that are served but not judged: the deployment fills and empties."""

MAX_REQUESTS = 20_000


@dataclass(frozen=True)
class Verdict:
    """What the simulator measured, by class name; `within`: the share of its requests within "ttft" and "tpot"."""

    latency: dict[str, ClassLatency]
    within: dict[tuple[str, str], float] = field(default_factory=dict)

    def used(self, role: str = "aggregated") -> float:
        """The largest share of a target that is used up: of TTFT for `prefill`, of TPOT for `decode`, else of both."""
        ttft = max((x.ttft_ms or 0.0) / x.ttft_limit_ms for x in self.latency.values())
        tpot = max((x.tpot_ms or 0.0) / x.tpot_limit_ms for x in self.latency.values())
        return {"prefill": ttft, "decode": tpot}.get(role, max(ttft, tpot))

    @property
    def meets(self) -> bool:
        """Whether every class keeps both targets."""
        return self.used() <= 1


@dataclass
class SloChecker:
    """Simulates deployments of one model of a problem. The same deployment, scale and seed give the same verdict.

    `models` overrides step models, by (gpu, tp, pp, dp, budget). Step times of decode runs are kept from one
    simulation to the next.
    """

    problem: Problem
    model: ModelSpec
    models: dict[tuple[str, int, int, int, int], StepModel] = field(default_factory=dict)
    simulations: int = 0
    events: int = 0  # that all simulations handled
    _lines: dict[Any, dict[int, Any]] = field(default_factory=dict)
    _known: dict[Any, Verdict] = field(default_factory=dict)

    @property
    def classes(self) -> Sequence[WorkloadClass]:
        return self.problem.classes_of(self.model.name)

    def __call__(
        self,
        instances: Sequence[Instances],
        scale: float,
        prompts_only: bool = False,
        quick: bool = False,
        after: Handover | None = None,
        seed: int | None = None,
    ) -> Verdict:
        """Simulate `instances` at `scale` times the classes' rates, with `seed` (None: the problem's).

        `prompts_only` leaves decoding and links out; `after` then stands for what comes between the prefill and the
        first token. `quick` leaves out the sharing of links (`UnsharedLinks`).
        """
        pools = tuple(
            sorted((i.role, i.gpu, i.tp, i.pp, i.dp, i.budget, i.kv_tokens or 0, i.weight, i.count) for i in instances)
        )
        seed = self.problem.seed if seed is None else seed
        key = (pools, scale, prompts_only, quick, after, seed)
        if key not in self._known:
            self._known[key] = self._simulate(instances, scale, prompts_only, quick, after, seed)
            self.simulations += 1
        return self._known[key]

    def _simulate(
        self,
        instances: Sequence[Instances],
        scale: float,
        prompts_only: bool,
        quick: bool,
        after: Handover | None,
        seed: int,
    ) -> Verdict:
        plan = deployment(self.problem, self.model, instances)
        if prompts_only:
            plan = msgspec.structs.replace(plan, first_token_at="prefill")
        mix = Mix(self.classes, scale, self.requests(scale), prompts_only)
        models = self._step_model if self.models else None
        columns, events = run(plan, mix, seed, models, self._lines, quick)
        self.events += events
        if after is not None:
            columns = {**columns, "first_token": columns["first_token"] + after.seconds(columns["prompt"])}
        return verdict(columns, self.classes, mix.kinds(seed))

    def _step_model(self, pool: PoolPlan, engine: Engine) -> StepModel:
        return self.models[pool.gpu, pool.tp, pool.pp, pool.dp, engine.max_num_batched_tokens]

    def requests(self, scale: float) -> int:
        """Requests to simulate: enough beyond the highest percentile, and ten times those that decode at once."""
        rate = sum(c.rate for c in self.classes)
        tail = max(
            c_tail / max(c.rate / rate, 0.1)
            for c in self.classes
            for c_tail in (100 / (100 - c.ttft_percentile), 100 / (100 - c.tpot_percentile))
        )
        return int(min(max(2500, 12 * tail, 10 * scale * self.flight), MAX_REQUESTS))

    @cached_property
    def samples(self) -> list[Sample]:
        """Samples of the classes."""
        return samples(self.classes)

    @cached_property
    def demand(self) -> Demand:
        """What the classes ask of an instance."""
        return Demand(self.samples)

    @cached_property
    def flight(self) -> float:
        """Sequences that decode at once at scale 1 where all are at their TPOT limit (Little)."""
        return float(sum(s.spec.rate * s.outputs.mean() * s.spec.tpot_ms / 1e3 for s in self.samples))


def deployment(problem: Problem, model: ModelSpec, instances: Sequence[Instances]) -> Deployment:
    """The simulator's plan of these instances of one model."""
    engine = problem.engine_for(model)
    pools, names = [], set()
    for item in instances:
        name = f"{item.role}-{item.gpu}-tp{item.tp}" + f"-pp{item.pp}" * (item.pp > 1) + f"-dp{item.dp}" * (item.dp > 1)
        while name in names:
            name += "x"
        names.add(name)
        own = dict(problem.offer(item.gpu).engine)
        if item.budget not in (0, problem.engine_for(model, problem.offer(item.gpu)).max_num_batched_tokens):
            own["max_num_batched_tokens"] = item.budget
        pools.append(
            PoolPlan(
                item.role,
                item.gpu,
                name,
                item.tp,
                item.pp,
                item.dp,
                item.count,
                own,
                item.kv_tokens,
                weight=item.weight,
            )
        )
    mixed = sum(i.role == "aggregated" for i in instances) > 1
    separate = any(i.role == "prefill" for i in instances)
    used = {i.gpu for i in instances}
    return Deployment(
        model=model.name,
        pools=pools,
        engine=engine,
        link=problem.link if separate else None,
        routing=Routing("weighted" if mixed else "least_loaded", "least_loaded"),
        prices=[p for p in problem.prices if p.gpu in used],
        allow_mixed_price_bases=problem.allow_mixed_price_bases,
        first_token_at=problem.first_token_at,
        catalogue=problem.catalogue,
        calibration=problem.calibration,
    )


def run(
    plan: Deployment,
    mix: Mix,
    seed: int,
    models: Any = None,
    lines: dict[Any, dict[int, Any]] | None = None,
    quick: bool = False,
) -> tuple[Columns, int]:
    """The simulator's columns of `mix` on `plan`, and its events: what `simulate` runs, without its summary.

    `lines` keeps the piecewise lines of step times from one run to the next.
    """
    events, records = Events(), Records()
    pools = [_with_lines(p, item, lines) for p, item in zip(build_pools(plan, models=models), plan.pools, strict=True)]
    cluster = assemble(plan, pools, events, records, mix.hash_tokens, UnsharedLinks if quick else Links)
    cluster.start(mix.requests(seed))
    with without_collection():
        events.run()
    cluster.finish()
    return records.columns(), events.count


def _with_lines(pool: Pool, plan: PoolPlan, lines: dict[Any, dict[int, Any]] | None) -> Pool:
    if lines is None:
        return pool
    key = (plan.gpu, plan.tp, plan.pp, plan.dp, pool.max_num_batched_tokens, pool.kv_blocks, pool.prefix_caching)
    return replace(pool, _lines=lines.setdefault(key, {}))


def verdict(columns: Columns, classes: Sequence[WorkloadClass], kinds: Any) -> Verdict:
    """Percentiles of each class over the judged requests; one that did not finish counts as later than any limit."""
    count = len(kinds)
    judged = np.zeros(count, dtype=bool)
    judged[ceil(WARM_UP * count) : count - int(COOL_DOWN * count)] = True
    done = columns["status"] == FINISHED
    ttft = np.where(done, 1e3 * (columns["first_token"] - columns["arrival"]), inf)
    tokens = columns["output"] - 1
    tpot = np.where(done, 1e3 * (columns["last_token"] - columns["first_token"]) / np.maximum(tokens, 1), inf)
    found, within = {}, {}
    for i, spec in enumerate(classes):
        here = judged & (kinds == i)
        first, later = ttft[here], tpot[here & (tokens > 0)]
        found[spec.name] = latency_of(
            spec, _percentile(first, spec.ttft_percentile), _percentile(later, spec.tpot_percentile)
        )
        for target, values, limit in (("ttft", first, spec.ttft_ms), ("tpot", later, spec.tpot_ms)):
            if values.size:
                within[spec.name, target] = float((values <= limit).mean())
    return Verdict(found, within)


def latency_of(spec: WorkloadClass, ttft_ms: float | None, tpot_ms: float | None) -> ClassLatency:
    """These latencies with the targets of their class."""
    return ClassLatency(ttft_ms, tpot_ms, spec.ttft_ms, spec.tpot_ms, spec.ttft_percentile, spec.tpot_percentile)


def _percentile(values: Any, percentile: float) -> float | None:
    """The value that `percentile` % do not exceed (the higher of two neighbours); None where there are none."""
    return float(np.percentile(values, percentile, method="higher")) if values.size else None
